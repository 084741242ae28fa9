"""Work on heads in the order in which a TPU has them.

A TPU keeps [b, t, h * d], as projections and kernels write it, in tiles of 8 positions and 128 channels, but
[b, t, h, d] in tiles of 8 heads and 128 channels: what reads the second from the first copies it, and back. As
[b, t / 8, h * d / 128, 8, 128] it is in the first order already.
"""

from collections.abc import Callable

import jax.numpy as jnp

from seqmodels.notation import Array
from seqmodels.ops import _mesh

ROWS, LANES = 8, 128


def by_head(function: Callable[[Array], Array], x: Array) -> Array:
    """`function`, which keeps shapes and mixes nothing but the last axis, of x [b, t, h, d]."""
    batch, length, heads, channels = x.shape
    if channels % LANES or not _helps(length):
        return function(x)
    tiles = x.reshape(batch, -1, ROWS, heads, channels).swapaxes(2, 3)
    return function(tiles).swapaxes(2, 3).reshape(x.shape)


def times_heads(x: Array, weights: Array) -> Array:
    """x [b, t, h, d] times weights [b, t, h], in the dtype of x."""
    batch, length, heads, channels = x.shape
    shared = LANES // channels  # heads that share a tile
    if shared * channels != LANES or heads % shared or not _helps(length):
        return (weights[..., None] * x).astype(x.dtype)
    tiles = x.reshape(batch, -1, ROWS, heads // shared, LANES).swapaxes(2, 3)
    weights = weights.reshape(batch, -1, ROWS, heads // shared, shared).swapaxes(2, 3)
    of_lane = jnp.arange(LANES) // channels
    wide = sum(jnp.where(of_lane == n, weights[..., n : n + 1], 0) for n in range(shared))
    return (wide * tiles).astype(x.dtype).swapaxes(2, 3).reshape(x.shape)


def _helps(length: int) -> bool:
    """Whether the program is for TPUs, and the positions of each device are whole tiles."""
    mesh = _mesh.view()
    return _mesh.on_tpus() and length % (ROWS * (1 if mesh is None else mesh.n_time)) == 0
