"""Where parameters of decay start: the rate at which a head forgets, and its time step."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.notation import Array


def log_rate_init(low: float, high: float) -> nn.initializers.Initializer:
    """log(A), A uniform in [low, high]: how fast a head forgets, per unit of its time step."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jnp.log(jax.random.uniform(key, shape, dtype, low, high))

    return init


def time_step_init(low: float = 1e-3, high: float = 1e-1, floor: float = 0.0) -> nn.initializers.Initializer:
    """x with softplus(x) = dt, dt log-uniform in [low, high], but at least `floor` (Gu, Dao 2023, arXiv 2312.00752)."""

    def init(key: Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        dt = jnp.exp(jax.random.uniform(key, shape, dtype, math.log(low), math.log(high)))
        dt = jnp.maximum(dt, floor)
        return dt + jnp.log(-jnp.expm1(-dt))

    return init
