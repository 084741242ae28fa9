"""Feature maps phi for linear attention: q and k become phi(q) and phi(k), and q.k becomes phi(q).phi(k).

    name       phi(x)                                    features of d   source
    identity   x                                         d
    elu+1      x + 1 where x > 0, exp(x) elsewhere       d               Katharopoulos et al. 2020, 2006.16236
    relu       max(x, 0)                                 d
    softmax    softmax over the channels                 d               Shen et al. 2018, 1812.01243
    taylor     [1, x / d^(1/4), x_i x_j / sqrt(2 d)]     1 + d + d^2     Arora et al. 2024, 2402.18668
    dpfp       r * roll(r, 1), r = [relu(x), relu(-x)]   2 d             Schlag et al. 2021, 2102.11174

Maps act on the last axis in the dtype of their input. All but `identity` and `taylor` are non-negative; the product of
two Taylor features is 1 + s + s^2 / 2 >= 1/2 with s = q.k / sqrt(d). Only with such maps can attention be normalised:
the denominator of `identity` crosses zero.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from seqmodels.errors import InputError, nearest
from seqmodels.notation import Array


def elu_plus_one(x: Array) -> Array:
    """Positive; exactly x + 1 above zero."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def taylor(x: Array) -> Array:
    """Second-order Taylor expansion of exp(q.k / sqrt(d))."""
    d = x.shape[-1]
    second = (x[..., :, None] * x[..., None, :]).reshape(*x.shape[:-1], d * d)
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x / d**0.25, second / (2 * d) ** 0.5], axis=-1)


def dpfp(x: Array) -> Array:
    """Deterministic parameter-free projection with nu = 1."""
    r = jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1)
    return r * jnp.roll(r, 1, axis=-1)


FEATURE_MAPS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "elu+1": elu_plus_one,
    "relu": jax.nn.relu,
    "softmax": jax.nn.softmax,
    "taylor": taylor,
    "dpfp": dpfp,
}


def feature_map(name: str) -> Callable[[Array], Array]:
    """The map of that name."""
    if name not in FEATURE_MAPS:
        raise InputError(f"feature map {name!r} does not exist; {nearest(name, FEATURE_MAPS)}")
    return FEATURE_MAPS[name]
