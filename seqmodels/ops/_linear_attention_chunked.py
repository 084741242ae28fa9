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
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmodels.notation import Array
from seqmodels.ops import _scan
from seqmodels.ops._scan import Documents

DEFAULT_CHUNK = 64
SUB_BLOCK = 16
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
    """
    length = q.shape[1]
    size = chunk_size or min(DEFAULT_CHUNK, -(-length // SUB_BLOCK) * SUB_BLOCK)
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

    q, k     [b, hv, c, k]       v  [b, hv, c, v]
    b        [b, hv, c, 1 or k]  inclusive cumulative log decay within the chunk, or None
    pairs    [c, c] or [b, 1, c, c] bool: j <= i and of one document
    enter    weight of the incoming state in a row's output: exp(b_i) where the row is of the incoming document
    leave    weight of a row in the outgoing state: exp(b_C - b_i) where the row is of the last document
    through  weight of the incoming state in the outgoing one: [b, hv, 1 or k], exp(b_C) where no document started
    """

    q: Array
    k: Array
    v: Array
    b: Array | None
    pairs: Array
    enter: Array | float
    leave: Array | float
    through: Array | float


def _chunk(n: Array, size: int, q: Array, k: Array, v: Array, g: Array | None, index: Array | None, scale: float):
    """Cut chunk `n` out of the arrays and work out its weights."""
    dtype = _scan.state_dtype(q, k, v, g)

    def cut(x: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, n * size, size, axis=1)

    groups = v.shape[2] // q.shape[2]
    q, k, v = (jnp.moveaxis(cut(x), 1, 2).astype(dtype) for x in (q, k, v))
    q, k = (jnp.repeat(x, groups, axis=1) for x in (q * scale, k))
    causal = jnp.tril(jnp.ones((size, size), bool))
    pairs, enter, leave, through, b = causal, 1.0, 1.0, 1.0, None
    if g is not None:
        g = jnp.moveaxis(cut(g), 1, 2)
        g = g if g.ndim == 4 else g[..., None]
        b = _sum_to(g.astype(dtype))
        last = b[:, :, -1:]
        enter, leave, through = jnp.exp(b), jnp.exp(last - b), jnp.exp(last[:, :, 0])
    if index is not None:
        ids = cut(index)
        incoming = jnp.where(n > 0, index[jnp.arange(index.shape[0]), jnp.maximum(n * size - 1, 0)], 0)
        first, last = (ids == incoming[:, None])[:, None, :, None], (ids == ids[:, -1:])[:, None, :, None]
        pairs = causal & (ids[:, :, None] == ids[:, None, :])[:, None]
        enter, leave, through = enter * first, leave * last, through * first[:, :, -1]
    return _Chunk(q, k, v, b, pairs, enter, leave, through)


def _sum_to(g: Array) -> Array:
    """Inclusive cumulative sum over the chunk axis (-2), as a product with a triangle of ones."""
    ones = jnp.tril(jnp.ones((g.shape[-2],) * 2, g.dtype))
    return jnp.matmul(ones, g, precision="highest")


def _sum_from(x: Array) -> Array:
    """Sum over the positions from each one to the chunk's end (axis -2)."""
    ones = jnp.triu(jnp.ones((x.shape[-2],) * 2, x.dtype))
    return jnp.matmul(ones, x, precision="highest")


def _transposed(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _scores(x: _Chunk) -> Array:
    """A of equation (1)."""
    if x.b is not None and x.b.shape[-1] > 1:
        return _channel_scores(x)
    return (x.q @ _transposed(x.k)) * _pair_decay(x)


def _scores_backward(x: _Chunk, dA: Array) -> tuple[Array, Array]:
    """dq, dk of the scores."""
    if x.b is not None and x.b.shape[-1] > 1:
        return _channel_scores_backward(x, dA)
    dA = dA * _pair_decay(x)
    return dA @ x.k, _transposed(dA) @ x.q


def _pair_decay(x: _Chunk) -> Array:
    """exp(b_i - b_j) on the pairs that see each other, 0 elsewhere; for scalar decay or none."""
    if x.b is None:
        return x.pairs.astype(x.q.dtype)
    difference = jnp.where(x.pairs, x.b - _transposed(x.b), 0)
    return jnp.where(x.pairs, jnp.exp(difference), 0)


# Decay per channel does not factor out of the product over channels, and exp(b_i) exp(-b_j) overflows. Two levels of
# blocks keep every exponent <= 0: between sub-blocks both sides are taken relative to the first row of the later one;
# within a sub-block the sum over channels is written out.


def _sub_blocks(x: Array, size: int) -> Array:
    """[..., c, k] -> [..., c / size, size, k]."""
    return x.reshape(*x.shape[:-2], -1, size, x.shape[-1])


def _diagonal_decay(b: Array) -> Array:
    """exp(b_i - b_j) for j <= i within each sub-block, 0 above: [..., n, i, j, k]."""
    later = jnp.tril(jnp.ones((b.shape[-2],) * 2, bool))[..., None]
    difference = jnp.where(later, b[..., :, None, :] - b[..., None, :, :], 0)
    return jnp.where(later, jnp.exp(difference), 0)


def _sub_block_size(size: int) -> int:
    return SUB_BLOCK if size % SUB_BLOCK == 0 else size


def _channel_scores(x: _Chunk) -> Array:
    size = _sub_block_size(x.q.shape[-2])
    q, k, b = (_sub_blocks(y, size) for y in (x.q, x.k, x.b))
    diagonal = jnp.sum(q[..., :, None, :] * k[..., None, :, :] * _diagonal_decay(b), axis=-1)
    rows = []
    for n in range(q.shape[-3]):
        reference = b[..., n, :1, :]
        left = (q[..., n, :, :] * jnp.exp(b[..., n, :, :] - reference)) @ _transposed(
            x.k[..., : n * size, :] * jnp.exp(reference - x.b[..., : n * size, :])
        )
        right = jnp.zeros((*left.shape[:-1], x.q.shape[-2] - (n + 1) * size), left.dtype)
        rows.append(jnp.concatenate([left, diagonal[..., n, :, :], right], axis=-1))
    return jnp.where(x.pairs, jnp.concatenate(rows, axis=-2), 0)


def _channel_scores_backward(x: _Chunk, dA: Array) -> tuple[Array, Array]:
    size = _sub_block_size(x.q.shape[-2])
    dA = jnp.where(x.pairs, dA, 0)
    q, k, b = (_sub_blocks(y, size) for y in (x.q, x.k, x.b))
    count = q.shape[-3]
    blocks = jnp.stack(
        [dA[..., n * size : (n + 1) * size, n * size : (n + 1) * size] for n in range(count)], axis=-3
    )
    weighted = blocks[..., None] * _diagonal_decay(b)
    dq_diagonal = jnp.sum(weighted * k[..., None, :, :], axis=-2)
    dk = jnp.sum(weighted * q[..., :, None, :], axis=-3).reshape(x.k.shape)
    dq = []
    for n in range(count):
        reference = b[..., n, :1, :]
        q_decay = jnp.exp(b[..., n, :, :] - reference)
        k_decay = jnp.exp(reference - x.b[..., : n * size, :])
        dA_row = dA[..., n * size : (n + 1) * size, : n * size]
        dq.append(dq_diagonal[..., n, :, :] + q_decay * (dA_row @ (x.k[..., : n * size, :] * k_decay)))
        dk_left = k_decay * (_transposed(dA_row) @ (q[..., n, :, :] * q_decay))
        dk = dk.at[..., : n * size, :].add(dk_left)
    return jnp.concatenate(dq, axis=-2), dk


def _forward(x: _Chunk, S: Array, z: Array | None) -> tuple[Array, Array, Array | None]:
    """Equations (1) to (4) for one chunk."""
    A, q_in, k_out = _scores(x), x.q * x.enter, x.k * x.leave
    o = A @ x.v + q_in @ S
    through = jnp.asarray(x.through)
    if z is not None:
        o = o / _denominator(A, q_in, z)
        z = through * z + k_out.sum(axis=-2)
    return o, through[..., None] * S + _transposed(k_out) @ x.v, z


def _denominator(A: Array, q_in: Array, z: Array) -> Array:
    return (A.sum(axis=-1) + jnp.einsum("bhck,bhk->bhc", q_in, z) + EPSILON)[..., None]


def _backward(x: _Chunk, S: Array, z: Array | None, after: tuple, d_after: tuple, o: Array | None, do: Array):
    """Equations (5) to (9) for one chunk: cotangents of q (scaled), k, v, g and of the state that entered."""
    (S_after, z_after), (dS_after, dz_after) = after, d_after
    A, q_in, k_out = _scores(x), x.q * x.enter, x.k * x.leave
    through = jnp.asarray(x.through)
    N, M = do, None
    if z is not None:
        N = do / _denominator(A, q_in, z)
        M = -jnp.sum(N * o, axis=-1, keepdims=True)
    dA = N @ _transposed(x.v)
    dq_in = N @ _transposed(S)
    dk_out = x.v @ _transposed(dS_after)
    dS = through[..., None] * dS_after + _transposed(q_in) @ N
    dz = None
    if z is not None:
        dA = dA + M
        dq_in = dq_in + M * z[..., None, :]
        dk_out = dk_out + dz_after[..., None, :]
        dz = through * dz_after + jnp.sum(q_in * M, axis=-2)
    dv = _transposed(A) @ N + k_out @ dS_after
    dq, dk = _scores_backward(x, dA)
    dq = dq + dq_in * x.enter
    dk = dk + dk_out * x.leave
    dg = None
    if x.b is not None:
        at_end = jnp.sum(dS_after * S_after, axis=-1)
        if z is not None:
            at_end = at_end + dz_after * z_after
        db, at_end = x.q * dq - x.k * dk, at_end[..., None, :]
        if x.b.shape[-1] == 1:
            db, at_end = (y.sum(axis=-1, keepdims=True) for y in (db, at_end))
        dg = _sum_from(db) + at_end
    return dq, dk, dv, dg, dS, dz


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _run(q, k, v, g, S, z, index, scale: float, size: int):
    o, S, z, _ = _run_chunks(q, k, v, g, S, z, index, scale, size)
    return o, S, z


def _run_chunks(q, k, v, g, S, z, index, scale: float, size: int):
    """The scan over chunks; also the states that entered each chunk."""

    def body(state, n):
        x = _chunk(n, size, q, k, v, g, index, scale)
        o, *after = _forward(x, *state)
        return tuple(after), (jnp.moveaxis(o, 2, 1).astype(v.dtype), state)

    (S, z), (o, entered) = jax.lax.scan(body, (S, z), jnp.arange(q.shape[1] // size))
    return _join(o), S, z, entered


def _join(chunks: Array) -> Array:
    """[n, b, c, ...] -> [b, n * c, ...]."""
    x = jnp.moveaxis(chunks, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _run_forward(q, k, v, g, S, z, index, scale: float, size: int):
    o, S, z, entered = _run_chunks(q, k, v, g, S, z, index, scale, size)
    kept = o if z is not None else None
    return (o, S, z), (q, k, v, g, index, entered, (S, z), kept)


def _run_backward(scale: float, size: int, residuals, cotangents):
    q, k, v, g, index, entered, final, o = residuals
    do, dS, dz = cotangents
    heads, groups = q.shape[2], v.shape[2] // q.shape[2]

    def heads_first(x: Array, n: Array, like: Array) -> Array:
        cut = jax.lax.dynamic_slice_in_dim(x, n * size, size, axis=1)
        return jnp.moveaxis(cut, 1, 2).astype(like.dtype)

    def body(carry, position):
        n, state = position
        after, d_after = carry
        x = _chunk(n, size, q, k, v, g, index, scale)
        o_n = None if o is None else heads_first(o, n, x.q)
        dq, dk, dv, dg, dS, dz = _backward(x, *state, after, d_after, o_n, heads_first(do, n, x.q))
        if groups > 1:
            dq, dk = (y.reshape(y.shape[0], heads, groups, *y.shape[2:]).sum(axis=2) for y in (dq, dk))
        out = ((dq * scale).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype))
        if g is not None:
            out += ((dg[..., 0] if g.ndim == 3 else dg).astype(g.dtype),)
        return (state, (dS, dz)), tuple(jnp.moveaxis(y, 2, 1) for y in out)

    count = q.shape[1] // size
    (_, (dS, dz)), grads = jax.lax.scan(body, (final, (dS, dz)), (jnp.arange(count), entered), reverse=True)
    grads = [_join(y) for y in grads]
    dg = grads[3] if g is not None else None
    return *grads[:3], dg, dS, dz, None


_run.defvjp(_run_forward, _run_backward)
