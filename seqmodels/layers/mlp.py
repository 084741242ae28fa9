"""Gated feed-forward layers (Shazeer 2020, arXiv 2002.05202): down(activation(gate(x)) * up(x))."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.notation import Activations, Array


class GLU(nn.Module):
    """Gated linear unit with a sigmoid gate.

    hidden_dim   inner width; None is 8/3 d_model rounded up to a multiple of 64, as many parameters as an ungated
                 layer of 4 d_model
    """

    d_model: int
    hidden_dim: int | None = None
    use_bias: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    activation = staticmethod(jax.nn.sigmoid)

    @property
    def width(self) -> int:
        return self.hidden_dim or -(-8 * self.d_model // (3 * 64)) * 64

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        hidden = self.width
        dtypes = {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gate = nn.Dense(hidden, name="gate_proj", **dtypes)(x)
        up = nn.Dense(hidden, name="up_proj", **dtypes)(x)
        return nn.Dense(self.d_model, name="down_proj", **dtypes)(type(self).activation(gate) * up)


class SwiGLU(GLU):
    """Gated linear unit with a silu gate: LLaMA's feed-forward layer."""

    activation = staticmethod(jax.nn.silu)


class GeGLU(GLU):
    """Gated linear unit with a gelu gate: the feed-forward layer of Griffin and Gemma."""

    activation = staticmethod(jax.nn.gelu)


def _ungated(x: Array) -> Array:
    return x


class SGLU(GLU):
    """Simple GLU, the product of two projections (TransNormerLLM, Qin et al. 2023, arXiv 2307.14995)."""

    activation = staticmethod(_ungated)


MLP = Callable[..., GLU]
