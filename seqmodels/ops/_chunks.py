"""A row cut into chunks: what the chunked forms of operators with a matrix state share.

Within a chunk of C positions, b is the inclusive cumulative sum of the log decay g (zero without decay), S the state
that enters and S' the state that leaves. Everything that such an operator does with decay is one of these:

    A_ij = sum_k q_ik k_jk exp(b_ik - b_jk),  j <= i          scores of a query against the keys of its chunk      (1)
    Q * exp(b)                                                a query that reads S                                 (2)
    K * exp(b_C - b)                                          a key that writes to S'                              (3)
    exp(b_C)                                                  S in S'                                              (4)

Every exponent is <= 0. Documents are masks on (1) to (4) and need nothing more. With dX the cotangent of X, and e, l
the products of (2) and of (3) with their cotangents, summed over the channels that share a decay,

    dg_t = sum_{j < t <= i} dA_ij A_ij + sum_{i >= t} e_i + sum_{j < t} l_j + exp(b_C) <dS', S>                    (5)

sums what crosses position t, each term once: the shorter sum_{i >= t} (q_i dq_i - k_i dk_i) + <dS', S'> is the same but
adds and takes away all that lies on one side of t, which costs digits.

Decay per channel does not factor out of (1), and exp(b_i) exp(-b_j) overflows. So each pair j < i is met halfway: cut
the chunk into blocks of 2, 4, 8, ... positions; at exactly one of these levels i is in the later and j in the earlier
half of one block. With m the first position of the later half,

    Y_t  = (q_t if t is in a later half, else k_t) * exp(-|b_t - b_m|)          A_ij = sum_k Y_ik Y_jk             (6)
    dY   = (dA + dA^T) Y on the pairs of that level, times exp(-|b - b_m|)                                         (7)

is a product of matrices for every level, and dY is dQ in the later halves, dK in the earlier ones. Here the first sum
of (5), a matrix for every channel, is taken as sum_{i >= t} (q_i dq_i - k_i dk_i) over the dQ, dK that come from dA.

The functions are written for one chunk of one row of the batch; `scan_chunks` takes them to the others.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmodels.notation import Array
from seqmodels.ops import _mesh, _scan
from seqmodels.ops._scan import Documents

DEFAULT_CHUNK = 64
SMALLEST_CHUNK = 16


class Inputs(NamedTuple):
    """The arrays in chunks, [b, n, c, ...]; inside a scan those of one chunk of one row, [c, ...].

    q, k      [b, n, c, h, k]
    v         [b, n, c, hv, v]
    g         [b, n, c, hv, 1 or k] or None
    index     [b, n, c]: that of `Documents`
    incoming  [b, n]: the document of the state that enters the chunk
    """

    q: Array
    k: Array
    v: Array
    g: Array | None
    index: Array | None
    incoming: Array | None


def chunk_length(
    chunk_size: int | None, length: int, *, power_of_two: bool, default: int = DEFAULT_CHUNK
) -> int:
    """Positions per chunk: what the caller asks for, or a default that suits the length; rounded up where it must."""
    size = chunk_size or min(default, -(-length // SMALLEST_CHUNK) * SMALLEST_CHUNK)
    return 1 << (size - 1).bit_length() if power_of_two else size


def positions_per_token(length: int, size: int) -> float:
    """Positions that are worked off for each of `length` tokens: more than 1 where the last chunk is not full."""
    return -(-length // size) * size / length


def score_flops(size: int, *, heads: int, key_heads: int, key_dim: int, decays: int) -> float:
    """FLOPs of (1) for a position of a chunk of `size`: a product with every key, one for each level of (6) where every
    channel has a decay. decays: numbers of decay of a head and token: 0, 1, or key_dim."""
    if decays > 1:
        return 2 * size * math.log2(size) * heads * key_dim
    return 2 * size * key_heads * key_dim


def decay_flops(size: int, *, heads: int, decays: int) -> float:
    """FLOPs of b for a position of a chunk of `size`: its sums are products with a triangle of ones."""
    return 2 * size * heads * decays


def cut_inputs(q: Array, k: Array, v: Array, g: Array | None, docs: Documents | None, size: int) -> Inputs:
    """Arrays [b, t, ...] in chunks of `size` positions. At padding k and g are 0: nothing is written or forgotten."""
    if docs is not None:
        k, g = _scan.zero_at_padding(docs, k, g)
    g = None if g is None else g.reshape(*g.shape[:3], -1)
    return Inputs(*(None if x is None else cut(x, size) for x in (q, k, v, g)), *cut_index(docs, size))


def cut_index(docs: Documents | None, size: int) -> tuple[Array | None, Array | None]:
    """`index` and `incoming` of `Inputs`; None for one document."""
    if docs is None:
        return None, None
    index = _scan.pad_time(docs.index, size, "edge")
    incoming = jnp.pad(index[:, size - 1 : -1 : size], ((0, 0), (1, 0)))
    return cut(index, size), incoming


def cut(x: Array, size: int) -> Array:
    """[b, t, ...] -> [b, n, c, ...], with zeros at the end where the last chunk is not full."""
    x = _scan.pad_time(x, size)
    return x.reshape(x.shape[0], -1, size, *x.shape[2:])


def joined(o: Array, length: int, docs: Documents | None) -> Array:
    """[b, n, c, ...] -> [b, t, ...], zero at padding."""
    o = o.reshape(o.shape[0], -1, *o.shape[3:])[:, :length]
    return o if docs is None else jnp.where(docs.real[..., None, None], o, 0)


class Chunk(NamedTuple):
    """One chunk, heads before time, in the accumulation dtype.

    q, k     [h, c, k]        v  [hv, c, v]; with decay per channel q and k are there for every head of v, [hv, c, k]
    b        [hv, c, 1 or k]  inclusive cumulative log decay within the chunk, or None
    pairs    [c, c] bool: j <= i and of one document
    enter    weight of the incoming state in a row's output: exp(b_i) where the row is of the incoming document
    leave    weight of a row in the outgoing state: exp(b_C - b_i) where the row is of the last document
    through  weight of the incoming state in the outgoing one: [hv, 1 or k], exp(b_C) where no document started
    """

    q: Array
    k: Array
    v: Array
    b: Array | None
    pairs: Array
    enter: Array | float
    leave: Array | float
    through: Array | float

    @property
    def decays_per_channel(self) -> bool:
        return self.b is not None and self.b.shape[-1] > 1

    @property
    def q_in(self) -> Array:
        """(2), [hv, c, k]."""
        return _for_each(self.q, self.v) * self.enter

    @property
    def k_in(self) -> Array:
        """The same of a key, for what corrects the state, [hv, c, k]."""
        return _for_each(self.k, self.v) * self.enter

    @property
    def k_out(self) -> Array:
        """(3), [hv, c, k]."""
        return _for_each(self.k, self.v) * self.leave


def chunk(inputs: Inputs, scale: float) -> Chunk:
    """One chunk and its weights."""
    q, k, v, g, index, incoming = inputs
    dtype = _scan.state_dtype(q, k, v, g)
    size = q.shape[0]
    q, k, v = (swap(x).astype(dtype) for x in (q * scale, k, v))
    if g is not None and g.shape[-1] > 1:
        q, k = _for_each(q, v), _for_each(k, v)
    pairs, enter, leave, through, b = _triangle(size, bool), 1.0, 1.0, 1.0, None
    if g is not None:
        b = _sum_to(swap(g).astype(dtype))
        last = b[:, -1:]
        enter, leave, through = jnp.exp(b), jnp.exp(last - b), jnp.exp(last[:, 0])
    if index is not None:
        first, last = (index == incoming)[:, None], (index == index[-1])[:, None]
        pairs = pairs & (index[:, None] == index)
        enter, leave, through = enter * first, leave * last, through * first[-1]
    return Chunk(q, k, v, b, pairs, enter, leave, through)


def swap(x: Array) -> Array:
    """Time and heads of a chunk, swapped."""
    return jnp.swapaxes(x, 0, 1)


def _for_each(x: Array, v: Array) -> Array:
    """[h, ...] -> [hv, ...]: what heads share, for each head of v."""
    return jnp.repeat(x, v.shape[0] // x.shape[0], axis=0)


def group_sum(x: Array, heads: int) -> Array:
    """[hv, ...] -> [h, ...]: the sum over the heads that share a query and a key."""
    x = x.reshape(heads, -1, *x.shape[1:])
    # Not a reduction: XLA's over many heads is many times slower than these additions on a CPU.
    return sum(x[:, n] for n in range(x.shape[1]))


def scores(x: Chunk) -> Array:
    """A of equation (1), [hv, c, c]."""
    if not x.decays_per_channel:
        return _for_each(jnp.einsum("hik,hjk->hij", x.q, x.k), x.v) * _pair_decay(x)
    A = jnp.sum(x.q * x.k, axis=-1, keepdims=True)
    for level in _levels(x):
        A = jnp.where(level.pairs, jnp.einsum("hik,hjk->hij", level.y, level.y), A)
    return jnp.where(x.pairs, A, 0)


def scores_backward(x: Chunk, dA: Array) -> tuple[Array, Array]:
    """dq and dk, of the shape of q and k, from the cotangent of `scores`."""
    if not x.decays_per_channel:
        dA = group_sum(dA * _pair_decay(x), x.q.shape[0])
        return jnp.einsum("hij,hjk->hik", dA, x.k), jnp.einsum("hij,hik->hjk", dA, x.q)
    dA = jnp.where(x.pairs, dA, 0)
    own = jnp.sum(dA * jnp.eye(dA.shape[-1], dtype=dA.dtype), axis=-1, keepdims=True)
    dA = dA + jnp.swapaxes(dA, -1, -2)
    dq, dk = own * x.k, own * x.q
    for level in _levels(x):
        dy = level.decay * jnp.einsum("hij,hjk->hik", jnp.where(level.pairs, dA, 0), level.y)
        dq, dk = dq + jnp.where(level.later, dy, 0), dk + jnp.where(level.later, 0, dy)
    return dq, dk


def _pair_decay(x: Chunk) -> Array:
    """exp(b_i - b_j) on the pairs that see each other, 0 elsewhere; for scalar decay or none."""
    if x.b is None:
        return x.pairs.astype(x.q.dtype)
    difference = jnp.minimum(x.b - jnp.swapaxes(x.b, -1, -2), 0)
    return jnp.where(x.pairs, jnp.exp(difference), 0)


class _Level(NamedTuple):
    """One level of (6).

    later  [c, 1] bool: the position is in a later half
    pairs  [c, c] bool: one position in each half of the same block, in either order
    decay  [hv, c, k]: exp(-|b - b_m|)
    y      [hv, c, k]: Y
    """

    later: Array
    pairs: Array
    decay: Array
    y: Array


def _levels(x: Chunk) -> Iterator[_Level]:
    heads, size, channels = x.b.shape
    position = jnp.arange(size)
    half = 1
    while half < size:
        later = (position & half > 0)[:, None]
        pairs = (position[:, None] ^ position) // half == 1
        blocks = x.b.reshape(heads, -1, 2 * half, channels)
        from_middle = (blocks - blocks[:, :, half : half + 1]).reshape(x.b.shape)
        decay = jnp.exp(-jnp.abs(from_middle))
        yield _Level(later, pairs, decay, jnp.where(later, x.q, x.k) * decay)
        half *= 2


def decay_gradient(x: Chunk, entered: Array, left: Array, through: Array, crossing: Array) -> Array:
    """dg of equation (5), [hv, c, 1 or k].

    entered   [hv, c, k]: the products of what reads the incoming state with their cotangents
    left      [hv, c, k]: the same for what writes to the outgoing state
    through   [hv, k]: exp(b_C) <dS', S>, row by row of S
    crossing  what is within the chunk: the pairs dA_ij A_ij [hv, c, c], or with decay per channel the products
              q dq - k dk [hv, c, k] of the gradients that come from dA
    """
    parts = [entered, left, through[:, None]]
    if not x.decays_per_channel:
        parts = [y.sum(axis=-1, keepdims=True) for y in parts]
    within = _sum_from(crossing) if x.decays_per_channel else _across(crossing)
    return _sum_from(parts[0]) + _sum_before(parts[1]) + parts[2] + within


def _triangle(size: int, dtype: jnp.dtype) -> Array:
    return jnp.tril(jnp.ones((size, size), dtype))


def _sum_to(g: Array) -> Array:
    """Inclusive cumulative sum over the chunk, as a product with a triangle of ones."""
    return jnp.matmul(_triangle(g.shape[-2], g.dtype), g, precision="highest")


def _sum_from(x: Array) -> Array:
    """Sum over the positions from each one to the chunk's end."""
    return jnp.matmul(_triangle(x.shape[-2], x.dtype).T, x, precision="highest")


def _sum_before(x: Array) -> Array:
    """Sum over the positions of the chunk before each one."""
    return jnp.matmul(_triangle(x.shape[-2], x.dtype) - jnp.eye(x.shape[-2], dtype=x.dtype), x, precision="highest")


def _across(pairs: Array) -> Array:
    """Sum of `pairs` [hv, i, j] over j < t <= i, for every t: [hv, t, 1]."""
    before = jnp.tril(jnp.ones(pairs.shape[-2:], bool), -1)
    return jnp.sum(jnp.where(before, _sum_from(pairs), 0), axis=-1, keepdims=True)


def scan_chunks(body: Callable, states: Any, arrays: Any, reverse: bool = False) -> tuple[Any, Any]:
    """Scan `body(state, chunk) -> (state, outputs)` over the chunks of every row of `arrays`, [b, n, ...] each.

    Rows run side by side, except on a CPU, whose cache holds the chunk of one row: there it is one row after another.
    Rows that a mesh may have spread over devices stay side by side.
    """
    batch, count = jax.tree.leaves(arrays)[0].shape[:2]

    def take(arrays: Any, n: Array, axis: int) -> Any:
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, n, axis, keepdims=False), arrays)

    def side_by_side(states: Any, arrays: Any) -> tuple[Any, Any]:
        def step(states: Any, n: Array) -> tuple[Any, Any]:
            return jax.vmap(body)(states, take(arrays, n, axis=1))

        states, outputs = jax.lax.scan(step, states, jnp.arange(count), reverse=reverse)
        return states, jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), outputs)

    def in_turn(states: Any, arrays: Any) -> tuple[Any, Any]:
        end_to_end = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arrays)

        first = count - 1 if reverse else 0

        def step(carry: tuple, n: Array) -> tuple[tuple, Any]:
            state, final = carry
            row = n // count
            start = take(states, row, axis=0)
            state = jax.tree.map(partial(jnp.where, n % count == first), start, state)
            state, outputs = body(state, take(end_to_end, n, axis=0))
            put = partial(jax.lax.dynamic_update_index_in_dim, index=row, axis=0)
            return (state, jax.tree.map(put, final, state)), outputs

        carry = take(states, 0, axis=0), states
        (_, final), outputs = jax.lax.scan(step, carry, jnp.arange(batch * count), reverse=reverse)
        return final, jax.tree.map(lambda x: x.reshape(batch, count, *x.shape[1:]), outputs)

    if batch == 1 or _mesh.is_spread():
        return side_by_side(states, arrays)
    return jax.lax.platform_dependent(states, arrays, cpu=in_turn, default=side_by_side)
