"""Chunks whose decay is one number for each head and position, or none: the weights of their positions and pairs, and
the rows and pairs that they make of queries and keys.

With b the inclusive cumulative sum of the log decay g in a chunk of C positions, a position reads the state that enters
with the weight exp(b), writes the state that leaves with exp(b_C - b), a pair j <= i meets with D_ij = exp(b_i - b_j),
and exp(b_C) of the entering state is left. No exponent is positive; documents are masks on all of these. So

    P_ij = scale (q_i k_j) D_ij             A_ij = (k_i k_j) D_ij,  j < i                                          (1)
    R = scale exp(b) * Q                    X = exp(b) * K                  E = exp(b_C - b) * K                   (2)

and with dP, dA, dR, dX, dE, dc the cotangents of these and of c = exp(b_C), times D where they are of pairs,

    dQ = scale dP K + scale exp(b) * dR                                                                            (3)
    dK = scale dP^T Q + (dA + dA^T) K + exp(b) * dX + exp(b_C - b) * dE                                            (4)
    dg_t = sum_{j < t <= i} (dP_ij P_ij + dA_ij A_ij) / D_ij + sum_{i >= t} (r_i dR_i + x_i dX_i)
           + sum_{j < t} e_j dE_j + c dc                                                                           (5)

(5) sums what crosses position t, each term once, so that none is taken away again.

    name            shape            dtype
    q, k            [b, t, h, k]     bfloat16
    g               [b, t, hv]       float32      or None
    index           [b, t]           int32        document of each position, non-decreasing; or None
    b, enter, ...   [b, hv, n, C]    float32      n = t / C chunks
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gpu._arrays import group_sum, spread
from pallas_kernels.gpu._chunk import CHUNK
from pallas_kernels.gpu._chunk_products import apply, apply_transposed, by_chunk, by_position, meet

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
        b = _sums(by_chunk(g), jnp.tri(CHUNK).T)
    last = b[..., -1:]
    enter, leave, through = jnp.exp(b), jnp.exp(last - b), jnp.exp(last)
    if index is not None:
        index = index.reshape(batch, 1, -1, CHUNK)
        incoming = jnp.pad(index[:, :, :-1, -1:], ((0, 0), (0, 0), (1, 0), (0, 0)))
        first, final = index == incoming, index == index[..., -1:]
        enter, leave, through = enter * first, leave * final, through * first[..., -1:]
    return Weights(b, enter, leave, through)


def pairs(index: Array | None) -> Array:
    """[b, 1, n, C, C] bool, or [C, C]: the positions j <= i that see each other."""
    earlier = jnp.tri(CHUNK, dtype=bool)
    if index is None:
        return earlier
    index = index.reshape(index.shape[0], 1, -1, CHUNK)
    return earlier & (index[..., :, None] == index[..., None, :])


def pair_decay(b: Array, index: Array | None) -> Array:
    """[b, hv, n, C, C]: exp(b_i - b_j) for the pairs that see each other, else 0."""
    exponent = jnp.minimum(b[..., :, None] - b[..., None, :], 0)
    return jnp.where(pairs(index), jnp.exp(exponent), 0)


class Prepared(NamedTuple):
    """Rows, pairs and decay of every chunk, equations (1) and (2), or their cotangents, all of these in float32.

    P, A     [b, hv, n, C, C]  bfloat16 and float32
    R, X, E  [b, t, hv, k]     bfloat16
    through  [b, hv, n, k]     float32

    A and X are None where nothing is corrected.
    """

    P: Array
    R: Array
    E: Array
    through: Array
    A: Array | None = None
    X: Array | None = None


def prepare(q: Array, k: Array, g: Array | None, index: Array | None, shape: tuple, scale: float) -> Prepared:
    """shape: that of v."""
    heads, w = shape[2], weights(g, index, shape)
    D = pair_decay(w.b, index)
    queries, keys = (spread(meet(x, k), heads, axis=1) for x in (q, k))
    Q, K = (spread(x, heads) for x in (q, k))
    enter, leave = (by_position(x)[..., None] for x in w[1:3])
    R, X, E = (x.astype(q.dtype) for x in (scale * enter * Q, enter * K, leave * K))
    through = jnp.broadcast_to(w.through, (*w.through.shape[:3], k.shape[3]))
    return Prepared((scale * queries * D).astype(q.dtype), R, E, through, jnp.tril(keys * D, -1), X)


def prepare_backward(
    q: Array, k: Array, g: Array | None, index: Array | None, scale: float, x: Prepared, d: Prepared
) -> tuple[Array, Array, Array | None]:
    """Cotangents of q, k and g from those of `prepare`, equations (3) to (5)."""
    heads, w = k.shape[2], weights(g, index, d.R.shape)
    D = pair_decay(w.b, index)
    d_queries, d_keys = scale * d.P * D, jnp.tril(d.A * D, -1)
    enter, leave = (by_position(y)[..., None] for y in w[1:3])
    of_query, of_pair = (group_sum(y, heads, axis=1) for y in (d_queries, d_keys))
    dq = apply(of_query, k) + group_sum(scale * enter * d.R, heads)
    dk = apply_transposed(of_query, q) + apply(of_pair + jnp.swapaxes(of_pair, -1, -2), k)
    dk += group_sum(enter * d.X + leave * d.E, heads)
    dg = None
    if g is not None:
        queries, keys = (spread(meet(y, k), d.R.shape[2], axis=1) for y in (q, k))
        dg = _decay_gradient(d_queries * queries + d_keys * keys, x, d)
    return dq.astype(q.dtype), dk.astype(k.dtype), dg


def _decay_gradient(terms: Array, x: Prepared, d: Prepared) -> Array:
    """Equation (5), [b, t, hv], from the terms of pairs [b, hv, n, C, C]."""
    before = jnp.tri(CHUNK, k=-1)  # [t, j] for j < t
    from_here = jnp.tri(CHUNK)  # [i, t] for i >= t
    after = jnp.einsum("bhnij,it->bhntj", terms, from_here, precision="highest")
    entering, leaving = _row_products((x.R, d.R), (x.X, d.X)), _row_products((x.E, d.E))
    dg = jnp.sum(after * before, axis=-1) + _sums(entering, from_here) + _sums(leaving, before.T)
    return by_position(dg + jnp.sum(x.through * d.through, axis=-1, keepdims=True))


def _row_products(*factors: tuple[Array, Array]) -> Array:
    """[b, hv, n, C]: of each position the products of the rows of each pair of factors, summed up."""
    return by_chunk(sum(jnp.sum(a * b, axis=-1) for a, b in factors))


def _sums(x: Array, which: Array) -> Array:
    """[..., C]: the sums of x over the positions that `which` [from, to] says."""
    return jnp.einsum("...i,it->...t", x, which, precision="highest")
