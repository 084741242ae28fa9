"""Aaren on TPU, the softmax attention of one learned query over every prefix: forward and backward.

    s_t = q k_t;   o_t = sum_{j <= t} exp(s_j) v_j / sum_{j <= t} exp(s_j)                                         (1)

(Feng et al. 2024, arXiv 2405.13956.) In a chunk of C positions, with (m_0, u_0, w_0) the state that enters, m the
largest score so far and u, w the sums in (1) relative to exp(m):

    m_i  = max(m_0, max_{j <= i} s_j)                                                                              (2)
    P_ij = exp(s_j - m_i),  j <= i          p_i = exp(m_0 - m_i)                                                   (3)
    u    = P 1 + p u_0          W = P V + p w_0          O = W / u                                                 (4)

and the last row of (m, u, W) leaves. The products P V wait for nothing; of the state only maxima and sums of numbers
wait for the chunk before. The sums over lanes that give m and u come back in all lanes, beside every channel.

The backward pass walks the chunks from the end. m is a unit of measure that no output depends on, and is held fixed.
With dw, du the cotangents of the sums that leave the chunk, and e_j = exp(s_j - m_C):

    N    = dO / u               r_i = -(sum_j P_ij (N_i v_j) + p_i N_i w_0) / u_i  =  -N_i o_i                     (5)
    dV   = P^T N + e dw         ds_j = sum_i P_ij (N_i v_j + r_i) + e_j (v_j dw + du)                              (6)
    dw_0 = p^T N + p_C dw       du_0 = p^T r + p_C du                                                              (7)
    dk_j = ds_j q               dq = sum_j ds_j k_j                                                                (8)

(the linear-time gradient of the paper, a chunk at a time). The state that entered each chunk is kept from the forward
pass. What reads the numbers of the final state depends on its m too: see `_backward`.

No exponent is positive. What a position does not see has the score LOWEST, and m starts at NOTHING above it: the
difference is an exponent whose power is 0, and never that of two infinities.

    code     symbol   shape          dtype
    k        k        [b, t, h, k]   bfloat16 or float32
    v, o     v, o     [b, t, h, v]   as k
    query    q        [h, k]         float32, the scale included
    m, u     m, u     [b, h]         float32; u is 0 where nothing was seen, and then m and w are 0
    w        w        [b, h, v]      float32
    index             [b, t]         int32, number of documents that started since the beginning; or None
    real              [b, t]         bool, False at padding; or None
"""

from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.once import differentiated_once
from pallas_kernels.tpu import _tiles
from pallas_kernels.tpu._generations import sizes
from pallas_kernels.tpu._tiles import LANES, Grid, Marks, Specs, beside, product, product_nt, product_tn

NAME = "aaren on TPU"
# Below all scores: the score of what a position does not see, and the largest score of those who see nothing.
LOWEST = -3e38
NOTHING = -1.5e38


def supports(k: jax.Array, v: jax.Array) -> str | None:
    """Why the kernel cannot compute this, or None."""
    return _tiles.declined(k=k, v=v)


def aaren(
    k: jax.Array,
    v: jax.Array,
    query: jax.Array,
    m: jax.Array,
    u: jax.Array,
    w: jax.Array,
    index: jax.Array | None,
    real: jax.Array | None,
    *,
    scale: float,
    chunk_size: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    """Outputs [b, t, h, v] in v's dtype, without meaning at padding, and the final (m, u, w), equation (1).

    chunk_size: rounded up to a multiple of 128; None is the choice for the generation. interpret: as for `pallas_call`.
    """
    plan = _tiles.grid(k.shape, v.shape, k.dtype.itemsize, sizes(), chunk_size)
    length, value_dim = v.shape[1], v.shape[3]
    how = _How(plan, length, interpret)
    query = scale * query.astype(jnp.float32)
    inputs = _Inputs(
        _tiles.lay_out(k, plan, plan.key_dim),
        _tiles.lay_out(v, plan, plan.value_dim),
        jnp.pad(query, ((0, 0), (0, plan.key_dim - query.shape[1])))[:, None],
        None if index is None else _tiles.lay_out_index(index, plan),
        None if real is None else _tiles.lay_out_index(real.astype(jnp.int32), plan._replace(chunk=plan.positions)),
    )
    w = jnp.pad(w, ((0, 0), (0, 0), (0, plan.value_dim - value_dim)))
    o, m, u, w = _run(how, inputs, m, u, w[:, :, None])
    o = o.reshape(*o.shape[:2], plan.heads, plan.value_dim)
    return o[:, :length, :, :value_dim], (m, u, w[:, :, 0, :value_dim])


class _How(NamedTuple):
    plan: Grid
    length: int
    interpret: Any


class _Inputs(NamedTuple):
    """As the grid reads them: see `Specs`. query [h, 1, k]; real [b, 1, t] int32."""

    k: jax.Array
    v: jax.Array
    query: jax.Array
    index: jax.Array | None
    real: jax.Array | None

    def with_specs(self, specs: Specs) -> dict[str, tuple[jax.Array | None, pl.BlockSpec]]:
        plan = specs.plan
        query = pl.BlockSpec((plan.step_heads, 1, plan.key_dim), lambda b, h, t: (h, 0, 0))
        side_by_side = _side_by_side(self.query, plan)
        return {
            "k": (self.k, specs.keys()),
            "v": (self.v, specs.values()),
            "query": (self.query, query),
            "queries": (side_by_side, pl.BlockSpec((1, *side_by_side.shape[1:]), lambda b, h, t: (h, 0, 0))),
            "index": (self.index, specs.index()),
            "real": (self.real, specs.index()),
        }


def _side_by_side(query: jax.Array, plan: Grid) -> jax.Array:
    """[h, 1, k] -> [blocks of heads, heads, heads * k], for one product with all keys of a step."""
    blocks = (
        query.reshape(-1, plan.step_heads, 1, plan.key_dim) * jnp.eye(plan.step_heads, dtype=jnp.float32)[:, :, None]
    )
    return blocks.reshape(*blocks.shape[:2], -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(how: _How, inputs: _Inputs, m: jax.Array, u: jax.Array, w: jax.Array) -> tuple[jax.Array, ...]:
    return _outputs(_forward(how, inputs, m, u, w, keep=False))


def _outputs(found: SimpleNamespace) -> tuple[jax.Array, ...]:
    m, u = found.m_final[:, :, 0, 0], found.u_final[:, :, 0, 0]
    return found.o, jnp.where(u > 0, m, 0), u, found.w_final


def _run_forward(how: _How, inputs: _Inputs, m: jax.Array, u: jax.Array, w: jax.Array) -> tuple[tuple, tuple]:
    def forward(inputs: _Inputs, m: jax.Array, u: jax.Array, w: jax.Array) -> tuple[tuple, tuple]:
        found = _forward(how, inputs, m, u, w, keep=True)
        return _outputs(found), (found.m_entered, found.u_entered, found.w_entered)

    outputs, entered = differentiated_once(NAME, forward)(inputs, m, u, w)
    return outputs, (inputs, (m, u, w), outputs[1:], entered)


def _run_backward(how: _How, residuals: tuple, cotangents: tuple) -> tuple:
    return differentiated_once(NAME, partial(_backward, how))(*residuals, cotangents)


_run.defvjp(_run_forward, _run_backward)


def _lanes(x: jax.Array) -> jax.Array:
    """[b, h] -> [b, h, 1, 128]."""
    return jnp.broadcast_to(x[..., None, None], (*x.shape, 1, LANES))


# ----- weights of a chunk -------------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    """What the heads of a step share in one chunk.

    at      its positions within the step
    scores  [h, c], LOWEST at padding
    last    [1, c] bool: of the document that the leaving state belongs to. None: all are
    """

    at: slice
    marks: Marks
    scores: jax.Array
    last: jax.Array | None


class _State(NamedTuple):
    """(m, u, w) of one head, or the cotangents: m, u [1, 128], w [1, v]. m is NOTHING where u is 0."""

    m: jax.Array
    u: jax.Array
    w: jax.Array


class _Weights(NamedTuple):
    """Of one head in one chunk: P [c, c]; p, m and u [c, 128]."""

    P: jax.Array
    p: jax.Array
    m: jax.Array
    u: jax.Array


def _chunks(refs: SimpleNamespace, how: _How, block: jax.Array) -> list[_Chunk]:
    """block: which one of the row."""
    plan = how.plan
    queries = refs.queries[0]
    queries = queries if refs.k.dtype == jnp.float32 else _tiles.in_parts(queries)
    chunks = []
    for at in plan.chunks():
        scores = _scores(queries, refs.k[0, at])
        if plan.positions != how.length:
            position = block * plan.block + at.start + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            scores = jnp.where(position < how.length, scores, LOWEST)
        if refs.real is not None:
            scores = jnp.where(refs.real[0, :, at] > 0, scores, LOWEST)
        index = None if refs.index is None else refs.index[0, :, at]
        last = None if index is None else index == index[:, plan.chunk - 1 :]
        chunks.append(_Chunk(at, _tiles.marks(index, plan.chunk), scores, last))
    return chunks


def _scores(queries: jax.Array, k: jax.Array) -> jax.Array:
    """[h, c], equation (1)."""
    s = product_nt(queries, k)
    if queries.dtype == jnp.float32:
        return s
    h = s.shape[0] // 3
    return s[:h] + s[h : 2 * h] + s[2 * h :]


def _weights(chunk: _Chunk, head: int, state: _State) -> _Weights:
    """state: the one that enters."""
    first = chunk.marks.first
    seen = jnp.where(chunk.marks.pairs, chunk.scores[head : head + 1], LOWEST)
    size = seen.shape[0]
    m_before = state.m if first is None else jnp.where(first, state.m, NOTHING)
    m = jnp.maximum(jnp.broadcast_to(jnp.max(seen, axis=1, keepdims=True), (size, LANES)), m_before)
    p = jnp.exp(state.m - m)
    p = p if first is None else jnp.where(first, p, 0.0)
    P = jnp.exp(seen - beside(m, size))
    return _Weights(P, p, m, jnp.sum(P, axis=1, keepdims=True) + p * state.u)


def _inverse(u: jax.Array) -> jax.Array:
    """1 / u; u is at least 1 where anything was seen."""
    return 1 / jnp.maximum(u, 0.5)


# ----- forward ------------------------------------------------------------------------------------------------------


def _forward(how: _How, inputs: _Inputs, m: jax.Array, u: jax.Array, w: jax.Array, *, keep: bool) -> SimpleNamespace:
    """Outputs, the final state, and where they are kept the states that entered each chunk."""
    plan, specs = how.plan, Specs(how.plan)
    initial = {"m": _lanes(jnp.where(u > 0, m, NOTHING)), "u": _lanes(u), "w": w}
    widths = {name: x.shape[3] for name, x in initial.items()}
    entered = (plan.rows, plan.blocks, plan.heads, len(plan.chunks()))
    return _tiles.run(
        partial(_forward_step, how),
        name="aaren_forward",
        plan=plan,
        inputs={
            **inputs.with_specs(specs),
            **{f"{name}_initial": (x, specs.state(1, widths[name])) for name, x in initial.items()},
        },
        outputs={
            "o": (jax.ShapeDtypeStruct(inputs.v.shape, inputs.v.dtype), specs.values()),
            **{f"{name}_final": (_float32(*x.shape), specs.state(*x.shape[2:])) for name, x in initial.items()},
            **{
                f"{name}_entered": (_float32(*entered, width), specs.entered(entered[3], width)) if keep else None
                for name, width in widths.items()
            },
        },
        scratch={name: (plan.step_heads, 1, width) for name, width in widths.items()},
        interpret=how.interpret,
    )


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _forward_step(how: _How, refs: SimpleNamespace) -> None:
    plan, step = how.plan, pl.program_id(2)

    @pl.when(step == 0)
    def _():
        refs.m[...], refs.u[...], refs.w[...] = refs.m_initial[0], refs.u_initial[0], refs.w_initial[0]

    chunks = _chunks(refs, how, step)
    for head in range(plan.step_heads):
        values = plan.value_lanes(head)
        state = _State(refs.m[head], refs.u[head], refs.w[head])
        for n, chunk in enumerate(chunks):
            if refs.m_entered is not None:
                for entered, x in zip((refs.m_entered, refs.u_entered, refs.w_entered), state):
                    entered[0, 0, head, n : n + 1] = x
            v = refs.v[0, chunk.at, values]
            x = _weights(chunk, head, state)
            W = product(x.P.astype(v.dtype), v) + beside(x.p, v.shape[1]) * state.w
            refs.o[0, chunk.at, values] = (W * beside(_inverse(x.u), v.shape[1])).astype(refs.o.dtype)
            state = _State(*(y[plan.chunk - 1 :] for y in (x.m, x.u, W)))
        refs.m[head], refs.u[head], refs.w[head] = state

    @pl.when(step == plan.blocks - 1)
    def _():
        refs.m_final[0], refs.u_final[0], refs.w_final[0] = refs.m[...], refs.u[...], refs.w[...]


# ----- backward -----------------------------------------------------------------------------------------------------


def _backward(
    how: _How, inputs: _Inputs, initial: tuple, final: tuple, entered: tuple, cotangents: tuple
) -> tuple[_Inputs, jax.Array, jax.Array, jax.Array]:
    """Cotangents of the inputs and of the initial state.

    Who reads the numbers of the final state may depend on its m, which is the largest of all scores: that score, or
    the incoming m where it is the largest, gets what (5) to (8) leave of its cotangent, `rest`.
    """
    plan, specs = how.plan, Specs(how.plan, backwards=True)
    (_, u_0, w_0), (m, u, w), (do, dm, du, dw) = initial, final, cotangents
    rest = dm - u * du - jnp.sum(w * dw, axis=(2, 3))
    number, key, value = (specs.state(1, width) for width in (LANES, plan.key_dim, plan.value_dim))
    numbers = _float32(plan.rows, plan.heads, 1, LANES)
    found = _tiles.run(
        partial(_backward_step, how),
        name="aaren_backward",
        plan=plan,
        inputs={
            **inputs.with_specs(specs),
            **{f"{name}_entered": (x, specs.entered(*x.shape[3:])) for name, x in zip("muw", entered)},
            "do": (do, specs.values()),
            "m_final": (_lanes(m), number),
            "rest_final": (_lanes(rest), number),
            "du_final": (_lanes(du), number),
            "dw_final": (dw, value),
        },
        outputs={
            "dk": (jax.ShapeDtypeStruct(inputs.k.shape, inputs.k.dtype), specs.keys()),
            "dv": (jax.ShapeDtypeStruct(inputs.v.shape, inputs.v.dtype), specs.values()),
            "dq": (_float32(plan.rows, plan.heads, 1, plan.key_dim), key),
            "rest_initial": (numbers, number),
            "du_initial": (numbers, number),
            "dw_initial": (_float32(*dw.shape), value),
        },
        scratch={
            "rest": (plan.step_heads, 1, LANES),
            "du": (plan.step_heads, 1, LANES),
            "dw": (plan.step_heads, 1, plan.value_dim),
            "sum_dq": (plan.step_heads, 1, plan.key_dim),
        },
        interpret=how.interpret,
    )
    rest, du = found.rest_initial[:, :, 0, 0], found.du_initial[:, :, 0, 0]
    dm = u_0 * du + jnp.sum(w_0 * found.dw_initial, axis=(2, 3)) + jnp.where(u_0 > 0, rest, 0)
    return _Inputs(found.dk, found.dv, found.dq.sum(axis=0), None, None), dm, du, found.dw_initial


def _backward_step(how: _How, refs: SimpleNamespace) -> None:
    plan, step = how.plan, pl.program_id(2)
    heads = range(plan.step_heads)

    @pl.when(step == 0)
    def _():
        refs.rest[...], refs.du[...], refs.dw[...] = refs.rest_final[0], refs.du_final[0], refs.dw_final[0]
        refs.sum_dq[...] = jnp.zeros_like(refs.sum_dq)

    ends = [_End(refs.rest[head], refs.du[head], refs.dw[head]) for head in heads]
    waiting = None
    for n, chunk in reversed(list(enumerate(_chunks(refs, how, plan.blocks - 1 - step)))):
        ds, ends = _values_backward(refs, plan, n, chunk, ends)
        # The keys of a chunk come after the values of the one before it: independent work overlaps.
        if waiting is not None:
            _keys_backward(refs, plan, *waiting)
        waiting = chunk.at, ds
    _keys_backward(refs, plan, *waiting)
    for head in heads:
        refs.rest[head], refs.du[head], refs.dw[head] = ends[head]

    @pl.when(step == plan.blocks - 1)
    def _():
        refs.rest_initial[0], refs.du_initial[0], refs.dw_initial[0] = refs.rest[...], refs.du[...], refs.dw[...]
        refs.dq[0] = refs.sum_dq[...]


class _End(NamedTuple):
    """Cotangents of the sums of one head that leave a chunk: du [1, 128], dw [1, v]; and the rest of that of m."""

    rest: jax.Array
    du: jax.Array
    dw: jax.Array


class _Products(NamedTuple):
    """Of one head in one chunk.

    N       [c, v], rounded            inverse  1 / u [c, 128]
    NV      N V^T [c, c]               end_V    dw V^T [1, c]
    """

    state: _State
    weights: _Weights
    inverse: jax.Array
    N: jax.Array
    NV: jax.Array
    end_V: jax.Array
    e: jax.Array


def _values_backward(
    refs: SimpleNamespace, plan: Grid, n: int, chunk: _Chunk, ends: list[_End]
) -> tuple[jax.Array, list[_End]]:
    """Writes dV of a chunk; ds [h, c], and the cotangents of what entered it. Equations (5) to (7)."""
    products = [_products(refs, plan, n, chunk, head, end) for head, end in enumerate(ends)]
    e = jnp.transpose(jnp.concatenate([x.e for x in products], axis=0))
    # All products of the chunk come before what waits for them.
    ds, entered = [], []
    for head, (end, x) in enumerate(zip(ends, products)):
        values = plan.value_lanes(head)
        P, p, N = x.weights.P, x.weights.p, x.N.astype(jnp.float32)
        dv = product_tn(P.astype(x.N.dtype), x.N) + beside(_column(e, head), plan.value_dim) * end.dw
        refs.dv[0, chunk.at, values] = dv.astype(refs.dv.dtype)
        pN = beside(p, plan.value_dim) * N
        r = -x.inverse * _sums_over_lanes(P * x.NV, pN * x.state.w)
        of_chunk = _sum_over_positions(P * (x.NV + beside(r, plan.chunk)))
        of_largest, rest = _of_largest(chunk, head, refs.m_final[0, head], end.rest)
        ds.append(of_chunk + x.e * (x.end_V + beside(end.du, plan.chunk)) + of_largest)
        through = p[plan.chunk - 1 :]
        du = _sum_over_positions(p * r) + through * end.du
        dw = _sum_over_positions(pN) + beside(through, plan.value_dim) * end.dw
        entered.append(_End(rest, du, dw))
    return jnp.concatenate(ds, axis=0), entered


def _products(refs: SimpleNamespace, plan: Grid, n: int, chunk: _Chunk, head: int, end: _End) -> _Products:
    size, values = plan.chunk, plan.value_lanes(head)
    v, do = refs.v[0, chunk.at, values], refs.do[0, chunk.at, values]
    state = _State(*(x[0, 0, head, n : n + 1] for x in (refs.m_entered, refs.u_entered, refs.w_entered)))
    weights = _weights(chunk, head, state)
    inverse = _inverse(weights.u)
    N = (do.astype(jnp.float32) * beside(inverse, plan.value_dim)).astype(v.dtype)
    # dw beside the rows of N, as rows that add up to it: one product with V serves both.
    NV = product_nt(jnp.concatenate([N, _padded_parts(end.dw, v.dtype)], axis=0), v)
    e = jnp.exp(chunk.scores[head : head + 1] - beside(weights.m[size - 1 :], size))
    e = e if chunk.last is None else jnp.where(chunk.last, e, 0.0)
    return _Products(state, weights, inverse, N, NV[:size], _sum_over_positions(NV[size:]), e)


def _padded_parts(row: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of `dtype` whose sum is row [1, v], as many as a register holds."""
    parts, full = (row, 8) if dtype == jnp.float32 else (_tiles.in_parts(row), 16)
    return jnp.concatenate([parts, jnp.zeros((full - parts.shape[0], parts.shape[1]), dtype)], axis=0)


def _keys_backward(refs: SimpleNamespace, plan: Grid, at: slice, ds: jax.Array) -> None:
    """Writes dK of a chunk and adds to dq, equation (8)."""
    columns = jnp.transpose(ds)
    for head in range(plan.step_heads):
        keys = plan.key_lanes(head)
        column = beside(_column(columns, head), plan.key_dim)
        refs.dk[0, at, keys] = (column * refs.query[head]).astype(refs.dk.dtype)
        refs.sum_dq[head] += _sum_over_positions(column * refs.k[0, at, keys].astype(jnp.float32))


def _column(columns: jax.Array, n: int) -> jax.Array:
    """The n-th of columns [c, n] as [c, 128]."""
    return jnp.broadcast_to(columns[:, n : n + 1], (columns.shape[0], LANES))


def _sum_over_positions(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=0, keepdims=True)


def _sums_over_lanes(*terms: jax.Array) -> jax.Array:
    """[c, 1]: the sum of all terms [c, d]; of those of one width together, for lanes are slow to sum over."""
    by_width = {}
    for x in terms:
        for at in range(0, x.shape[1], LANES):
            part = x[:, at : at + LANES]
            by_width[part.shape[1]] = by_width[part.shape[1]] + part if part.shape[1] in by_width else part
    return sum(jnp.sum(x, axis=1, keepdims=True) for x in by_width.values())


def _of_largest(chunk: _Chunk, head: int, m: jax.Array, rest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the last of the largest scores gets, [1, c], and what is left of it for those before the chunk."""
    scores = chunk.scores[head : head + 1]
    is_largest = scores == beside(m, scores.shape[1])
    if chunk.last is not None:
        is_largest = is_largest & chunk.last
    lane = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    place = jnp.max(jnp.where(is_largest, lane, -1), axis=1, keepdims=True)
    of_largest = jnp.where(lane == place, beside(rest, scores.shape[1]), 0.0)
    rest = jnp.where(place >= 0, 0.0, rest)
    return of_largest, rest if chunk.marks.unbroken is None else jnp.where(chunk.marks.unbroken, rest, 0.0)
