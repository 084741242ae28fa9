"""Mamba-2 (Dao, Gu 2024, arXiv 2405.21060)."""

import math

import jax
import jax.numpy as jnp

from seqmodels.errors import InputError
from seqmodels.layers._initializers import log_rate_init, time_step_init
from seqmodels.layers._mixer import (
    CURSOR_BYTES,
    FLOAT32,
    Mixer,
    MixerState,
    ShortConvolution,
    Stream,
    convolution_bytes,
    dense_flops,
    merge_heads,
    split_heads,
    start_cursor,
)
from seqmodels.layers.norms import GatedRMSNorm
from seqmodels.notation import Activations
from seqmodels.ops.linear_attention import zero_state
from seqmodels.ops.short_conv import zero_inputs
from seqmodels.ops.ssd import ssd, ssd_flops


class Mamba2(Mixer):
    """One projection in, a short convolution, the state-space operator, a gated norm, one projection out.

        z, xBC, dt = in_proj(u)                          widths d_inner, d_inner + 2 n_groups d_state, heads
        x, B, C    = silu(conv1d(xBC))
        y          = ssd(x, softplus(dt + dt_bias), -exp(A_log), B, C, D)
        output     = out_proj(norm(y * silu(z)))

    Parameters have the names of the authors' code and of Hugging Face's Mamba2.

    d_state    rows of a head's state
    d_conv     width of the convolution
    expand     d_inner / d_model
    head_dim   channels of a head; a layer whose d_inner is narrower has one head
    n_groups   groups of heads that share B and C; the norm is taken over each group's channels
    norm_before_gate   out_proj(norm(y) * silu(z)) instead
    use_bias, conv_bias   biases of the two projections, of the convolution
    dt_min, dt_max, dt_init_floor   at the start softplus(dt_bias) is log-uniform between the first two, but at least
               the third
    dt_limit   the steps are clipped to this range
    A_init_range   at the start exp(A_log) is uniform in this range
    norm_eps   added to the mean square in the norm
    """

    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    head_dim: int = 64
    n_groups: int = 1
    norm_before_gate: bool = False
    use_bias: bool = False
    conv_bias: bool = True
    dt_min: float = 0.001
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    dt_limit: tuple[float, float] = (0.0, math.inf)
    A_init_range: tuple[float, float] = (1.0, 16.0)
    norm_eps: float = 1e-5

    op = staticmethod(ssd)

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model

    @property
    def num_heads(self) -> int:
        return self.heads_of(self.head_dim, self.d_inner, "expand * d_model")

    @property
    def in_width(self) -> int:
        """Channels of z, of x, B and C, and of dt together."""
        return self.d_inner + self.conv_width + self.num_heads

    @property
    def conv_width(self) -> int:
        """Channels of x, B and C together."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    def setup(self) -> None:
        if self.n_groups < 1 or self.num_heads % self.n_groups:
            raise InputError(f"Mamba2: {self.num_heads} heads do not make {self.n_groups} equal groups (n_groups)")
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.in_proj = self.dense(self.in_width, use_bias=self.use_bias)
        self.conv1d = ShortConvolution(self.conv_width, self.d_conv, use_bias=self.conv_bias, **dtypes)
        steps = time_step_init(self.dt_min, self.dt_max, self.dt_init_floor)
        self.dt_bias = self.param("dt_bias", steps, (self.num_heads,))
        self.A_log = self.param("A_log", log_rate_init(*self.A_init_range), (self.num_heads,))
        self.D = self.param("D", lambda key: jnp.ones(self.num_heads))
        self.norm = GatedRMSNorm(self.n_groups, self.norm_before_gate, self.norm_eps, **dtypes)
        self.out_proj = self.dense(self.d_model, use_bias=self.use_bias)

    def mix(self, x: Activations, stream: Stream) -> Activations:
        z, xBC, dt = jnp.split(self.in_proj(x), [self.d_inner, self.d_inner + self.conv_width], axis=-1)
        states = self.n_groups * self.d_state
        x, B, C = jnp.split(self.conv1d(xBC, stream), [self.d_inner, self.d_inner + states], axis=-1)
        y = self.operate(
            stream,
            x=split_heads(x, self.num_heads),
            dt=jnp.clip(jax.nn.softplus(dt.astype(jnp.float32) + self.dt_bias), *self.dt_limit),
            A=-jnp.exp(self.A_log),
            B=split_heads(B, self.n_groups),
            C=split_heads(C, self.n_groups),
            D=self.D,
        )
        return self.out_proj(self.norm(merge_heads(y), z))

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        head_dim = self.d_inner // self.num_heads
        return {
            "cursor": start_cursor(batch_size),
            "memory": zero_state(batch_size, self.num_heads, self.d_state, head_dim),
            "conv1d": zero_inputs(batch_size, self.d_conv, self.conv_width),
        }

    def state_bytes(self, length: int = 0) -> int:
        memory = FLOAT32 * self.d_state * self.d_inner
        return CURSOR_BYTES + memory + convolution_bytes(self.d_conv, self.conv_width)

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        projections = dense_flops(self.d_model, self.in_width) + dense_flops(self.d_inner, self.d_model)
        return projections + ssd_flops(
            length,
            heads=self.num_heads,
            groups=self.n_groups,
            states=self.d_state,
            channels=self.d_inner // self.num_heads,
            chunk_size=self.chunk_size,
            decoding=decoding,
        )
