"""Normalisations by name. All reduce in float32, whatever the dtype of the activations."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.errors import InputError, nearest
from seqmodels.notation import Activations, Array
from seqmodels.ops._heads import by_head

NORMS = ("rmsnorm", "zero_centered_rmsnorm", "srmsnorm", "layernorm")


def make_norm(
    kind: str,
    *,
    epsilon: float = 1e-5,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    name: str | None = None,
) -> nn.Module:
    """A norm over the last axis, as a module called `name` in its parent.

    rmsnorm     x / rms(x) * scale      Zhang, Sennrich 2019, arXiv 1910.07467
    zero_centered_rmsnorm    x / rms(x) * (1 + scale)    as in Gemma (2024, arXiv 2403.08295)
    srmsnorm    x / rms(x)              without parameters; Qin et al. 2023, arXiv 2307.14995
    layernorm   (x - mean) / std * scale + bias
    """
    if kind not in NORMS:
        raise InputError(f"norm {kind!r} does not exist; {nearest(kind, NORMS)}")
    dtypes = {"epsilon": epsilon, "dtype": dtype, "param_dtype": param_dtype, "name": name}
    if kind == "layernorm":
        return nn.LayerNorm(**dtypes)
    if kind == "zero_centered_rmsnorm":
        return ZeroCenteredRMSNorm(**dtypes)
    return nn.RMSNorm(use_scale=kind == "rmsnorm", **dtypes)


def unit(x: Array) -> Array:
    """Each vector of x [b, t, h, d] over its length, in float32; 1e-6 under the root."""

    def over_length(x: Array) -> Array:
        wide = x.astype(jnp.float32)
        return (wide * jax.lax.rsqrt(jnp.sum(wide * wide, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)

    return by_head(over_length, x)


class ZeroCenteredRMSNorm(nn.Module):
    """x / rms(x) * (1 + scale) over the last axis, in float32 until the end. Parameter `scale`, 0 at the start."""

    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        scale = self.param("scale", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return (wide * (1 + scale.astype(wide.dtype))).astype(self.dtype)


class GatedRMSNorm(nn.Module):
    """rmsnorm(x * silu(gate)), the channels of each group on their own: the norm of Mamba-2.

    groups             equal parts of the last axis, each divided by its own root mean square
    norm_before_gate   rmsnorm(x) * silu(gate) instead

    Parameter `scale`, one for each channel.
    """

    groups: int = 1
    norm_before_gate: bool = False
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Activations, gate: Activations) -> Activations:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], self.param_dtype)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        x, gate = x.astype(wide), jax.nn.silu(gate.astype(wide))
        if not self.norm_before_gate:
            x = x * gate
        x = by_head(self._over_rms, x.reshape(*x.shape[:-1], self.groups, -1)).reshape(x.shape) * scale
        return (x * gate if self.norm_before_gate else x).astype(self.dtype)

    def _over_rms(self, x: Array) -> Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
