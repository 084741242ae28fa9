"""Linear attention on Hopper GPUs with a decay for each channel of the keys: forward and backward.

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t;   o_t = scale q_t S_t                                                (1)

(gated linear attention: Yang et al. 2023, arXiv 2312.06635; HGRN2: Qin et al. 2024, arXiv 2404.07904.) In a chunk of
C = 64 positions, with b the inclusive cumulative sum of g, S the state that enters and S' the one that leaves:

    P_ij = scale sum_k q_ik k_jk exp(b_ik - b_jk),  j <= i          (`_channel_scores`)                            (2)
    R    = scale exp(b) * Q            E  = exp(b_C - b) * K                                                       (3)
    O    = P V + R S                   S' = diag(exp(b_C)) S + E^T V                                               (4)

XLA makes (2) and (3) for all chunks at once, then `_prepared_walk` walks the chunks, (4), and writes down the states.
Backward, it walks back and gives dV and dS', the cotangent of what leaves each chunk. What is left are products over
single chunks:

    dR = dO S^T        dE = V dS'^T        dP = dO V^T,  j <= i        dc = sum_v(dS' * S)                         (5)
    dQ = scale (exp(b) * dR + what comes from dP)                      dK = exp(b_C - b) * dE + what comes from dP (6)
    dg_t = sum_{i >= t} (db_i + R_i * dR_i) + sum_{j < t} E_j * dE_j + exp(b_C) * dc                               (7)

with db what P has of it. (7) is what crosses position t: pairs, reads, writes and the state. Only the terms of pairs
that do not cross cancel, and they have the same rounded factors. Documents are masks on (2) to (4).

    name            shape              dtype
    q, k            [b, t, h, k]       bfloat16            head j of v reads head j // (hv // h)
    v, o            [b, t, hv, v]      bfloat16
    g               [b, t, hv, k]      float32             natural log, <= 0
    initial_state   [b, hv, k, v]      float32             as is the final one
    index           [b, t]             int32               document of each position, non-decreasing; or None
    b               [b, hv, n, C, k]   float32             n = t / C chunks
    P, R, E         as `_prepared_walk` has them
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import _channel_scores, _prepared_walk, _scalar_decay
from pallas_kernels.gpu._arrays import declined, group_sum, pad, spread
from pallas_kernels.gpu._chunk import CHUNK, TILE
from pallas_kernels.gpu._chunk_products import by_chunk, by_position, meet, read_transposed
from pallas_kernels.once import differentiated_once

Array = jax.Array

NAME = "pallas_gpu channel_decay"


def supports(q: Array, k: Array, v: Array, g: Array | None, *, chunk_size: int | None = None) -> str | None:
    """Why the kernel does not run on these arrays, or None where it does: by shapes, dtypes and the GPU, if any."""
    if g is None or g.ndim != 4:
        return "g is not a decay per channel"
    return declined(q, k, v, chunk_size)


def channel_decay(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    initial_state: Array,
    index: Array | None,
    *,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Array, Array]:
    """Outputs [b, t, hv, v] in the dtype of v and the final state [b, hv, k, v] in float32.

    Shapes and dtypes are those of the table above. At padding k and g must be 0. Document 0 is the one that
    `initial_state` belongs to. Differentiable once, with respect to q, k, v, g and initial_state.

    Raises ValueError with the reason of `supports`.
    """
    if reason := supports(q, k, v, g, chunk_size=chunk_size):
        raise ValueError(f"{NAME}: {reason}")
    length, key_channels, value_channels = q.shape[1], q.shape[-1], v.shape[-1]
    q, k, v, g = (pad(pad(x, 1, CHUNK), 3, TILE) for x in (q, k, v, g.astype(jnp.float32)))
    state = pad(pad(initial_state.astype(jnp.float32), 2, TILE), 3, TILE)
    if index is not None:
        index = jnp.pad(index, ((0, 0), (0, -length % CHUNK)), mode="edge")
    o, state = _attend(q, k, v, g, state, index, float(scale))
    return o[:, :length, :, :value_channels], state[:, :, :key_channels, :value_channels]


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, g, state, index, scale):
    return _results(scale, False, q, k, v, g, state, index)[0]


def _forward(q, k, v, g, state, index, scale):
    return differentiated_once(NAME, partial(_results, scale, True))(q, k, v, g, state, index)


def _backward(scale, residuals, cotangents):
    return differentiated_once(NAME, partial(_gradients, scale))(*residuals, *cotangents)


_attend.defvjp(_forward, _backward)


def _results(scale, for_gradients, q, k, v, g, state, index):
    """Outputs and final state, and what the gradients need."""
    x = _prepare(q, k, g, index, scale)
    pairs = jnp.where(_scalar_decay.pairs(index), _channel_scores.scores(x.q, x.k, x.b, v.dtype), 0).astype(v.dtype)
    walked = _prepared_walk.forward(x.R, x.E, None, pairs, v, x.through, state, for_gradients=for_gradients)
    return (walked.o, walked.final), (q, k, v, g, index, walked.states)


def _gradients(scale, q, k, v, g, index, states, do, d_final):
    """Cotangents of q, k, v, g, the initial state and the index, from what `_results` kept and those of the results."""
    x, seen = _prepare(q, k, g, index, scale), _scalar_decay.pairs(index)
    pairs = jnp.where(seen, _channel_scores.scores(x.q, x.k, x.b, v.dtype), 0).astype(v.dtype)
    back = _prepared_walk.backward(x.R, x.E, None, pairs, do, x.through, d_final)
    # (5)
    d_pairs = jnp.where(seen, meet(do, v), 0)
    dR, dE = (by_chunk(read_transposed(*y)) for y in ((do, states), (v, back.d_states)))
    d_through = jnp.sum(back.d_states.astype(jnp.float32) * states, axis=-1)
    # (6)
    dq, dk, db = _channel_scores.scores_backward(d_pairs, x.q, x.k, x.b, v.dtype)
    dq, dk = scale * (dq + x.enter * dR), dk + x.leave * dE
    dq, dk = (group_sum(by_position(y), q.shape[2]).astype(q.dtype) for y in (dq, dk))
    # (7)
    triangle = jnp.tri(CHUNK)
    crossing = _sums(db + by_chunk(x.R) * dR, triangle) + _sums(by_chunk(x.E) * dE, jnp.tri(CHUNK, k=-1).T)
    dg = by_position(crossing + (x.through * d_through)[..., None, :])
    return dq, dk, back.dU, dg, back.d_state, None


class _Prepared(NamedTuple):
    """Of every chunk.

    q, k, b        [b, hv, n, C, k] float32: scale Q, K and b
    enter, leave   [b, hv, n, C, k] float32: the weights exp(b) and exp(b_C - b), where the document lets them be
    R, E           [b, t, hv, k]
    through        [b, hv, n, k] float32: exp(b_C), or 0 where a document starts
    """

    q: Array
    k: Array
    b: Array
    enter: Array
    leave: Array
    R: Array
    E: Array
    through: Array


def _prepare(q: Array, k: Array, g: Array, index: Array | None, scale: float) -> _Prepared:
    dtype = q.dtype
    q, k = (by_chunk(spread(x, g.shape[2]).astype(jnp.float32)) for x in (q, k))
    b = _sums(by_chunk(g), jnp.tri(CHUNK).T)
    last = b[..., -1:, :]
    enter, leave, through = jnp.exp(b), jnp.exp(last - b), jnp.exp(last)[..., 0, :]
    if index is not None:
        # Without decay the weights are what documents leave of them.
        seen = _scalar_decay.weights(None, index, g.shape)
        enter, leave, through = enter * seen.enter[..., None], leave * seen.leave[..., None], through * seen.through
    q = scale * q
    R, E = (by_position(x).astype(dtype) for x in (enter * q, leave * k))
    return _Prepared(q, k, b, enter, leave, R, E, through)


def _sums(x: Array, which: Array) -> Array:
    """[..., C, k]: the sums of x over the positions that `which` [from, to] says."""
    return jnp.einsum("...ik,it->...tk", x, which, precision="highest")
