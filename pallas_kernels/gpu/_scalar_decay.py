"""Chunks whose decay is one number for each head and position, or none: the weights of their positions and pairs.

With b the inclusive cumulative sum of the log decay g in a chunk of C positions, a position reads the state that enters
with the weight exp(b), writes the state that leaves with exp(b_C - b), a pair j <= i meets with exp(b_i - b_j), and
exp(b_C) of the entering state is left. No exponent is positive; documents are masks on all of these.

    name            shape            dtype
    g               [b, t, hv]       float32
    index           [b, t]           int32        document of each position, non-decreasing
    b, enter, ...   [b, hv, n, C]    float32      n = t / C chunks
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gpu._chunk import CHUNK

Array = jax.Array


class Weights(NamedTuple):
    """Of every chunk.

    b             [b, hv, n, C]
    enter, leave  [b, hv, n, C]: of the entering state in a position, of a position in the leaving state
    through       [b, hv, n, 1]: of the entering state in the leaving one
    """

    b: Array
    enter: Array
    leave: Array
    through: Array


def weights(g: Array | None, index: Array | None, shape: tuple) -> Weights:
    """shape: that of v."""
    batch, length, heads, _ = shape
    if g is None:
        b = jnp.zeros((batch, heads, length // CHUNK, CHUNK), jnp.float32)
    else:
        g = g.reshape(batch, -1, CHUNK, heads)
        b = jnp.einsum("bnjh,ij->bhni", g, triangle(), precision="highest")
    last = b[..., -1:]
    enter, leave, through = jnp.exp(b), jnp.exp(last - b), jnp.exp(last)
    if index is not None:
        index = index.reshape(batch, 1, -1, CHUNK)
        incoming = jnp.pad(index[:, :, :-1, -1:], ((0, 0), (0, 0), (1, 0), (0, 0)))
        first, final = index == incoming, index == index[..., -1:]
        enter, leave, through = enter * first, leave * final, through * first[..., -1:]
    return Weights(b, enter, leave, through)


def triangle() -> Array:
    """[C, C]: ones on and below the diagonal."""
    return jnp.tril(jnp.ones((CHUNK, CHUNK), jnp.float32))


def pairs(index: Array | None) -> Array:
    """[b, 1, n, C, C] bool, or [C, C]: the positions j <= i that see each other."""
    earlier = jnp.tril(jnp.ones((CHUNK, CHUNK), bool))
    if index is None:
        return earlier
    index = index.reshape(index.shape[0], 1, -1, CHUNK)
    return earlier & (index[..., :, None] == index[..., None, :])


def pair_decay(b: Array, index: Array | None) -> Array:
    """[b, hv, n, C, C]: exp(b_i - b_j) for the pairs that see each other, else 0."""
    exponent = jnp.minimum(b[..., :, None] - b[..., None, :], 0)
    return jnp.where(pairs(index), jnp.exp(exponent), 0)
