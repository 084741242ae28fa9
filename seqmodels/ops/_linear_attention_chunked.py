"""The chunked form of linear attention with decay, forward and backward.

Within a chunk of C positions, with b the inclusive cumulative sum of g (zero without decay), S the state that enters
and S' the state that leaves:

    A_ij = sum_k q_ik k_jk exp(b_ik - b_jk),  j <= i                                                              (1)
    O    = A V + (Q * exp(b)) S                                                                                   (2)
    S'   = exp(b_C) S + (K * exp(b_C - b))^T V                                                                    (3)
    D    = A 1 + (Q * exp(b)) z;   z' = exp(b_C) z + (K * exp(b_C - b))^T 1      (normaliser; then O is O / D)    (4)

(Yang et al. 2023, arXiv 2312.06635, section 4; Qin et al. 2024, arXiv 2401.04658 for scalar decay.) Every exponent is
<= 0. One `lax.scan` walks the chunks; the backward pass walks them in reverse, holds one state per chunk, and
recomputes the rest. With dO, dS', dz' the cotangents and N, M those of the numerator and the denominator of (2), (4):

    dA = N V^T + M 1^T          dV = A^T N + (K * exp(b_C - b)) dS'                                                (5)
    dQ = exp(b) * (N S^T + M z^T) + (row side of dA)                                                              (6)
    dK = exp(b_C - b) * (V dS'^T + 1 dz'^T) + (column side of dA)                                                 (7)
    dS = exp(b_C) dS' + (Q * exp(b))^T N                    dz likewise with M                                    (8)
    dg_t = sum_{i >= t} (q_i dq_i - k_i dk_i) + <dS', S'> + <dz', z'>                                             (9)

(9) needs no derivative of an exponential: a query carries exp(+b), a key exp(-b). Documents are masks on (1) to (3);
they leave (9) as it is, since what is masked contributes nothing to either product.

Decay per channel does not factor out of (1), and exp(b_i) exp(-b_j) overflows. So each pair j < i is met halfway: cut
the chunk into blocks of 2, 4, 8, ... positions; at exactly one of these levels i is in the later and j in the earlier
half of one block. With m the first position of the later half,

    Y_t  = (q_t if t is in a later half, else k_t) * exp(-|b_t - b_m|)          A_ij = sum_k Y_ik Y_jk            (10)
    dY   = (dA + dA^T) Y on the pairs of that level, times exp(-|b - b_m|)                                        (11)

is a product of matrices for every level, and dY is dQ in the later halves, dK in the earlier ones.

Everything below is written for one row of the batch.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmodels.notation import Array
from seqmodels.ops import _scan
from seqmodels.ops._scan import Documents

DEFAULT_CHUNK = 64
SMALLEST_CHUNK = 16
EPSILON = 1e-6


def chunked(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
    S: Array,
    z: Array | None,
    docs: Documents | None,
    *,
    scale: float,
    chunk_size: int | None,
) -> tuple[Array, Array, Array | None]:
    """Outputs [b, t, hv, v], the final S and the final z (None without a normaliser).

    q, k: [b, t, h, k]; v: [b, t, hv, v]; g: None, [b, t, hv] or [b, t, hv, k]; S: [b, hv, k, v]; z: [b, hv, k] or None.
    With decay per channel `chunk_size` is rounded up to a power of two.
    """
    length = q.shape[1]
    size = chunk_size or min(DEFAULT_CHUNK, -(-length // SMALLEST_CHUNK) * SMALLEST_CHUNK)
    if g is not None and g.ndim == 4:
        size = 1 << (size - 1).bit_length()
    index = None
    if docs is not None:
        k = jnp.where(docs.real[..., None, None], k, 0)
        if g is not None:
            g = jnp.where(docs.real.reshape(docs.real.shape + (1,) * (g.ndim - 2)), g, 0)
        index = _scan.pad_time(docs.index, size, "edge")
    q, k, v = (_scan.pad_time(x, size) for x in (q, k, v))
    g = None if g is None else _scan.pad_time(g, size)
    o, S, z = _run(q, k, v, g, S, z, index, scale, size)
    o = o[:, :length]
    return o if docs is None else jnp.where(docs.real[..., None, None], o, 0), S, z


class _Chunk(NamedTuple):
    """One chunk, heads before time, in the accumulation dtype.

    q, k     [hv, c, k]       v  [hv, c, v]
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


def _chunk(n: Array, size: int, q: Array, k: Array, v: Array, g: Array | None, index: Array | None, scale: float):
    """Cut chunk `n` out of the arrays and work out its weights."""
    dtype = _scan.state_dtype(q, k, v, g)
    groups = v.shape[1] // q.shape[1]
    q, k, v = (_cut(x, n, size).astype(dtype) for x in (q, k, v))
    q, k = (jnp.repeat(x, groups, axis=0) for x in (q * scale, k))
    pairs, enter, leave, through, b = _triangle(size, bool), 1.0, 1.0, 1.0, None
    if g is not None:
        b = _sum_to(_cut(g.reshape(*g.shape[:2], -1), n, size).astype(dtype))
        last = b[:, -1:]
        enter, leave, through = jnp.exp(b), jnp.exp(last - b), jnp.exp(last[:, 0])
    if index is not None:
        ids = jax.lax.dynamic_slice_in_dim(index, n * size, size)
        before = jax.lax.dynamic_index_in_dim(index, jnp.maximum(n * size - 1, 0), keepdims=False)
        first, last = (ids == jnp.where(n > 0, before, 0))[:, None], (ids == ids[-1])[:, None]
        pairs = pairs & (ids[:, None] == ids)
        enter, leave, through = enter * first, leave * last, through * first[-1]
    return _Chunk(q, k, v, b, pairs, enter, leave, through)


def _cut(x: Array, n: Array, size: int) -> Array:
    """Chunk `n` of [t, h, d], as [h, c, d]."""
    return jnp.swapaxes(jax.lax.dynamic_slice_in_dim(x, n * size, size), 0, 1)


def _triangle(size: int, dtype: jnp.dtype) -> Array:
    return jnp.tril(jnp.ones((size, size), dtype))


def _sum_to(g: Array) -> Array:
    """Inclusive cumulative sum over the chunk, as a product with a triangle of ones."""
    return jnp.matmul(_triangle(g.shape[-2], g.dtype), g, precision="highest")


def _sum_from(x: Array) -> Array:
    """Sum over the positions from each one to the chunk's end."""
    return jnp.matmul(_triangle(x.shape[-2], x.dtype).T, x, precision="highest")


def _scores(x: _Chunk) -> Array:
    """A of equation (1)."""
    if not x.decays_per_channel:
        return jnp.einsum("hik,hjk->hij", x.q, x.k) * _pair_decay(x)
    A = jnp.sum(x.q * x.k, axis=-1, keepdims=True)
    for level in _levels(x):
        A = jnp.where(level.pairs, jnp.einsum("hik,hjk->hij", level.y, level.y), A)
    return jnp.where(x.pairs, A, 0)


def _scores_backward(x: _Chunk, dA: Array) -> tuple[Array, Array]:
    """The sides of dA in (6) and (7)."""
    if not x.decays_per_channel:
        dA = dA * _pair_decay(x)
        return jnp.einsum("hij,hjk->hik", dA, x.k), jnp.einsum("hij,hik->hjk", dA, x.q)
    dA = jnp.where(x.pairs, dA, 0)
    own = jnp.sum(dA * jnp.eye(dA.shape[-1], dtype=dA.dtype), axis=-1, keepdims=True)
    dA = dA + jnp.swapaxes(dA, -1, -2)
    dq, dk = own * x.k, own * x.q
    for level in _levels(x):
        dy = level.decay * jnp.einsum("hij,hjk->hik", jnp.where(level.pairs, dA, 0), level.y)
        dq, dk = dq + jnp.where(level.later, dy, 0), dk + jnp.where(level.later, 0, dy)
    return dq, dk


def _pair_decay(x: _Chunk) -> Array:
    """exp(b_i - b_j) on the pairs that see each other, 0 elsewhere; for scalar decay or none."""
    if x.b is None:
        return x.pairs.astype(x.q.dtype)
    difference = jnp.minimum(x.b - jnp.swapaxes(x.b, -1, -2), 0)
    return jnp.where(x.pairs, jnp.exp(difference), 0)


class _Level(NamedTuple):
    """One level of (10).

    later  [c, 1] bool: the position is in a later half
    pairs  [c, c] bool: one position in each half of the same block, in either order
    decay  [hv, c, k]: exp(-|b - b_m|)
    y      [hv, c, k]: Y
    """

    later: Array
    pairs: Array
    decay: Array
    y: Array


def _levels(x: _Chunk) -> Iterator[_Level]:
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


def _forward(x: _Chunk, S: Array, z: Array | None) -> tuple[Array, Array, Array | None]:
    """Equations (1) to (4) for one chunk."""
    A, q_in, k_out = _scores(x), x.q * x.enter, x.k * x.leave
    o = A @ x.v + q_in @ S
    through = jnp.asarray(x.through)
    if z is not None:
        o = o / _denominator(A, q_in, z)
        z = through * z + k_out.sum(axis=-2)
    return o, through[..., None] * S + jnp.einsum("hck,hcv->hkv", k_out, x.v), z


def _denominator(A: Array, q_in: Array, z: Array) -> Array:
    return (A.sum(axis=-1) + jnp.einsum("hck,hk->hc", q_in, z) + EPSILON)[..., None]


def _backward(x: _Chunk, S: Array, z: Array | None, after: tuple, d_after: tuple, o: Array | None, do: Array):
    """Equations (5) to (9) for one chunk: cotangents of q (scaled), k, v, g and of the state that entered."""
    (S_after, z_after), (dS_after, dz_after) = after, d_after
    A, q_in, k_out = _scores(x), x.q * x.enter, x.k * x.leave
    through = jnp.asarray(x.through)
    N, M = do, None
    if z is not None:
        N = do / _denominator(A, q_in, z)
        M = -jnp.sum(N * o, axis=-1, keepdims=True)
    dA = jnp.einsum("hiv,hjv->hij", N, x.v)
    dq_in = jnp.einsum("hcv,hkv->hck", N, S)
    dk_out = jnp.einsum("hcv,hkv->hck", x.v, dS_after)
    dS = through[..., None] * dS_after + jnp.einsum("hck,hcv->hkv", q_in, N)
    dz = None
    if z is not None:
        dA = dA + M
        dq_in = dq_in + M * z[:, None]
        dk_out = dk_out + dz_after[:, None]
        dz = through * dz_after + jnp.sum(q_in * M, axis=-2)
    dv = jnp.einsum("hij,hiv->hjv", A, N) + k_out @ dS_after
    dq, dk = _scores_backward(x, dA)
    dq = dq + dq_in * x.enter
    dk = dk + dk_out * x.leave
    dg = None
    if x.b is not None:
        at_end = jnp.sum(dS_after * S_after, axis=-1)
        if z is not None:
            at_end = at_end + dz_after * z_after
        db, at_end = x.q * dq - x.k * dk, at_end[:, None]
        if not x.decays_per_channel:
            db, at_end = (y.sum(axis=-1, keepdims=True) for y in (db, at_end))
        dg = _sum_from(db) + at_end
    return dq, dk, dv, dg, dS, dz


def _over_batch(row: Callable, *arrays: Array | None):
    """`row` on every row of the batch: side by side, but one after another on a CPU, whose cache holds one row's chunk.

    Rows that a mesh may have spread over devices stay side by side.
    """
    together, in_turn = jax.vmap(row), lambda *x: jax.lax.map(lambda one: row(*one), x)
    mesh = jax.sharding.get_abstract_mesh()
    spread = not (mesh.empty or mesh.are_all_axes_manual or mesh.size == 1)
    if arrays[0].shape[0] == 1 or spread:
        return together(*arrays)
    return jax.lax.platform_dependent(*arrays, cpu=in_turn, default=together)


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _run(q, k, v, g, S, z, index, scale: float, size: int):
    o, S, z, _ = _run_chunks(q, k, v, g, S, z, index, scale, size)
    return o, S, z


def _run_chunks(q, k, v, g, S, z, index, scale: float, size: int):
    """The scan over chunks; also the states that entered each chunk."""

    def row(q, k, v, g, S, z, index):
        def body(state, n):
            x = _chunk(n, size, q, k, v, g, index, scale)
            o, *after = _forward(x, *state)
            return tuple(after), (jnp.swapaxes(o, 0, 1).astype(v.dtype), state)

        (S, z), (o, entered) = jax.lax.scan(body, (S, z), jnp.arange(q.shape[0] // size))
        return o.reshape(v.shape), S, z, entered

    return _over_batch(row, q, k, v, g, S, z, index)


def _run_forward(q, k, v, g, S, z, index, scale: float, size: int):
    o, S, z, entered = _run_chunks(q, k, v, g, S, z, index, scale, size)
    kept = o if z is not None else None
    return (o, S, z), (q, k, v, g, index, entered, (S, z), kept)


def _run_backward(scale: float, size: int, residuals, cotangents):
    def row(q, k, v, g, index, entered, final, o, do, dS, dz):
        inputs = (q, k, v) if g is None else (q, k, v, g)
        groups = v.shape[1] // q.shape[1]

        def body(carry, position):
            n, state = position
            after, d_after = carry
            x = _chunk(n, size, q, k, v, g, index, scale)
            o_n, do_n = (None if y is None else _cut(y, n, size).astype(x.q.dtype) for y in (o, do))
            dq, dk, dv, dg, dS, dz = _backward(x, *state, after, d_after, o_n, do_n)
            dq, dk = (y.reshape(-1, groups, *y.shape[1:]).sum(axis=1) for y in (dq * scale, dk))
            grads = (jnp.swapaxes(y, 0, 1).astype(like.dtype) for y, like in zip((dq, dk, dv, dg), inputs))
            return (state, (dS, dz)), tuple(grads)

        chunks = (jnp.arange(q.shape[0] // size), entered)
        (_, (dS, dz)), grads = jax.lax.scan(body, (final, (dS, dz)), chunks, reverse=True)
        return *(y.reshape(x.shape) for y, x in zip(grads, inputs)), *(None,) * (4 - len(inputs)), dS, dz, None

    return _over_batch(row, *residuals, *cotangents)


_run.defvjp(_run_forward, _run_backward)
