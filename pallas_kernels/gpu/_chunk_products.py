"""Products within single chunks, for all chunks at once: what XLA computes on the whole GPU, before and after a walk.

Factors are rounded to the dtype of the rows, sums are float32.

    name     shape            dtype
    rows     [b, t, h, d]     bfloat16
    pairs    [b, h, n, C, C]  n = t / C chunks; the later position comes first
    states   [b, h, n, k, v]  bfloat16
"""

import jax
import jax.numpy as jnp

from pallas_kernels.gpu._chunk import CHUNK

Array = jax.Array


def meet(a: Array, b: Array) -> Array:
    """a_i b_j for all pairs of rows of a chunk."""
    return _product("bnihd,bnjhd->bhnij", _cut(a), _cut(b))


def apply(pairs: Array, x: Array) -> Array:
    """pairs x, rows in float32."""
    return _join(_product("bhnij,bnjhd->bnihd", pairs.astype(x.dtype), _cut(x)))


def apply_transposed(pairs: Array, x: Array) -> Array:
    """pairs^T x, rows in float32."""
    return _join(_product("bhnij,bnihd->bnjhd", pairs.astype(x.dtype), _cut(x)))


def read_transposed(x: Array, states: Array) -> Array:
    """x S^T with the state of each chunk, [b, t, h, k] in float32 from x [b, t, h, v]."""
    return _join(_product("bnihv,bhnkv->bnihk", _cut(x), states))


def by_chunk(x: Array) -> Array:
    """[b, t, h] -> [b, h, n, C]."""
    return jnp.moveaxis(_cut(x), 3, 1)


def by_position(x: Array) -> Array:
    """[b, h, n, C] -> [b, t, h]."""
    return _join(jnp.moveaxis(x, 1, 3))


def _product(equation: str, a: Array, b: Array) -> Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _cut(x: Array) -> Array:
    return x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:])


def _join(x: Array) -> Array:
    return x.reshape(x.shape[0], -1, *x.shape[3:])
