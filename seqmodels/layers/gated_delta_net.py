"""Gated DeltaNet: the delta rule with a decay per head (Yang, Kautz, Hatamizadeh 2024, arXiv 2412.06464)."""

import jax
import jax.numpy as jnp

from seqmodels.layers._initializers import log_rate_init, time_step_init
from seqmodels.layers._mixer import Stream, dense_flops
from seqmodels.layers.delta_net import DeltaNet
from seqmodels.notation import Activations


class GatedDeltaNet(DeltaNet):
    """DeltaNet with g = -exp(A_log) softplus(x W_a + dt_bias) per head, and a silu gate on the normalised output.

    S_t = exp(g_t) S_{t-1} + beta_t k_t^T (v_t - exp(g_t) k_t S_{t-1});   o_t = q_t S_t / sqrt(head_dim)

    num_heads   heads of queries and keys
    head_dim    channels of a query or key; None is 3/4 d_model / num_heads, which makes 6 d_model^2 parameters as in
                attention with a gated output
    expand_v    channels of a value, as a multiple of head_dim
    use_gate    multiply the normalised output by silu(x W)
    and the fields of `DeltaMixer`: num_v_heads, conv_size, allow_neg_eigval, norm_eps.

    Parameters carry the names of flash-linear-attention's layer. At the start, exp(A_log) is uniform in [0.01, 16] (the
    paper's 0 would be a logarithm of -inf) and softplus(dt_bias) log-uniform in [0.001, 0.1].
    """

    num_heads: int = 6
    expand_v: float = 2.0
    use_gate: bool = True

    @property
    def key_dim(self) -> int:
        return self.head_dim or self.divide(3 * self.d_model // 4, self.num_heads, "3/4 d_model")

    @property
    def decays(self) -> int:
        return 1

    def setup(self) -> None:
        super().setup()
        self.a_proj = self.gate_dense(self.value_heads)
        self.A_log = self.param("A_log", log_rate_init(0.01, 16.0), (self.value_heads,), jnp.float32)
        self.dt_bias = self.param("dt_bias", time_step_init(), (self.value_heads,), jnp.float32)

    def project(self, x: Activations, stream: Stream) -> dict:
        g = -jnp.exp(self.A_log) * jax.nn.softplus(self.a_proj(x) + self.dt_bias)
        return {**super().project(x, stream), "g": g}

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        rate = dense_flops(self.d_model, self.value_heads)
        return super().flops_per_token(length, decoding=decoding) + rate
