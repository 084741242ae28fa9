"""Aaren on Hopper GPUs, the softmax attention of one learned query over every prefix: forward and backward.

    s_t = q k_t          o_t = sum_{j <= t} exp(s_j) v_j / sum_{j <= t} exp(s_j)                                   (1)

(Feng et al. 2024, arXiv 2405.13956.) With m_t the largest score so far and u_t, w_t the two sums in (1) relative to
exp(m_t), o_t = w_t / u_t is an average of all values before it, so it is the state too: the next output goes on from
it. In chunks of C = 64 positions, with m_0, u_0, y = w_0 / u_0 what enters and y' what leaves,

    O  = A V + enter y^T          A_ij = exp(s_j - m_i) / u_i for j <= i, else 0                                   (2)
    y' = V^T leave + enter_C y    leave_j = A_Cj                                                                   (3)
    enter_i = exp(m_0 - m_i) u_0 / u_i

Nothing of the size of v is needed for A, enter and leave, which `_weights` prepares for all chunks at once; of the size
of v there are v and o alone, which the kernel streams. With dO and dy' the cotangents of O and y', and those of the
final state's sums as dy' = u dw, z' = -u du at the end,

    dV = A^T dO + leave dy'^T     dy = dO^T enter + enter_C dy'                                                    (4)
    r_i = sum_j A_ij (dO_i v_j) + enter_i (dO_i y)          z = r^T enter + enter_C z'                             (5)
    ds_j = sum_i A_ij (dO_i v_j - r_i) + leave_j (v_j dy' - z')                                                    (6)
    dw_0 = dy / u_0               du_0 = -z / u_0                                                                  (7)
    dk_j = ds_j q                 dq = sum_j ds_j k_j                                                              (8)

(the linear-time gradient of the paper.) (4) is (2) and (3) backwards in time, with leave and enter in each other's
place: one kernel, `_walk`, does both, and (5) and (6) beside the latter. r_i is dO_i o_i, but of the difference in (6)
little is left where one weight outweighs the others: instead of the rounded o it takes v and the y that entered the
chunk, which the forward pass keeps and which is smaller than o, too. m is a unit of measure that no output depends on,
and is held fixed; but who reads the numbers of the final state depends on its m too, see `_gradients`.

No exponent is positive. Where the document of a row changes, the state is forgotten: A keeps the pairs of one document,
`enter` the rows of the document that came in, `leave` those of the chunk's last one. A position of padding has the
score LOWEST, which no other sees, and the output of the position before it: the last output is always what leaves.

The rows of the batch, the heads and the tiles of 64 channels of v are walked side by side; (6) is a sum over tiles.
Where these are too few for the chip, so are segments of the sequence. The state at the start of each then comes from
the sums of all chunks, which costs a second reading of v (or dO); z is 0 at the end of each, and what (6) owes to the
segments after it is added when all are known.

    name     symbol   shape               dtype
    k                 [b, t, h, k]        bfloat16 or float32
    v, o              [b, t, h, v]        bfloat16
    query    q        [h, k]              float32              the scale included
    m, u              [b, h]              float32              u is 0 where nothing was seen, and then m and w are 0
    w                 [b, h, v]           float32
    index             [b, t]              int32                document of each position, non-decreasing; or None
    real              [b, t]              bool                 False at padding; or None
    s                 [b, h, n, C]        float32              of each chunk; LOWEST at padding
    weights           [b, h, n, 5, C]     float32              of each chunk: -m / log 2, -s / log 2, 1 / u, enter,
                                                               leave; a sixth row is `index` where there is one
"""

import math
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.gpu._arrays import other_chunks, out_of_reach, pad
from pallas_kernels.gpu._chunk import (
    BY_COLUMN,
    BY_ROW,
    CHUNK,
    COMPILER_PARAMS,
    MATRIX,
    MULTIPROCESSORS,
    TILE,
    TILED,
    accumulate,
    divide,
    load,
    over,
    pair_weights,
    segments_of,
)
from pallas_kernels.late import late
from pallas_kernels.once import differentiated_once

Array = jax.Array

NAME = "pallas_gpu aaren"
LARGEST = 256  # channels of v
LATER, EARLIER, INVERSE, ENTER, LEAVE, INDEX = range(6)  # rows of `weights`
# Below all scores: that of padding, and m where nothing was seen. Divided by log 2 it is finite, too.
LOWEST = -1e38
STAGES = 3  # chunks in shared memory at once
REDUCTION_BYTES = 8192  # of shared memory: a sum over rows is then one exchange between warps, and not four
# Blocks of threads that a multiprocessor should have: with less than half of it the sequence is cut into segments.
TOGETHER = 2


def supports(k: Array, v: Array, *, chunk_size: int | None = None) -> str | None:
    """Why the kernel does not run on these arrays, or None where it does: by shapes, dtypes and the GPU, if any."""
    if reason := out_of_reach(v, k=k):
        return reason
    if v.dtype != jnp.bfloat16:
        return f"v must be bfloat16, which the matrix instructions take, got {v.dtype}"
    if k.dtype not in (jnp.bfloat16, jnp.float32):
        return f"k must be bfloat16 or float32, got {k.dtype}"
    if v.shape[-1] > LARGEST:
        return f"v has {v.shape[-1]} channels, at most {LARGEST} are supported"
    return other_chunks(chunk_size)


def aaren(
    k: Array,
    v: Array,
    query: Array,
    m: Array,
    u: Array,
    w: Array,
    index: Array | None,
    real: Array | None,
    *,
    scale: float,
    chunk_size: int | None = None,
) -> tuple[Array, tuple[Array, Array, Array]]:
    """Outputs [b, t, h, v] in the dtype of v, without meaning at padding, and the final (m, u, w), equation (1).

    Shapes and dtypes are those of the table above, but the query is any float, without the scale. Document 0 is the one
    that (m, u, w) belongs to. Differentiable once, with respect to k, v, query, m, u and w.

    Raises ValueError with the reason of `supports`.
    """
    if reason := supports(k, v, chunk_size=chunk_size):
        raise ValueError(f"{NAME}: {reason}")
    length, channels = v.shape[1], v.shape[3]
    if real is None and length % CHUNK:
        real = jnp.ones(v.shape[:2], bool)
    if index is not None:
        index = jnp.pad(index, ((0, 0), (0, -length % CHUNK)), mode="edge")
    state = m.astype(jnp.float32), u.astype(jnp.float32), pad(w.astype(jnp.float32), 2, TILE)
    values = pad(pad(v, 1, CHUNK), 3, TILE)
    marks = _Marks(index, None if real is None else pad(real, 1, CHUNK))
    o, m, u, w = _attend(k, values, scale * query.astype(jnp.float32), *state, marks)
    return o[:, :length, :, :channels], (m, u, w[:, :, :channels])


class _Marks(NamedTuple):
    """`index` and `real` of the table above, of whole chunks."""

    index: Array | None
    real: Array | None


@jax.custom_vjp
def _attend(k, v, query, m, u, w, marks):
    return _results(k, v, query, m, u, w, marks, keep=False)[0]


def _forward(k, v, query, m, u, w, marks):
    return differentiated_once(NAME, partial(_results, keep=True))(k, v, query, m, u, w, marks)


def _backward(residuals, cotangents):
    return differentiated_once(NAME, _gradients)(*residuals, *cotangents)


_attend.defvjp(_forward, _backward)


def _results(k, v, query, m, u, w, marks, *, keep):
    """Outputs and final state, and what the gradients need, if `keep`."""
    s = _scores(k, query, marks.real)
    weights, m_end, u_end = _weights(s, m, u, marks)
    y = w * _inverse(u)[..., None]
    entering = _entering(v, weights, y, segments=_segments(v))
    walked = _walk(v, weights, entering, keep=keep)
    w_end = u_end[..., None] * walked.leaving
    results = walked.out, jnp.where(u_end > 0, m_end, 0), u_end, w_end
    return results, (k, v, query, m, u, w, marks, walked.entered, m_end, u_end, w_end)


def _gradients(k, v, query, m, u, w, marks, entered, m_end, u_end, w_end, do, dm, du, dw):
    """Cotangents of k, v, the query, the initial state and the marks, from what `_results` kept and those of its
    results.

    Who reads the numbers of the final state may depend on its m, which is the largest of all scores: those scores that
    are it, and the incoming m if it is, share what (4) to (8) leave of its cotangent.
    """
    s = _scores(k, query, marks.real)
    weights, _, _ = _weights(s, m, u, marks)
    segments = _segments(v)
    entering = _entering(do, weights, u_end[..., None] * dw, segments=segments, reverse=True)
    walked = _walk(do, weights, entering, others=_Others(v, entered))
    of_later, z = _of_later(walked.z, weights, -u_end * du)
    # (7), and for the largest scores what is left of the cotangent of m.
    inverse = _inverse(u)
    dw_0, du_0 = walked.leaving * inverse[..., None], -z * inverse
    left = jnp.where(u_end > 0, dm - u_end * du - jnp.sum(w_end * dw, axis=-1), 0)
    of_score, of_state = _largest(s, m, u, m_end, marks)
    share = left / jnp.maximum(of_score.sum(axis=(2, 3)) + of_state, 1)
    dm_0 = u * du_0 + jnp.sum(w * dw_0, axis=-1) + jnp.where(of_state, share, 0)
    ds = walked.ds - of_later + jnp.where(of_score, share[..., None, None], 0)
    ds = jnp.moveaxis(ds.reshape(*ds.shape[:2], -1)[..., : k.shape[1]], 1, 2)[..., None]
    dk = (ds * query).astype(k.dtype)
    dq = jnp.sum(ds * k.astype(jnp.float32), axis=(0, 1))
    return dk, walked.out, dq, dm_0, du_0, dw_0, None


def _largest(s: Array, m: Array, u: Array, m_end: Array, marks: _Marks) -> tuple[Array, Array]:
    """Which scores [b, h, n, C], or the incoming m [b, h], are the final m: more than one where they are equal."""
    of_score, of_state = s == m_end[..., None, None], (m == m_end) & (u > 0)
    if marks.index is not None:
        last = marks.index[:, -1]
        of_score &= _in_chunks(marks.index) == last[:, None, None, None]
        of_state &= last[:, None] == 0
    return of_score, of_state


# What is prepared for the kernel: of one number per position and head.


def _in_chunks(x: Array) -> Array:
    """[b, t] -> [b, 1, n, C]."""
    return x.reshape(x.shape[0], 1, -1, CHUNK)


def _scores(k: Array, query: Array, real: Array | None) -> Array:
    """s of (1), in float32: a sum of products, which reads k as it is."""
    s = jnp.sum(k.astype(jnp.float32) * query, axis=-1)
    s = jnp.moveaxis(pad(s, 1, CHUNK), 1, 2)
    s = s.reshape(*s.shape[:2], -1, CHUNK)
    return s if real is None else jnp.where(_in_chunks(real), s, LOWEST)


def _inverse(u: Array) -> Array:
    """1 / u, and 0 where nothing was seen."""
    return jnp.where(u > 0, 1 / jnp.where(u > 0, u, 1), 0)


def _prefixes(m: Array, u: Array, index: Array | None) -> tuple[Array, Array]:
    """(m, u) of all before and of each item of the last axis, where these have its `index`.

    Every pair is looked at, which is little beside v and needs no steps that wait for each other.
    """
    size = m.shape[-1]
    visible = jnp.tril(jnp.ones((size, size), bool))
    if index is not None:
        visible = visible & (index[..., :, None] == index[..., None, :])
    m, u = jnp.where(visible, m[..., None, :], LOWEST), jnp.where(visible, u[..., None, :], 0)
    largest = m.max(axis=-1)
    return largest, jnp.sum(jnp.exp(m - largest[..., None]) * u, axis=-1)


def _weights(s: Array, m: Array, u: Array, marks: _Marks) -> tuple[Array, Array, Array]:
    """`weights` of every chunk, and the final m and u; that m is LOWEST where nothing was seen."""
    index = None if marks.index is None else _in_chunks(marks.index)
    seen = jnp.ones_like(s) if marks.real is None else jnp.broadcast_to(_in_chunks(marks.real), s.shape)
    # Of what each position sees in its chunk, then of what entered the chunk, then both.
    m_own, u_own = _prefixes(s, seen.astype(jnp.float32), index)
    incoming = None if index is None else jnp.pad(index[:, :, :-1, -1], ((0, 0), (0, 0), (1, 0)))
    m_in, u_in = _prefixes(
        jnp.concatenate([jnp.where(u > 0, m, LOWEST)[..., None], m_own[:, :, :-1, -1]], axis=-1),
        jnp.concatenate([u[..., None], u_own[:, :, :-1, -1]], axis=-1),
        incoming,
    )
    m_in, u_in = m_in[..., None], u_in[..., None]
    if index is not None:
        entered = index == incoming[..., None]
        m_in, u_in = jnp.where(entered, m_in, LOWEST), jnp.where(entered, u_in, 0)
    m = jnp.maximum(m_own, m_in)
    of_entered = jnp.exp(m_in - m) * u_in
    u = jnp.exp(m_own - m) * u_own + of_entered
    inverse = _inverse(u)
    leave = jnp.exp(jnp.minimum(s - m[..., -1:], 0)) * inverse[..., -1:]
    documents = []
    if index is not None:
        leave = jnp.where(index == index[..., -1:], leave, 0)
        # In float32 document numbers are exact up to 2^24.
        documents = [jnp.broadcast_to(index.astype(jnp.float32), s.shape)]
    log2 = math.log2(math.e)
    rows = -log2 * m, -log2 * s, inverse, of_entered * inverse, leave, *documents
    return jnp.stack(rows, axis=3), m[:, :, -1, -1], u[:, :, -1, -1]


def _segments(v: Array) -> int:
    """Into how many segments the sequence is cut."""
    batch, length, heads, channels = v.shape
    blocks = batch * heads * (channels // TILE)
    return 1 if blocks >= MULTIPROCESSORS else segments_of(length // CHUNK, TOGETHER * MULTIPROCESSORS // blocks)


def _ends(chunks: int, segments: int) -> list[int]:
    """The number of the chunk after each segment. All segments have one length but the last, which may be shorter."""
    size = -(-chunks // segments)
    return [min(size * n, chunks) for n in range(1, segments + 1)]


def _carried(start: Array, through: Array, added: Array, reverse: bool) -> Array:
    """The state before, between and after spans, [b, h, n + 1, ...], from the one that enters the first in walking
    order: what each lets through of it and adds to it, both [b, h, n, ...].
    """

    def follow(earlier, later):
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    def beside(first, others):
        return jnp.concatenate([others, first] if reverse else [first, others], axis=2)

    items = beside(jnp.zeros_like(through[:, :, :1]), through), beside(start[:, :, None], added)
    return lax.associative_scan(follow, items, axis=2, reverse=reverse)[1]


def _entering(values: Array, weights: Array, start: Array, *, segments: int, reverse: bool = False) -> Array:
    """What enters each segment, [b, h, segments, v], from what enters the first in walking order: (3), or (4)."""
    if segments == 1:
        return start[:, :, None]
    batch, length, heads, channels = values.shape
    chunks = length // CHUNK
    write = jnp.moveaxis(weights[..., ENTER if reverse else LEAVE, :], 1, 3)[..., None]
    values = values.reshape(batch, chunks, CHUNK, heads, channels).astype(jnp.float32)
    added = jnp.moveaxis(jnp.sum(write * values, axis=2), 1, 2)
    states = _carried(start, weights[..., ENTER, -1:], added, reverse)
    ends = _ends(chunks, segments)
    return states[:, :, jnp.array(ends if reverse else [0, *ends[:-1]])]


def _of_later(z: Array, weights: Array, z_end: Array) -> tuple[Array, Array]:
    """What (6) subtracts for all after the segment of a position, [b, h, n, C], and z before the first position.

    z        [b, h, segments]: of each segment alone
    z_end    [b, h]: after the last position
    """
    batch, heads, chunks = weights.shape[:3]
    segments = z.shape[2]
    ends = _ends(chunks, segments)
    size = ends[0]
    through = jnp.pad(weights[..., ENTER, -1], ((0, 0), (0, 0), (0, segments * size - chunks)), constant_values=1)
    through = through.reshape(batch, heads, segments, size).prod(axis=3)
    z = _carried(z_end, through, z, reverse=True)
    # leave of (3), but for the end of the segment.
    segment = jnp.arange(chunks) // size
    at_end = weights[:, :, jnp.array(ends)[segment] - 1, :, -1:]
    leave = jnp.exp2(jnp.minimum(at_end[..., LATER, :] - weights[..., EARLIER, :], 0)) * at_end[..., INVERSE, :]
    if weights.shape[3] > INDEX:
        leave = jnp.where(at_end[..., INDEX, :] == weights[..., INDEX, :], leave, 0)
    return leave * z[:, :, segment + 1, None], z[:, :, 0]


class _Others(NamedTuple):
    """What (5) and (6) read beside dO.

    v         [b, t, h, v]
    entered   [b, h, n, v] float32: y of each chunk
    """

    v: Array
    entered: Array


class _Walked(NamedTuple):
    """What a walk gives.

    out       [b, t, h, v]: O, or dV
    leaving   [b, h, v] float32: y, or dy, after the last chunk in walking order
    entered   [b, h, n, v] float32: y of each chunk; None where it is not wanted
    ds        [b, h, n, C] float32: (6) and (5), with z' = 0 at the end of each segment; for gradients alone
    z         [b, h, segments] float32
    """

    out: Array
    leaving: Array
    entered: Array | None = None
    ds: Array | None = None
    z: Array | None = None


def _walk(
    values: Array, weights: Array, entering: Array, *, keep: bool = False, others: _Others | None = None
) -> _Walked:
    """(2) and (3) for v; or with `others` (4) to (6) for dO, backwards in time.

    entering   [b, h, segments, v] float32: the state that enters each segment in walking order
    keep       also give `entered`
    """
    batch, length, heads, channels = values.shape
    chunks, segments, tiles = length // CHUNK, entering.shape[2], channels // TILE
    size, dtype, reverse = -(-chunks // segments), values.dtype, others is not None
    read_row, write_row = (LEAVE, ENTER) if reverse else (ENTER, LEAVE)
    matrix, vector = partial(plgpu.SMEM, dtype=dtype, transforms=TILED), partial(plgpu.SMEM, dtype=jnp.float32)

    def kernel(inputs, outputs, scratch):
        item, segment, tile = lax.axis_index("item"), lax.axis_index("segment"), lax.axis_index("tile")
        row, head = divide(item, heads)
        channels = pl.ds(tile * TILE, TILE)
        count = jnp.minimum(size, chunks - segment * size)

        def chunk_at(i):
            return segment * size + (count - 1 - i if reverse else i)

        def part(ref, name, i):
            """Chunk i of an array in global memory."""
            if name == "weights":
                return ref.at[row, head, chunk_at(i)]
            if name == "entered":
                return ref.at[row, head, chunk_at(i), channels]
            if name == "ds":
                return ref.at[row, head, tile, chunk_at(i)]
            return ref.at[row, pl.ds(chunk_at(i) * CHUNK, CHUNK), head, channels]

        def fetch(i):
            _, slot = divide(i, STAGES)
            for name in staged:
                source = part(inputs[name], name, i)
                plgpu.copy_gmem_to_smem(source, scratch[name].at[slot], scratch["loaded"].at[slot])

        def step(i, carried):
            state, z = carried
            _, slot = divide(i, STAGES)
            values, weights = scratch["values"].at[slot], scratch["weights"].at[slot]

            def along(row, axis):
                return over(load(weights.at[row], (BY_ROW, BY_COLUMN)[axis]), axis)

            def pairs_of(reverse):
                pairs = pair_weights(weights, reverse, later=LATER, earlier=EARLIER, index=INDEX)
                return pairs * along(INVERSE, 1 if reverse else 0)

            def in_float32(ref):
                return load(ref, MATRIX).astype(jnp.float32)

            def score_products(accumulator):
                plgpu.wgmma(accumulator, values, scratch["v"].at[slot].T)
                # What needs no product is done while it is on its way, here and below.
                of_entered = (in_float32(values) * over(load(scratch["entered"].at[slot], BY_COLUMN), 1)).sum(axis=1)
                return pairs_of(False) * accumulator[...], load(weights.at[ENTER], BY_ROW) * of_entered

            def products(accumulator, *transposed):
                plgpu.wgmma(accumulator, pairs.astype(dtype), values)
                if reverse:
                    plgpu.wgmma(transposed[0], scratch["v"].at[slot], values.T)
                written = (in_float32(values) * along(write_row, 0)).sum(axis=0)
                return accumulator[...], written, *(x[...] for x in transposed)

            plgpu.barrier_wait(scratch["loaded"].at[slot])
            if reverse:
                of_pairs, of_entered = accumulate(score_products, 1)
                # r is a sum along rows, and is read along columns.
                r = of_pairs.sum(axis=1) + of_entered
                scratch["r"][...] = r
                plgpu.commit_smem()
            pairs = pairs_of(reverse)
            out, written, *transposed = accumulate(products, 2 if reverse else 1)
            out = out + along(read_row, 0) * over(state, 1)
            # What the chunk before has stored has left shared memory.
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            scratch["out"][...] = out.astype(dtype)
            through = weights[ENTER, CHUNK - 1]
            if reverse:
                of_pairs = (pairs * (transposed[0] - over(load(scratch["r"], BY_COLUMN), 1))).sum(axis=1)
                of_end = (in_float32(scratch["v"].at[slot]) * over(state, 1)).sum(axis=1) - z
                scratch["ds"][...] = of_pairs + load(weights.at[LEAVE], BY_ROW) * of_end
                z = through * z + (load(weights.at[ENTER], BY_ROW) * r).sum()
            elif keep:
                scratch["entered"][...] = state
            state = through * state + written
            plgpu.commit_smem()
            pl.when(i + STAGES < count)(lambda: fetch(i + STAGES))
            for name in stored:
                plgpu.copy_smem_to_gmem(scratch[name], part(outputs[name], name, i))
            return state, z

        for i in range(STAGES):
            pl.when(i < count)(partial(fetch, jnp.int32(i)))
        state = load(inputs["entering"].at[row, head, segment, channels], BY_COLUMN, optimized=False)
        state, z = lax.fori_loop(jnp.int32(0), count, step, (state, jnp.float32(0)))

        @pl.when(segment == (0 if reverse else segments - 1))
        def _():
            outputs["leaving"].at[row, head, channels][...] = state

        if reverse:
            outputs["z"][row, head, segment, tile] = z

        plgpu.wait_smem_to_gmem(0)

    inputs = {"values": values, "weights": weights, "entering": entering}
    staged = {"values": matrix((STAGES, CHUNK, TILE)), "weights": vector((STAGES, *weights.shape[3:]))}
    stored = {"out": matrix((CHUNK, TILE))}
    scratch = {}
    outputs = {
        "out": jax.ShapeDtypeStruct(values.shape, dtype),
        "leaving": jax.ShapeDtypeStruct((batch, heads, channels), jnp.float32),
    }
    if keep:
        stored["entered"] = vector((TILE,))
        outputs["entered"] = jax.ShapeDtypeStruct((batch, heads, chunks, channels), jnp.float32)
    if reverse:
        inputs |= {"v": others.v, "entered": others.entered}
        staged |= {"v": matrix((STAGES, CHUNK, TILE)), "entered": vector((STAGES, TILE))}
        stored["ds"] = vector((CHUNK,))
        scratch["r"] = vector((CHUNK,))
        outputs["ds"] = jax.ShapeDtypeStruct((batch, heads, tiles, chunks, CHUNK), jnp.float32)
        outputs["z"] = jax.ShapeDtypeStruct((batch, heads, segments, tiles), jnp.float32)
    scratch |= staged | stored | {"loaded": plgpu.Barrier(num_arrivals=len(staged), num_barriers=STAGES)}

    def aaren_walk(*refs):
        given, made, used = refs[: len(inputs)], refs[len(inputs) : -len(scratch)], refs[-len(scratch) :]
        kernel(dict(zip(inputs, given)), dict(zip(outputs, made)), dict(zip(scratch, used)))

    run = plgpu.kernel(
        aaren_walk,
        out_type=list(outputs.values()),
        scratch_types=list(scratch.values()),
        grid=(batch * heads, segments, tiles),
        grid_names=("item", "segment", "tile"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=replace(COMPILER_PARAMS, reduction_scratch_bytes=REDUCTION_BYTES),
    )
    results = dict(zip(outputs, late(run, list(outputs.values()))(*inputs.values())))
    if reverse:
        results |= {"ds": results["ds"].sum(axis=2), "z": results["z"].sum(axis=3)}
    return _Walked(**results)
