"""Kimi delta attention: the delta rule with a decay per key channel (Kimi Linear, Kimi Team 2025, arXiv 2510.26692)."""

import jax
import jax.numpy as jnp
from flax.linen.initializers import zeros

from seqmodels.errors import InputError
from seqmodels.layers._delta_mixer import DeltaMixer
from seqmodels.layers._initializers import log_rate_init, time_step_init
from seqmodels.layers._mixer import Stream, dense_flops, split_heads
from seqmodels.notation import Activations, Array, ChannelDecay


class KimiDeltaAttention(DeltaMixer):
    """DeltaNet with g = -exp(A_log) softplus(x W_0 W_1 + dt_bias) per channel, and a sigmoid gate on the output.

    S_t = (I - beta_t k_t^T k_t) diag(exp(g_t)) S_{t-1} + beta_t k_t^T v_t;   o_t = q_t S_t / sqrt(head_dim)

    The projections to g and to the output gate have an inner width of a value head's channels.

    lower_bound   with a number l < 0, g = l sigmoid(exp(A_log) (x W_0 W_1 + dt_bias)), so that no step forgets more
                  than exp(l); None for the rule above
    gate_bias     a bias in the projection to the output gate, as flash-linear-attention's layer has and the released
                  models have not
    and the fields of `DeltaMixer`: num_heads, head_dim, num_v_heads, expand_v, conv_size, allow_neg_eigval, norm_eps.
    Kimi Linear has heads of 128 channels.

    Parameters carry the names of flash-linear-attention's layer. At the start, exp(A_log) is uniform in [1, 16] (1 with
    a lower bound) and softplus(dt_bias) log-uniform in [0.001, 0.1].
    """

    lower_bound: float | None = None
    gate_bias: bool = False

    @property
    def decays(self) -> int:
        return self.key_dim

    def setup(self) -> None:
        if self.lower_bound is not None and self.lower_bound >= 0:
            raise InputError(f"KimiDeltaAttention: lower_bound is {self.lower_bound:g}; expected a log decay below 0")
        super().setup()
        heads, channels = self.value_heads, self.value_heads * self.key_dim
        self.f_proj_0, self.f_proj_1 = self.dense(self.value_dim), self.gate_dense(channels)
        self.g_proj_0 = self.dense(self.value_dim)
        self.g_proj_1 = self.dense(heads * self.value_dim, use_bias=self.gate_bias)
        rate = zeros if self.lower_bound is not None else log_rate_init(1.0, 16.0)
        self.A_log = self.param("A_log", rate, (heads,), jnp.float32)
        self.dt_bias = self.param("dt_bias", time_step_init(), (channels,), jnp.float32)

    def project(self, x: Activations, stream: Stream) -> dict:
        return {**super().project(x, stream), "g": self.log_decay(x)}

    def log_decay(self, x: Activations) -> ChannelDecay:
        f = split_heads(self.f_proj_1(self.f_proj_0(x)) + self.dt_bias, self.value_heads)
        rate = jnp.exp(self.A_log)[:, None]
        if self.lower_bound is None:
            return -rate * jax.nn.softplus(f)
        return self.lower_bound * jax.nn.sigmoid(rate * f)

    def output_gate(self, x: Activations) -> Array:
        return jax.nn.sigmoid(split_heads(self.g_proj_1(self.g_proj_0(x)), self.value_heads))

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        decay = dense_flops(self.d_model, self.value_dim, self.value_heads * self.key_dim)
        gate = dense_flops(self.d_model, self.value_dim, self.value_heads * self.value_dim)
        return super().flops_per_token(length, decoding=decoding) + decay + gate
