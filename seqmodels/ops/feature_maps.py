"""Feature maps phi for linear attention: q and k become phi(q) and phi(k), and q.k becomes phi(q).phi(k).

    name       phi(x)                                                   features of d       source, arXiv
    identity   x                                                        d
    elu+1      x + 1 where x > 0, exp(x) elsewhere                      d                   2006.16236
    relu       max(x, 0)                                                d
    softmax    softmax over the channels                                d                   1812.01243
    taylor     [1, x / d^(1/4), x_i^2 / sqrt(2 d), x_i x_j / sqrt(d)]   1 + d + d (d+1)/2   2402.18668
    dpfp       r * roll(r, 1), r = [relu(x), relu(-x)]                  2 d                 2102.11174
    dpfp2      [r * roll(r, 1), r * roll(r, 2)]; dpfp3 one more         4 d; 6 d            2102.11174
    hedgehog   [softmax(W x), softmax(-W x)]                            2 d                 2402.04347

(Katharopoulos et al. 2020; Shen et al. 2018; Arora et al. 2024; Schlag et al. 2021; Zhang et al. 2024.)

Maps act on the last axis and keep the dtype of their input. All but `identity` and `taylor` are non-negative; the
product of two Taylor features is 1 + s + s^2 / 2 >= 1/2 with s = q.k / sqrt(d). Only with such maps can attention be
normalised: the denominator of `identity` crosses zero.

The maps in LEARNED act on a learned projection W x, one for the queries and one for the keys of each head, which the
layer makes: the functions here take W x.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from seqmodels.errors import InputError, nearest
from seqmodels.notation import Array


def elu_plus_one(x: Array) -> Array:
    """Positive; exactly x + 1 above zero."""
    return jnp.where(x > 0, x + 1, jnp.exp(jnp.minimum(x, 0)))


def taylor(x: Array) -> Array:
    """Second-order Taylor expansion of exp(q.k / sqrt(d)). Products of channels i <= j appear once, i < j doubled."""
    d = x.shape[-1]
    squares = x * x / (2 * d) ** 0.5
    products = [x[..., i : i + 1] * x[..., i + 1 :] / d**0.5 for i in range(d - 1)]
    return jnp.concatenate([jnp.ones_like(x[..., :1]), x / d**0.25, squares, *products], axis=-1)


def dpfp(x: Array, nu: int = 1) -> Array:
    """Deterministic parameter-free projection: `nu` products of each channel of r with those before it."""
    r = jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1)
    return jnp.concatenate([r * jnp.roll(r, i, axis=-1) for i in range(1, nu + 1)], axis=-1)


def hedgehog(x: Array) -> Array:
    """The paper's [exp(x), exp(-x)] with each half divided by its sum, as its authors do later: it cannot overflow."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.concatenate([jax.nn.softmax(wide), jax.nn.softmax(-wide)], axis=-1).astype(x.dtype)


FEATURE_MAPS: dict[str, Callable[[Array], Array]] = {
    "identity": lambda x: x,
    "elu+1": elu_plus_one,
    "relu": jax.nn.relu,
    "softmax": jax.nn.softmax,
    "taylor": taylor,
    "dpfp": dpfp,
    "dpfp2": functools.partial(dpfp, nu=2),
    "dpfp3": functools.partial(dpfp, nu=3),
    "hedgehog": hedgehog,
}
LEARNED = frozenset({"hedgehog"})


def feature_map(name: str) -> Callable[[Array], Array]:
    """The map of that name."""
    if name not in FEATURE_MAPS:
        raise InputError(f"feature map {name!r} does not exist; {nearest(name, FEATURE_MAPS)}")
    return FEATURE_MAPS[name]
