"""Chunks whose decay is one number for each head, position and channel of keys: the rows and pairs that they make of
queries and keys, as `_scalar_decay` does with one number for all channels.

With b [C, k] the inclusive cumulative sum of the log decay in a chunk, the pairs (`_channel_scores`) and rows are

    P_ij = scale sum_k q_ik k_jk exp(b_ik - b_jk)      A_ij = sum_k k_ik k_jk exp(b_ik - b_jk),  j < i             (1)
    R = scale exp(b) * Q                    X = exp(b) * K                  E = exp(b_C - b) * K                   (2)

and with dP, dA, dR, dX, dE, dc the cotangents of these and of c = exp(b_C), and db what the pairs have of that of b,

    dQ = scale exp(b) * dR + what comes from dP                                                                    (3)
    dK = exp(b) * dX + exp(b_C - b) * dE + what comes from dP and dA                                               (4)
    dg_t = sum_{i >= t} (db_i + R_i * dR_i + X_i * dX_i) + sum_{j < t} E_j * dE_j + c * dc                         (5)

which is what crosses position t: pairs, reads, writes and the state. Only terms of pairs on one side of t cancel, which
have the same rounded factors. No exponent is positive. Documents are masks on (1), (2) and c.

    name            shape             dtype
    q, k            [b, t, h, k]      bfloat16
    g               [b, t, hv, k]     float32
    index           [b, t]            int32        document of each position, non-decreasing; or None
    b, enter, ...   [b, hv, n, C, k]  float32      n = t / C chunks
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import _scalar_decay
from pallas_kernels.gpu._arrays import group_sum, spread
from pallas_kernels.gpu._channel_scores import scores, scores_backward
from pallas_kernels.gpu._chunk import CHUNK
from pallas_kernels.gpu._chunk_products import by_chunk, by_position
from pallas_kernels.gpu._scalar_decay import Prepared, pairs

Array = jax.Array


class Weights(NamedTuple):
    """Of every chunk.

    b             [b, hv, n, C, k]
    enter, leave  [b, hv, n, C, k]: of the entering state in a position, of a position in the leaving state
    through       [b, hv, n, k]: of the entering state in the leaving one
    """

    b: Array
    enter: Array
    leave: Array
    through: Array


def weights(g: Array, index: Array | None) -> Weights:
    b = _sums(by_chunk(g), jnp.tri(CHUNK).T)
    last = b[..., -1:, :]
    enter, leave, through = jnp.exp(b), jnp.exp(last - b), jnp.exp(last[..., 0, :])
    if index is not None:
        # Without decay the weights are what documents leave of them.
        seen = _scalar_decay.weights(None, index, g.shape)
        enter, leave, through = enter * seen.enter[..., None], leave * seen.leave[..., None], through * seen.through
    return Weights(b, enter, leave, through)


def prepare(
    q: Array,
    k: Array,
    g: Array,
    index: Array | None,
    shape: tuple,
    scale: float,
    *,
    correcting: bool = True,
) -> Prepared:
    """shape: that of v. correcting: with A and X, what corrects values."""
    w, (Q, K), seen = weights(g, index), _rows(q, k, shape[2], scale), pairs(index)
    P = jnp.where(seen, scores(Q, K, w.b, q.dtype), 0).astype(q.dtype)
    R, E = (by_position(x).astype(q.dtype) for x in (w.enter * Q, w.leave * K))
    if not correcting:
        return Prepared(P, R, E, w.through)
    A = jnp.where(seen, jnp.tril(scores(K, K, _since(w.b, 16), q.dtype), -1), 0)
    return Prepared(P, R, E, w.through, A, by_position(w.enter * K).astype(q.dtype))


def prepare_backward(
    q: Array, k: Array, g: Array, index: Array | None, scale: float, x: Prepared, d: Prepared
) -> tuple[Array, Array, Array]:
    """Cotangents of q, k and g from those of `prepare`, equations (3) to (5)."""
    heads, seen = k.shape[2], pairs(index)
    w, (Q, K) = weights(g, index), _rows(q, k, d.R.shape[2], scale)
    dR, dE = by_chunk(d.R), by_chunk(d.E)
    dq, dk, entering = scores_backward(jnp.where(seen, d.P, 0), Q, K, _since(w.b, 32), q.dtype)
    dq, dk = scale * (dq + w.enter * dR), dk + w.leave * dE
    entering += by_chunk(x.R) * dR
    if d.X is not None:
        dX = by_chunk(d.X)
        later, earlier, db = scores_backward(jnp.where(seen, jnp.tril(d.A, -1), 0), K, K, _since(w.b, 48), q.dtype)
        dk += later + earlier + w.enter * dX
        entering += db + by_chunk(x.X) * dX
    crossing = _sums(entering, jnp.tri(CHUNK)) + _sums(by_chunk(x.E) * dE, jnp.tri(CHUNK, k=-1).T)
    dg = by_position(crossing + (x.through * d.through)[..., None, :])
    if index is not None:
        started = jnp.diff(index, axis=1, prepend=0) != 0
        dg = jnp.where(started[..., None, None], 0, dg)
    dq, dk = (group_sum(by_position(y), heads).astype(q.dtype) for y in (dq, dk))
    return dq, dk, dg


def _since(b: Array, position: int) -> Array:
    """b from this position on, for pairs as good as b.

    Each sum over pairs gets a b of its own: from the same one XLA would make the exponentials of all pairs of a group
    once for several sums and write them down, 16 times the size of g.
    """
    return b - b[..., position : position + 1, :]


def _rows(q: Array, k: Array, heads: int, scale: float) -> tuple[Array, Array]:
    """scale Q and K as [b, hv, n, C, k] float32."""
    Q, K = (by_chunk(spread(x, heads).astype(jnp.float32)) for x in (q, k))
    return scale * Q, K


def _sums(x: Array, which: Array) -> Array:
    """[..., C, k]: the sums of x over the positions that `which` [from, to] says."""
    return jnp.einsum("...ik,it->...tk", x, which, precision="highest")
