"""A row laid out anew, so that every mini-batch of every document is a tile of its own.

Operators that work a fixed number of tokens at a time, counted from the start of each document, meet rows whose
documents start anywhere, have padding between them, and go on from an earlier span in the middle of a tile:

    row                   a a a a a . b b b b b b b b c c          tiles of 4 slots; the state before has seen one a
    tiles                 - a a a | a a - - | b b b b | b b b b | c c - -

A tile holds tokens of one document. Those of the document that the incoming state belongs to begin where that state
stands in its tile; every other document begins with a tile. What is at the end of a row's last tile tells where its
state stands. Slots without a token are to leave the state as it is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

from seqmodels.notation import Array
from seqmodels.ops import _scan
from seqmodels.ops._scan import Documents


class Tiles(NamedTuple):
    """Where the tokens of a row lie.

    size      c, slots per tile
    position  [b, n, c] the position of the token in a slot; without meaning where there is none
    real      [b, n, c] whether there is a token in a slot
    slot      [b, t] the slot of a token, counted through all tiles; without meaning for padding
    token     [b, t] whether there is a token at a position; False for padding
    starts    [b, n] whether a tile begins a document, so that its state is a fresh one
    place     [b] slots of the current tile that the tokens up to the row's end fill; 0 where it is full
    fit       [] whether all tokens have a slot; None where that is certain
    """

    size: int
    position: Int[Array, "b n c"]
    real: Bool[Array, "b n c"]
    slot: Int[Array, "b t"]
    token: Bool[Array, "b t"]
    starts: Bool[Array, "b n"]
    place: Int[Array, " b"]
    fit: Bool[Array, ""] | None


def lay(docs: Documents | None, place: Int[Array, " b"], length: int, size: int) -> Tiles:
    """Lay rows of `length` positions out in tiles.

    docs: None is one document without padding, which fills at most ceil(t / c) + 1 tiles. Documents of any lengths may
    fill up to t tiles; there are 2 ceil(t / c) + 1 of them, enough for documents of c tokens and more on average.
    place [b]: slots of the current tile that were filled before.
    """
    tiles = -(-length // size) + 1
    if docs is None:
        shape = (place.shape[0], length)
        docs, fits = Documents(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool), jnp.zeros(shape, bool)), True
    else:
        tiles = min(2 * tiles - 1, length)
        fits = tiles == length
    places = _scan.places(docs, place)
    # 1. Tiles counted from 0: the first one of a row may have been begun before.
    opened = jnp.cumsum(docs.real & (places % size == 0), axis=1, dtype=jnp.int32)
    first = jnp.argmax(docs.real, axis=1)[:, None]
    slot = (opened - jnp.take_along_axis(opened, first, axis=1)) * size + places % size
    # 2. The inverse; tokens without a slot are left out.
    end = tiles * size
    positions = jnp.broadcast_to(jnp.arange(length), slot.shape)
    put = jax.vmap(lambda slot, position: jnp.full(end, -1).at[slot].set(position, mode="drop"))
    position = put(jnp.where(docs.real, slot, end), positions).reshape(-1, tiles, size)
    real = position >= 0
    position = jnp.maximum(position, 0)
    begins = jnp.take_along_axis(docs.starts, position[:, :, 0], axis=1) & real[:, :, 0]
    fit = None if fits else jnp.all(jnp.where(docs.real, slot, 0) < end)
    return Tiles(size, position, real, slot, docs.real, begins, (places[:, -1] + 1) % size, fit)


def to_tiles(x: Array, tiles: Tiles) -> Array:
    """[b, t, ...] -> [b, n, c, ...], zero in slots without a token."""
    flat = (x.shape[0], -1)
    out = _move(x, tiles.position.reshape(flat), tiles.real.reshape(flat), tiles.slot, tiles.token)
    return out.reshape(*tiles.real.shape, *x.shape[2:])


def from_tiles(x: Array, tiles: Tiles) -> Array:
    """[b, n, c, ...] -> [b, t, ...], zero at padding."""
    flat = (x.shape[0], -1)
    slots = x.reshape(*flat, *x.shape[3:])
    return _move(slots, tiles.slot, tiles.token, tiles.position.reshape(flat), tiles.real.reshape(flat))


@jax.custom_vjp
def _move(x: Array, source: Array, there: Array, target: Array, used: Array) -> Array:
    """x[source] where `there`, else 0; row by row. `target`, `used` say the same of the way back: a gather as well."""
    out = jax.vmap(lambda x, source: jnp.take(x, source, axis=0, mode="clip"))(x, source)
    return jnp.where(there.reshape(there.shape + (1,) * (out.ndim - 2)), out, 0)


def _move_forward(x: Array, *ways: Array) -> tuple[Array, tuple[Array, ...]]:
    return _move(x, *ways), ways


def _move_backward(ways: tuple[Array, ...], dout: Array) -> tuple[Array, None, None, None, None]:
    source, there, target, used = ways
    return _move(dout, target, used, source, there), None, None, None, None


_move.defvjp(_move_forward, _move_backward)
