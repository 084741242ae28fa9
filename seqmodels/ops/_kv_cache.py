"""The state of softmax attention: the keys and values of the document so far, in a fixed number of slots.

Token p of a document (p = 0, 1, ...) lives in slot

    p                                    without a window: slots fill from the front, up to the capacity
    p                    if p < sinks    with one: the first tokens stay,
    sinks + (p - sinks) % window         the others share a ring, each over the one `window` before it

so a cache with a window has `window + sinks` slots however long the stream is.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Float, Int

from seqmodels.notation import Array


class KVCache(NamedTuple):
    """Keys and values of a document, each with its position in it.

    k, v       in the dtype of the inputs; what an empty slot holds is zero
    position   position in the document of the token in each slot, -1 where the slot is empty
    length     number of tokens of the document so far. Without a window it may exceed the number of slots:
               tokens that found none are lost, and attention over the cache is NaN until a document starts
    """

    k: Float[Array, "b slots h k"]
    v: Float[Array, "b slots h v"]
    position: Int[Array, "b slots"]
    length: Int[Array, " b"]

    @property
    def slots(self) -> int:
        return self.position.shape[1]


def empty_cache(
    batch: int, capacity: int, heads: int, key_dim: int, value_dim: int, dtype: jnp.dtype = jnp.float32
) -> KVCache:
    """A cache before the first token. `heads`: those of k and v. `capacity`: window + sinks if windowed."""
    return KVCache(
        jnp.zeros((batch, capacity, heads, key_dim), dtype),
        jnp.zeros((batch, capacity, heads, value_dim), dtype),
        jnp.full((batch, capacity), -1, jnp.int32),
        jnp.zeros(batch, jnp.int32),
    )


def cache_bytes(capacity: int, heads: int, key_dim: int, value_dim: int, dtype: jnp.dtype) -> int:
    """Bytes of a cache of one row: keys, values and a position in every slot, and the length."""
    return capacity * (heads * (key_dim + value_dim) * jnp.dtype(dtype).itemsize + 4) + 4


def emptied(cache: KVCache) -> KVCache:
    """An empty cache of the same shape."""
    batch, slots, heads, key_dim = cache.k.shape
    return empty_cache(batch, slots, heads, key_dim, cache.v.shape[-1], cache.k.dtype)


def enlarged(cache: KVCache, capacity: int) -> KVCache:
    """The same tokens in a cache with `capacity` slots. Without a window only: there slot = position."""
    more = [(0, 0), (0, capacity - cache.slots)]
    return cache._replace(
        k=jnp.pad(cache.k, [*more, (0, 0), (0, 0)]),
        v=jnp.pad(cache.v, [*more, (0, 0), (0, 0)]),
        position=jnp.pad(cache.position, more, constant_values=-1),
    )


def append(
    cache: KVCache,
    k: Float[Array, "b t h k"],
    v: Float[Array, "b t h v"],
    position: Int[Array, "b t"],
    length: Int[Array, " b"],
    window: int | None,
    sinks: int,
) -> KVCache:
    """The cache after more tokens of the same document, which is `length` tokens long with them.

    `position` is where each token stands in the document, -1 for one that is not to be stored. With a window,
    only those that a later query may see are: the sinks and the last `window`.
    """
    keep = position >= 0
    slot = position
    if window is not None:
        keep &= (position < sinks) | (position >= length[:, None] - window)
        slot = jnp.where(position < sinks, position, sinks + (position - sinks) % window)
    # Out of range means dropped. Distinct even then: a scatter to unique indices has the simpler gradient.
    nowhere = cache.slots + jnp.arange(position.shape[1])
    slot = jnp.where(keep & (slot < cache.slots), slot, nowhere)
    row = jnp.arange(slot.shape[0])[:, None]

    def write(slots: Array, tokens: Array) -> Array:
        return slots.at[row, slot].set(tokens.astype(slots.dtype), mode="drop", unique_indices=True)

    return KVCache(write(cache.k, k), write(cache.v, v), write(cache.position, position), length)
