"""Linear attention with a scalar decay on Hopper GPUs, forward and backward.

For every head, with a log decay g_t <= 0, a state S [k, v] and row vectors q_t, k_t, v_t,

    S_t = exp(g_t) S_{t-1} + k_t^T v_t          o_t = scale q_t S_t                                                (1)

(Katharopoulos et al. 2020, arXiv 2006.16236, without decay; Qin et al. 2024, arXiv 2401.04658, constant decay; Dao, Gu
2024, arXiv 2405.21060, decay that depends on the data). In chunks of C = 64 positions, with b the inclusive cumulative
sum of g inside the chunk, S the state that enters and S' the state that leaves it (Yang et al. 2023, arXiv 2312.06635):

    O  = (scale Q K^T * L) V + enter * (Q S)               L_ij = exp(b_i - b_j) for j <= i, else 0                (2)
    S' = through S + K^T (leave * V)                                                                               (3)
    enter_i = scale exp(b_i)        leave_j = exp(b_C - b_j)        through = exp(b_C)

No exponent is positive. Where the document of a row changes, the state is forgotten: L keeps the pairs of one document,
`enter` the rows of the document that came in, `leave` those of the chunk's last one, `through` is 0 if one started.

`walk` is (2) and (3) for any three arrays in the places of q, k, v, in either direction of time. With dO and dS' the
cotangents of O and S', the gradients are such walks too:

    dQ = (scale dO V^T * L) K + enter * (dO S^T)           forwards, with dO, V, K for Q, K, V, and S^T for S      (4)
    dV = (scale Q K^T * L)^T dO + leave * (K dS')          backwards, with K, Q, dO, and dS for S                  (5)
    dK = (scale dO V^T * L)^T Q + leave * (V dS'^T)        backwards, with V, dO, Q, and dS^T                      (6)
    dS = through dS' + Q^T (enter * dO)                                                                            (7)

so that the backward pass needs no more than the inputs and the state at the start of each segment (below). `walk_back`
is (5) and (6) in one, where it fits. The gradient of the decay is what flows across position t, into any span of
positions that starts before t and out of its end:

    dg_t = sum_{i = t}^{end} (q_i dq_i - k_i dk_i) + <dS_end, S_end>          <,>: the sum of products             (8)

Here the products with dq and dk are taken before these are rounded, and spans have SPAN positions: the walks write down
the states between them. What cancels in (8) has rounding errors, which add up over no more than a span.

The rows of the batch, the heads and the tiles of 64 channels of v are walked side by side. Where these are too few for
the chip, so are segments of the sequence: a walk without outputs sums up each segment, and one small product of
matrices gives the state at the start of each.

    name            shape             dtype
    q, k            [b, t, h, k]      bfloat16              head j of v reads head j // (hv // h)
    v, o            [b, t, hv, v]     bfloat16
    g               [b, t, hv], [hv]  float32               or None: no decay
    initial_state   [b, hv, k, v]     float32               as is the final one
    index           [b, t]            int32                 document of each position, non-decreasing; or None
    weights         [b, hv, n, 4, C]  float32               of each chunk: b / log 2, enter, leave, through; a fifth
                                                            row is `index` where there is one
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.gpu import _scalar_decay
from pallas_kernels.gpu._arrays import declined, group_sum, in_chunks_and_tiles, pad
from pallas_kernels.gpu._chunk import CHUNK, MULTIPROCESSORS, SPAN, THROUGH, TILE, segments_of
from pallas_kernels.gpu._walk import walk
from pallas_kernels.gpu._walk_back import runs_in_one_walk, segments_back, walk_back
from pallas_kernels.once import differentiated_once

Array = jax.Array

NAME = "pallas_gpu linear_attention"
# With fewer blocks of threads than this the sequence is cut into segments, which costs a second reading of k and v.
FEW_BLOCKS = 64


def supports(q: Array, k: Array, v: Array, g: Array | None, *, chunk_size: int | None = None) -> str | None:
    """Why the kernel does not run on these arrays, or None where it does: by shapes, dtypes and the GPU, if any."""
    if g is not None and g.ndim == 4:
        return "decay per channel is not supported, only one per head and step"
    return declined(q, k, v, chunk_size)


def linear_attention(
    q: Array,
    k: Array,
    v: Array,
    g: Array | None,
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
    if g is not None:
        g = jnp.broadcast_to(g.astype(jnp.float32), v.shape[:3])
        g = pad(g, 1, CHUNK)
    q, k, v, state, index = in_chunks_and_tiles(q, k, v, initial_state, index)
    o, state = _attend(q, k, v, g, state, index, float(scale))
    return o[:, :length, :, :value_channels], state[:, :, :key_channels, :value_channels]


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend(q, k, v, g, state, index, scale):
    return _results(scale, q, k, v, g, state, index)[0]


def _forward(q, k, v, g, state, index, scale):
    return differentiated_once(NAME, partial(_results, scale))(q, k, v, g, state, index)


def _backward(scale, residuals, cotangents):
    return differentiated_once(NAME, partial(_gradients, scale))(*residuals, *cotangents)


_attend.defvjp(_forward, _backward)


def _results(scale, q, k, v, g, state, index):
    """Outputs and final state, and what the gradients need."""
    weights = _weights(g, index, v.shape, scale)
    entered = _entering(k, v, weights, state, segments=_segments(v, k.shape[-1]))
    walked = walk(q, k, v, weights, entered, scale=scale, wanted=("out", "leaving"))
    return (walked.out, walked.leaving), (q, k, v, g, index, entered, walked.leaving)


def _gradients(scale, q, k, v, g, index, entered, left, do, d_left):
    """Cotangents of q, k, v, g, the initial state and the index, from what `_results` kept and those of the results."""
    weights = _weights(g, index, v.shape, scale)
    in_one_walk = runs_in_one_walk(k, v)
    segments = segments_back(k, v.shape[2]) if in_one_walk else entered.shape[2]
    d_entered = _entering(q, do, weights, d_left, segments=segments, reverse=True)
    flows = () if g is None else ("products", "states")
    dq = walk(do, v, k, weights, jnp.swapaxes(entered, -1, -2), scale=scale, wanted=("out", *flows), probe=q)
    if in_one_walk:
        walked = walk_back(q, k, v, do, weights, d_entered, scale=scale, with_flows=g is not None)
        dk, dv, d_state, products, states = walked
    else:
        of_v = walk(k, q, do, weights, d_entered, scale=scale, wanted=("out", "leaving"), reverse=True)
        swapped = jnp.swapaxes(d_entered, -1, -2)
        of_k = walk(v, do, q, weights, swapped, scale=scale, wanted=("out", *flows), probe=k, reverse=True)
        dk, dv, d_state, products, states = of_k.out, of_v.out, of_v.leaving, of_k.products, of_k.states
        states = None if states is None else jnp.swapaxes(states, -1, -2)
    dg = None
    if g is not None:
        at_end = jnp.sum(left * d_left, axis=(-1, -2))
        dg = _decay_gradient(dq.products.sum(2) - products.sum(2), jnp.swapaxes(dq.states, -1, -2), states, at_end)
        if index is not None:
            started = jnp.diff(index, axis=1, prepend=0) != 0
            dg = jnp.where(started[..., None], 0, dg)
    heads = q.shape[2]
    return group_sum(dq.out, heads), group_sum(dk, heads), dv, dg, d_state, None


def _weights(g: Array | None, index: Array | None, shape: tuple, scale: float) -> Array:
    """`weights` of every chunk, [b, hv, n, 4 or 5, C].

    shape: that of v
    """
    b, enter, leave, through = _scalar_decay.weights(g, index, shape)
    # In float32 document numbers are exact up to 2^24.
    documents = [] if index is None else [index.reshape(b.shape[0], 1, -1, CHUNK).astype(jnp.float32)]
    rows = (b * math.log2(math.e), scale * enter, leave, through, *documents)
    return jnp.stack([jnp.broadcast_to(x, b.shape) for x in rows], axis=3)


def _decay_gradient(flows: Array, states: Array, d_states: Array, at_end: Array) -> Array:
    """dg of (8), [b, t, hv].

    flows              [b, hv, t]: q dq - k dk
    states, d_states   [b, hv, spans - 1, k, v]: S and dS at the end of every span but the last
    at_end             [b, hv]: <dS, S> at the end of the last
    """
    batch, heads, length = flows.shape
    spans = -(-length // SPAN)
    crossing = at_end[..., None]
    if spans > 1:
        products = states.astype(jnp.float32) * d_states.astype(jnp.float32)
        crossing = jnp.concatenate([products.sum((-1, -2)), crossing], axis=-1)
    flows = pad(flows, 2, SPAN).reshape(batch, heads, spans, SPAN // CHUNK, CHUNK)
    later = flows.sum(-1)
    later = jnp.flip(jnp.cumsum(jnp.flip(later, -1), -1), -1) - later + crossing[..., None]
    triangle = jnp.tril(jnp.ones((CHUNK, CHUNK), jnp.float32))
    from_here = jnp.einsum("bhsnj,ji->bhsni", flows, triangle, precision="highest")
    dg = (from_here + later[..., None]).reshape(batch, heads, -1)[..., :length]
    return jnp.swapaxes(dg, 1, 2)


def _segments(v: Array, key_channels: int) -> int:
    """Into how many segments the sequence is cut."""
    batch, length, heads, value_channels = v.shape
    tiles = min(key_channels, value_channels) // TILE
    blocks = batch * heads * tiles
    if blocks >= FEW_BLOCKS:
        return 1
    blocks //= 1 + (tiles % 2 == 0)
    together = 3 if max(key_channels, value_channels) == TILE else 1
    return segments_of(length // CHUNK, MULTIPROCESSORS * together // blocks)


def _entering(
    columns: Array, values: Array, weights: Array, state: Array, *, segments: int, reverse: bool = False
) -> Array:
    """The state that enters each segment, [b, hv, segments, k, v], from the one that enters the first in walking order.

    A segment of n chunks adds to what went through it, `through` being the product over its chunks.
    """
    if segments == 1:
        return state[:, :, None]
    added = walk(None, columns, values, weights, None, segments=segments, wanted=("leaving",), reverse=reverse).leaving
    through = weights[:, :, :, THROUGH, 0]
    size = -(-through.shape[2] // segments)
    through = jnp.pad(through, ((0, 0), (0, 0), (0, segments * size - through.shape[2])), constant_values=1)
    through = through.reshape(*through.shape[:2], segments, size).prod(-1)
    if reverse:
        added, through = jnp.flip(added, 2), jnp.flip(through, 2)
    # From the start (row 0 of `sources`) or the end of segment r to the start of segment s, over those between them.
    sources = jnp.concatenate([state[:, :, None], added[:, :, :-1]], axis=2)
    r, s, u = jnp.ogrid[:segments, :segments, :segments]
    kept = jnp.where((r <= u) & (u < s), through[:, :, None, None, :], 1).prod(-1) * (r <= s)[..., 0]
    entering = jnp.einsum("bhrs,bhrkv->bhskv", kept, sources, precision="highest")
    return jnp.flip(entering, 2) if reverse else entering
