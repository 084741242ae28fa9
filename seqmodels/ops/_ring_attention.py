"""Softmax attention whose queries, keys and values lie spread over devices.

    ring      queries stay, keys and values go round, W - 1 messages of a shard each (Liu, Zaharia, Abbeel 2023, arXiv
              2310.01889); on the way back the gradients of keys and values go round with them
    gather    the keys and values of all shards to all, once (LASP-2H, Sun et al. 2025, arXiv 2502.07563)

What a query saw of some keys, its outputs o and the logarithm L of its sum of exponentials, merges with the rest:

    L = log(exp L_1 + exp L_2),   o = exp(L_1 - L) o_1 + exp(L_2 - L) o_2                                          (1)

and the gradients of `_blockwise_attention` need the final o and L alone. Which query sees which key is a matter of
their ranks, wherever they are. A causal query sees what is before it, so a device with the last shard would work W
times as long as that with the first: inside, the row is cut into 2 W pieces, and device r takes pieces r and
2 W - 1 - r (the zigzag). Outside all stays in the order of time.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmodels.notation import TIME_AXIS, Array
from seqmodels.ops import _blockwise_attention as blockwise
from seqmodels.ops._blockwise_attention import Reach, in_blocks, out_of_blocks


class Attention(NamedTuple):
    """What is to be attended to: see `blockwise_attention`.

    q           [b, t, hk, g, k]
    k, v, key   [b, t, ...] keys, values and their ranks, spread like the queries
    query       the reach of the queries
    front       keys, values and ranks [b, j, ...] that every device has, or None
    """

    q: Array
    k: Array
    v: Array
    query: Reach
    key: Array
    front: tuple[Array, Array, Array] | None


class Settings(NamedTuple):
    """scale, window, sinks, block as for `blockwise_attention`. shards: W. causal: balance for it."""

    scale: float
    window: int | None
    sinks: int
    block: int
    shards: int
    causal: bool

    @property
    def how(self) -> tuple[float, int | None, int]:
        return self.scale, self.window, self.sinks


def ring_attention(x: Attention, settings: Settings) -> Array:
    """Inside `jax.shard_map`: o [b, t, hk, g, v] in q's dtype, for the shards of this device."""
    if _is_balanced(x, settings):
        own = jax.tree.map(functools.partial(_to_zigzag, shards=settings.shards), x._replace(front=None))
        return _from_zigzag(_ring(own._replace(front=x.front), settings), settings.shards)
    return _ring(x, settings)


def gathered_attention(x: Attention, settings: Settings) -> Array:
    """The same."""
    keys = tuple(jax.lax.all_gather(y, TIME_AXIS, axis=1, tiled=True) for y in (x.k, x.v, x.key))
    if x.front is not None:
        keys = tuple(jnp.concatenate(pair, axis=1) for pair in zip(x.front, keys, strict=True))
    q, query, balanced = x.q, x.query, _is_balanced(x, settings)
    if balanced:
        q, query = jax.tree.map(functools.partial(_to_zigzag, shards=settings.shards), (q, query))
    k, v, key = keys
    names = ("scale", "window", "sinks", "block")
    o = blockwise.blockwise_attention(q, k, v, query, key, **{name: getattr(settings, name) for name in names})
    return _from_zigzag(o, settings.shards) if balanced else o


def _is_balanced(x: Attention, settings: Settings) -> bool:
    """With a window shorter than a shard all devices have as much to do as it is."""
    length = x.q.shape[1]
    return settings.causal and length % 2 == 0 and (settings.window is None or settings.window > length)


def _halves_to(shards: int) -> tuple[list[tuple[int, int]], ...]:
    """Where the first and where the second half of each shard go, as (from, to)."""
    home = [min(piece, 2 * shards - 1 - piece) for piece in range(2 * shards)]
    return tuple([(r, home[2 * r + half]) for r in range(shards)] for half in (0, 1))


def _to_zigzag(x: Array, shards: int) -> Array:
    """[b, t, ..] pieces 2 r and 2 r + 1 of the row -> pieces r and 2 W - 1 - r."""
    halves = jnp.split(x, 2, axis=1)
    even, odd = (jax.lax.ppermute(half, TIME_AXIS, to) for half, to in zip(halves, _halves_to(shards)))
    return jnp.concatenate(_swapped_where_odd(even, odd), axis=1)


def _from_zigzag(x: Array, shards: int) -> Array:
    pieces = _swapped_where_odd(*jnp.split(x, 2, axis=1))
    back = ([(there, here) for here, there in to] for to in _halves_to(shards))
    return jnp.concatenate([jax.lax.ppermute(y, TIME_AXIS, to) for y, to in zip(pieces, back)], axis=1)


def _swapped_where_odd(a: Array, b: Array) -> tuple[Array, Array]:
    """Of pieces r and 2 W - 1 - r one has an even number: the first on devices of even rank."""
    even = jax.lax.axis_index(TIME_AXIS) % 2 == 0
    return jnp.where(even, a, b), jnp.where(even, b, a)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _ring(x: Attention, settings: Settings) -> Array:
    return _forward(x, settings)[0]


def _blocks(x: Attention, k: Array, v: Array, key: Array, settings: Settings) -> tuple:
    return in_blocks(x.q, k, v, x.query, key, settings.block)


def _passed_on(tree: Any, shards: int) -> Any:
    round_trip = [(r, (r + 1) % shards) for r in range(shards)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, TIME_AXIS, round_trip), tree)


def _forward(x: Attention, settings: Settings) -> tuple[Array, tuple]:
    def attend(keys: tuple, seen: tuple | None = None) -> tuple[Array, Array]:
        """Equation (1) for some more keys."""
        o, L = blockwise.forward(*_blocks(x, *keys, settings), *settings.how)
        if seen is None:
            return o, L
        o_before, L_before = seen
        L_all = jnp.logaddexp(L_before, L)
        before, now = (jnp.exp(y - L_all)[..., None, :] for y in (L_before, L))
        return before * o_before + now * o, L_all

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        keys, seen = carry
        keys = _passed_on(keys, settings.shards)
        return (keys, attend(keys, seen)), None

    keys = x.k, x.v, x.key
    seen = attend(keys)
    (_, seen), _ = jax.lax.scan(step, (keys, seen), None, length=settings.shards - 1)
    if x.front is not None:
        seen = attend(x.front, seen)
    o, L = seen
    return out_of_blocks(o, x.q).astype(x.q.dtype), (x, o, L)


def _backward(settings: Settings, kept: tuple, do: Array) -> tuple[Attention]:
    x, o, L = kept
    # In blocks the cotangent of o lies like q.
    do = in_blocks(do, x.k, x.v, x.query, x.key, settings.block)[0]

    def differentiate(keys: tuple) -> tuple[Array, Array, Array]:
        k, v, key = keys
        q, k_blocks, v_blocks, query, key_blocks = _blocks(x, k, v, key, settings)
        dq, dk, dv = blockwise.backward(*settings.how, (q, k_blocks, v_blocks, query, key_blocks, o, L), do)
        return dq, _keys_out_of_blocks(dk, k), _keys_out_of_blocks(dv, v)

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        keys, dkeys, dq = carry
        keys, dkeys = _passed_on((keys, dkeys), settings.shards)
        dq_more, *more = differentiate(keys)
        return (keys, tuple(map(jnp.add, dkeys, more)), dq + dq_more), None

    keys = x.k, x.v, x.key
    dq, *dkeys = differentiate(keys)
    (_, dkeys, dq), _ = jax.lax.scan(step, (keys, tuple(dkeys), dq), None, length=settings.shards - 1)
    dk, dv = _passed_on(dkeys, settings.shards)
    front = None
    if x.front is not None:
        dq_front, dk_front, dv_front = differentiate(x.front)
        dq = dq + dq_front
        front = (dk_front.astype(x.k.dtype), dv_front.astype(x.v.dtype), None)
    dq = out_of_blocks(dq, x.q).astype(x.q.dtype)
    return (Attention(dq, dk.astype(x.k.dtype), dv.astype(x.v.dtype), None, None, front),)


def _keys_out_of_blocks(dk: Array, k: Array) -> Array:
    """[m, b, hk, j, k] -> [b, t, hk, k] as k is."""
    dk = jnp.moveaxis(dk, 3, 2)  # [m, b, j, hk, k]
    dk = jnp.moveaxis(dk, 0, 1)
    return dk.reshape(dk.shape[0], -1, *dk.shape[3:])[:, : k.shape[1]]


_ring.defvjp(_forward, _backward)
