"""Normalisations by name. All reduce in float32, whatever the dtype of the activations."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from seqmodels.errors import InputError, nearest

NORMS = ("rmsnorm", "srmsnorm", "layernorm")


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
    srmsnorm    x / rms(x)              without parameters; Qin et al. 2023, arXiv 2307.14995
    layernorm   (x - mean) / std * scale + bias
    """
    if kind not in NORMS:
        raise InputError(f"norm {kind!r} does not exist; {nearest(kind, NORMS)}")
    dtypes = {"epsilon": epsilon, "dtype": dtype, "param_dtype": param_dtype, "name": name}
    if kind == "layernorm":
        return nn.LayerNorm(**dtypes)
    return nn.RMSNorm(use_scale=kind == "rmsnorm", **dtypes)
