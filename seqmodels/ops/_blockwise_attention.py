"""Softmax attention in blocks, in memory linear in the length; and which query sees which key.

For each block of queries the keys are visited one block at a time, with the greatest score m, the sum of
exponentials l and the weighted values w of what was seen so far (m starts low, but above what hides a key):

    m' = max(m, max_j s_tj),   l' = exp(m - m') l + sum_j exp(s_tj - m'),
    w' = exp(m - m') w + sum_j exp(s_tj - m') v_j,   and in the end o = w / l                     (1)

(Milakov, Gimelshein 2018, arXiv 1805.02867; Rabe, Staats 2021, arXiv 2112.05682). The gradient computes the
scores again, with the L = m + log l that was kept (Dao et al. 2022, arXiv 2205.14135):

    p_tj = exp(s_tj - L_t),   dp_tj = do_t . v_j,   ds_tj = p_tj (dp_tj - do_t . o_t)               (2)
    dv_j = sum_t p_tj do_t,   dq_t = scale sum_j ds_tj k_j,   dk_j = scale sum_t ds_tj q_t

Blocks of keys in which the block of queries sees nothing are not visited. Queries lie along the last axis, keys before
them: sums over keys then run down columns, and every product reads its left factor as it lies, which a CPU's products
need for their speed.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmodels.notation import Array
from seqmodels.ops._mesh import running
from seqmodels.ops._scan import Documents, state_dtype

# The rank of keys in front of all documents, which every query sees.
IN_FRONT = -2


class Reach(NamedTuple):
    """What each query may see: the keys whose rank is in first..rank, less what a window hides.

    The rank of a token is the number of tokens before it, counted from the start of the incoming state's
    document through all that follow. Those of a document are consecutive, so a range of ranks tells documents
    apart too.

    first   [b, t] int32: rank of the first token of the query's document
    rank    [b, t] int32: its own; -1 at padding, which sees nothing
    """

    first: Array
    rank: Array


def reach(before: Array, docs: Documents | None, length: int) -> Reach:
    """The reach of `length` positions that follow a document of `before` [b] tokens."""
    if docs is None:
        rank = before[:, None] + jnp.arange(length, dtype=jnp.int32)
        return Reach(jnp.zeros_like(rank), rank)
    rank = before[:, None] + running("sum", docs.real.astype(jnp.int32)) - 1
    first = running("max", jnp.where(docs.starts, rank, 0))
    return Reach(jnp.where(docs.real, first, 0), jnp.where(docs.real, rank, -1))


def sees(query: Reach, key: Array, window: int | None, sinks: int) -> Array:
    """Whether a query sees the key of a rank: -1 at padding or in an empty slot, or `IN_FRONT`. All broadcast."""
    first, rank = query
    seen = (first <= key) & (key <= rank)
    if window is not None:
        seen &= (rank - window < key) | (key < first + sinks)
    return seen | ((key == IN_FRONT) & (rank >= 0))


def product(axes: str, x: Array, y: Array) -> Array:
    """A matrix product accumulated in float32 (float64 for float64 inputs)."""
    return jnp.einsum(axes, x, y, preferred_element_type=state_dtype(x, y))


def blockwise_attention(
    q: Array,
    k: Array,
    v: Array,
    query: Reach,
    key: Array,
    *,
    scale: float,
    window: int | None,
    sinks: int,
    block: int,
) -> Array:
    """Attention of q [b, t, hk, g, k] over k [b, j, hk, k] and v [b, j, hk, v], whose ranks are key [b, j].

    Returns [b, t, hk, g, v] in q's dtype, 0 for a query that sees nothing. `block`: queries or keys in one.
    """
    blocks = in_blocks(q, k, v, query, key, block)
    return out_of_blocks(_blockwise(*blocks, scale, window, sinks), q)


def in_blocks(
    q: Array, k: Array, v: Array, query: Reach, key: Array, block: int
) -> tuple[Array, Array, Array, Reach, Array]:
    """The arguments of `blockwise_attention` as `forward` takes them."""
    rows, columns = min(block, q.shape[1]), min(block, k.shape[1])
    by_block = jnp.transpose(_blocks(q, rows), (0, 1, 3, 5, 4, 2))
    return (
        by_block.reshape(*by_block.shape[:4], -1),
        jnp.moveaxis(_blocks(k, columns), 2, 3),
        jnp.moveaxis(_blocks(v, columns), 2, 3),
        Reach(_blocks(query.first, rows), _blocks(query.rank, rows, -1)),
        _blocks(key, columns, -1),
    )


def out_of_blocks(o: Array, q: Array) -> Array:
    """[b, t, hk, g, v] for q [b, t, hk, g, k], from the outputs of `forward`."""
    batch, length, groups = q.shape[0], q.shape[1], q.shape[3]
    o = jnp.transpose(o.reshape(*o.shape[:4], groups, -1), (1, 0, 5, 2, 4, 3))
    return o.reshape(batch, -1, *o.shape[3:])[:, :length]


def _blocks(x: Array, size: int, beyond: int = 0) -> Array:
    """[b, t, ..] -> [n, b, size, ..], filled up with `beyond` behind the end."""
    behind = [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, behind, constant_values=beyond)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _blocks_in_sight(query: Reach, key: Array, window: int | None, sinks: int) -> tuple[Array, Array]:
    """The blocks of keys that each block of queries visits: their numbers [n, m], and how many of these [n].

    Decided on the least and greatest rank of a block, so one in which nothing is seen may be among them.
    """
    far = jnp.iinfo(key.dtype).max
    first, last = jnp.min(jnp.where(query.rank < 0, far, query.first), -1), jnp.max(query.rank, -1)
    key_first, key_last = jnp.min(jnp.where(key < 0, far, key), -1), jnp.max(key, -1)
    sight = (first[:, None] <= key_last) & (key_first <= last[:, None])
    if window is not None:
        oldest = jnp.min(jnp.where(query.rank < 0, far, query.rank), -1) - window
        near = oldest[:, None] < key_last
        if sinks:
            near |= key_first < jnp.max(query.first, -1)[:, None] + sinks
        sight &= near
    sight |= (key == IN_FRONT).any(axis=-1) & (last[:, None] >= 0)
    sight = sight.any(axis=-1)
    return jnp.argsort(~sight, axis=1, stable=True), sight.sum(axis=1, dtype=jnp.int32)


def pairs_visited(length: int, *, prefix: int, window: int | None, sinks: int, block: int) -> int:
    """Pairs of a query and a key in the blocks that `_blocks_in_sight` names, masked ones included: for a document of
    `length` tokens behind a prefix of so many keys."""
    rows, columns = min(block, length), min(block, prefix + length)
    front = -(-(prefix + sinks) // columns)  # blocks with keys that no window hides
    visits = 0
    for first_query in range(0, length, rows):
        last_query = min(first_query + rows, length) - 1
        last = (prefix + last_query) // columns
        first = 0 if window is None else max(prefix + first_query - window + 1, 0) // columns
        visits += last - first + 1 + min(front, first)
    return visits * rows * columns


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _blockwise(
    q: Array, k: Array, v: Array, query: Reach, key: Array, scale: float, window: int | None, sinks: int
) -> Array:
    """q [n, b, hk, k, r], k [m, b, hk, j, k], v [m, b, hk, j, v], query [n, b, t], key [m, b, j].

    r are the g times t queries that read a key head.
    """
    return forward(q, k, v, query, key, scale, window, sinks)[0].astype(q.dtype)


def _scores(q: Array, k: Array, query: Reach, key: Array, scale: float, window: int | None, sinks: int) -> Array:
    """s_tj [b, hk, j, r] of a block of queries with one of keys; the lowest number where not seen."""
    # The barrier has the mask computed once; without it XLA computes it again for each head and use.
    seen = jax.lax.optimization_barrier(sees(query, key[..., None], window, sinks))[:, None]
    groups = q.shape[-1] // seen.shape[-1]
    s = product("bhjk,bhkr->bhjr", k, q) * scale
    return jnp.where(jnp.tile(seen, groups), s, jnp.finfo(s.dtype).min)


def forward(
    q: Array, k: Array, v: Array, query: Reach, key: Array, scale: float, window: int | None, sinks: int
) -> tuple[Array, Array]:
    """Equation (1): o [n, b, hk, v, r] in the accumulation dtype, and L [n, b, hk, r], very low where nothing is
    seen."""
    in_sight, count = _blocks_in_sight(query, key, window, sinks)
    dtype = state_dtype(q)
    upright = jnp.swapaxes(v, -1, -2)

    def query_block(block: tuple) -> tuple[Array, Array]:
        q, query, in_sight, count = block
        query = jax.tree.map(lambda x: x[:, None], query)

        def visit(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            m, l, w = carry
            k_j, v_j, key_j = jax.tree.map(lambda x: x[in_sight[i]], (k, upright, key))
            s = _scores(q, k_j, query, key_j, scale, window, sinks)
            m_new = jnp.maximum(m, jnp.max(s, axis=2))
            p = jnp.exp(s - m_new[:, :, None])
            fade = jnp.exp(m - m_new)
            w = fade[:, :, None] * w + product("bhvj,bhjr->bhvr", v_j, p.astype(v.dtype))
            return m_new, fade * l + jnp.sum(p, axis=2), w

        rows = (*q.shape[:2], *q.shape[3:])
        m, l = jnp.full(rows, jnp.finfo(dtype).min / 2), jnp.zeros(rows, dtype)
        w = jnp.zeros((*q.shape[:2], v.shape[-1], *q.shape[3:]), dtype)
        m, l, w = jax.lax.fori_loop(0, count, visit, (m, l, w))
        l = jnp.where(l > 0, l, 1)  # a query that sees nothing: 0 / 1
        return w / l[:, :, None], m + jnp.log(l)

    return jax.lax.map(query_block, (q, query, in_sight, count))


def backward(scale: float, window: int | None, sinks: int, kept: tuple, do: Array) -> tuple[Array, Array, Array]:
    """Equation (2): dq, dk, dv in the accumulation dtype. o and L in `kept` may be those over more keys than these."""
    q, k, v, query, key, o, L = kept
    in_sight, count = _blocks_in_sight(query, key, window, sinks)
    dtype = state_dtype(q)
    upright = jnp.swapaxes(k, -1, -2)

    def query_block(carry: tuple[Array, Array], block: tuple) -> tuple[tuple[Array, Array], Array]:
        q, query, o, do, L, in_sight, count = block
        query = jax.tree.map(lambda x: x[:, None], query)
        do_o = jnp.sum(do.astype(dtype) * o, axis=2, keepdims=True)

        def visit(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dq, dk, dv = carry
            j = in_sight[i]
            k_j, upright_j, v_j, key_j = jax.tree.map(lambda x: x[j], (k, upright, v, key))
            p = jnp.exp(_scores(q, k_j, query, key_j, scale, window, sinks) - L[:, :, None])
            dp = product("bhjv,bhvr->bhjr", v_j, do)
            ds = (p * (dp - do_o)).astype(q.dtype)
            dq += product("bhkj,bhjr->bhkr", upright_j, ds)
            dk = _add_at(dk, j, product("bhjr,bhkr->bhjk", ds, q))
            dv = _add_at(dv, j, product("bhjr,bhvr->bhjv", p.astype(do.dtype), do))
            return dq, dk, dv

        dq, dk, dv = jax.lax.fori_loop(0, count, visit, (jnp.zeros(q.shape, dtype), *carry))
        return (dk, dv), scale * dq

    zeros = jnp.zeros(k.shape, dtype), jnp.zeros(v.shape, dtype)
    (dk, dv), dq = jax.lax.scan(query_block, zeros, (q, query, o, do, L, in_sight, count))
    return dq, scale * dk, dv


def _add_at(x: Array, j: Array, more: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, x[j] + more, j, axis=0)


def _blockwise_forward(q: Array, k: Array, v: Array, query: Reach, key: Array, *how: Any) -> tuple[Array, tuple]:
    o, L = forward(q, k, v, query, key, *how)
    o = o.astype(q.dtype)
    return o, (q, k, v, query, key, o, L)


def _blockwise_backward(scale: float, window: int | None, sinks: int, kept: tuple, do: Array) -> tuple:
    gradients = backward(scale, window, sinks, kept, do)
    return *(dx.astype(x.dtype) for dx, x in zip(gradients, kept)), None, None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)
