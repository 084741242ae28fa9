"""The recurrent block of Griffin and Hawk (De et al. 2024, arXiv 2402.19427)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.layers._mixer import (
    CURSOR_BYTES,
    FLOAT32,
    Mixer,
    MixerState,
    ShortConvolution,
    Stream,
    convolution_bytes,
    dense_flops,
    start_cursor,
)
from seqmodels.notation import Activations, Array
from seqmodels.ops.rglru import rglru, zero_state
from seqmodels.ops.short_conv import zero_inputs

SHARPNESS = 8.0  # c of the paper


class RGLRU(Mixer):
    """Two branches of x: linear, short convolution, RG-LRU; and linear, gelu. Their product is projected back.

        r_t = sigmoid(u_t W_a + b_a)        log a_t = -8 softplus(recurrent_param) r_t
        i_t = sigmoid(u_t W_x + b_x)        h_t = a_t h_{t-1} + sqrt(1 - a_t^2) (i_t u_t)
        y_t = (h_t * gelu(x_t W_y + b_y)) W_out + b_out

    with u the convolved linear branch and W_a, W_x block diagonal. The first token of a document enters whole, a = 0,
    as in RecurrentGemma, whose parameters are named as here (`transformers`; recurrentgemma calls them otherwise).
    Griffin puts two of these blocks before each one of local attention: configs/mixers/griffin.gin.

    lru_width      channels of the recurrence; None is d_model
    num_heads      blocks on the diagonal of W_a and of W_x
    conv1d_width   tokens that the convolution sees
    """

    lru_width: int | None = None
    num_heads: int = 8
    conv1d_width: int = 4

    op = staticmethod(rglru)

    @property
    def width(self) -> int:
        return self.lru_width or self.d_model

    def setup(self) -> None:
        self.divide(self.width, self.num_heads, "lru_width")
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.linear_y, self.linear_x = (self.dense(self.width, use_bias=True) for _ in range(2))
        self.conv_1d = ShortConvolution(
            self.width,
            self.conv1d_width,
            use_bias=True,
            activation=None,
            kernel_init=nn.initializers.variance_scaling(0.01, "fan_in", "normal", in_axis=0, out_axis=()),
            **dtypes,
        )
        self.rg_lru = _Gates(self.num_heads, **dtypes)
        small = nn.initializers.variance_scaling(2 / self.n_layers, "fan_in", "normal")
        self.linear_out = nn.Dense(self.d_model, kernel_init=small, **dtypes)

    def project(self, x: Activations, stream: Stream) -> dict:
        gated, g = self.rg_lru(self.conv_1d(self.linear_x(x), stream))
        return {"x": gated, "g": jnp.where((stream.positions == 0)[..., None], -jnp.inf, g)}

    def readout(self, o: Array, x: Activations) -> Activations:
        return self.linear_out(o * jax.nn.gelu(self.linear_y(x)))

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        return {
            "cursor": start_cursor(batch_size),
            "memory": zero_state(batch_size, self.width),
            "conv_1d": zero_inputs(batch_size, self.conv1d_width, self.width),
        }

    def state_bytes(self, length: int = 0) -> int:
        return CURSOR_BYTES + FLOAT32 * self.width + convolution_bytes(self.conv1d_width, self.width)

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        branches, out = 2 * dense_flops(self.d_model, self.width), dense_flops(self.width, self.d_model)
        block = self.width // self.num_heads
        gates = 2 * self.num_heads * dense_flops(block, block)
        return branches + gates + out  # the recurrence is element-wise


class _Gates(nn.Module):
    """The gated input i_t u_t and the log decay log a_t [b, t, d], the latter in float32, from u [b, t, d]."""

    num_heads: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, u: Activations) -> tuple[Activations, Array]:
        decay = self.param("recurrent_param", _decay_init, u.shape[-1:], self.param_dtype).astype(jnp.float32)
        i, r = (jax.nn.sigmoid(self._block_diagonal(f"{name}_gate", u)) for name in ("input", "recurrent"))
        return i.astype(self.dtype) * u, -SHARPNESS * r * jax.nn.softplus(decay)

    def _block_diagonal(self, name: str, u: Activations) -> Array:
        """u W + b in float32, W [heads, d / heads, d / heads] in blocks."""
        block = u.shape[-1] // self.num_heads
        init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", batch_axis=0)
        weight = self.param(f"{name}_weight", init, (self.num_heads, block, block), self.param_dtype)
        bias = self.param(f"{name}_bias", nn.initializers.zeros, (self.num_heads, block), self.param_dtype)
        blocks = u.reshape(*u.shape[:2], self.num_heads, block)
        # Numbers of `dtype` in float32: XLA on CPUs does not multiply blocks of bfloat16 into float32.
        logits = jnp.einsum("bthi,hij->bthj", *(x.astype(self.dtype).astype(jnp.float32) for x in (blocks, weight)))
        return (logits + bias.astype(jnp.float32)).reshape(u.shape)


def _decay_init(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """softplus of it is -log of a decay, the square of which is uniform between 0.9^2 and 0.999^2."""
    square = jax.random.uniform(key, shape, minval=0.9**2, maxval=0.999**2)
    return jnp.log(jnp.expm1(-0.5 * jnp.log(square))).astype(dtype)
