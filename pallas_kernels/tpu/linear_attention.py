"""Linear attention on TPU, without decay or with one for each head and step: forward and backward.

    S_t = exp(g_t) S_{t-1} + k_t^T v_t;   o_t = scale q_t S_t                                                      (1)

(Katharopoulos et al. 2020, arXiv 2006.16236; with decay Sun et al. 2023, 2307.08621, Qin et al. 2024, 2401.04658, and
Dao, Gu 2024, 2405.21060, whose heads share keys and queries.) In a chunk of C positions, with b the inclusive
cumulative sum of g, S the state that enters and S' the one that leaves:

    A_ij = (q_i k_j) exp(b_i - b_j),  j <= i                                                                       (2)
    O    = scale (A V + exp(b) * (Q S))                                                                            (3)
    S'   = exp(b_C) S + K^T (exp(b_C - b) * V)                                                                     (4)

Only (4), and in it only a sum and a product with a number, waits for the chunk before. So a step of the grid holds
several chunks of several heads, and their products run one after the other without a pause.

The backward pass walks the steps from the end. It keeps one state per step from the forward pass and finds those of
the chunks from it by (4). With N = scale dO, dO and dS' the cotangents of O and S', and D_ij = exp(b_i - b_j), j <= i:

    A^T  = (K Q^T) * D^T        dA^T = (V N^T) * D^T                                                               (5)
    dQ   = dA K + exp(b) * (N S^T)                                                                                 (6)
    dK   = dA^T Q + exp(b_C - b) * (V dS'^T)                                                                       (7)
    dV   = A^T N + exp(b_C - b) * (K dS')                                                                          (8)
    dS   = exp(b_C) dS' + Q^T (exp(b) * N)                                                                         (9)
    dg_t = sum_{i >= t} (q_i dq_i - k_i dk^A_i) + sum_{j < t} k_j dk^S_j + exp(b_C) <dS', S>                     (10)

where dk^A and dk^S are the two terms of (7). Every exponent is <= 0 where it is used. Documents are masks on (2) to
(4). (10) sums what crosses position t; sum_{i >= t} (q_i dq_i - k_i dk_i) + <dS', S'> is shorter and the same, but it
takes away what lies behind t from much larger sums, whose products were rounded in different places.

    code     symbol   shape          dtype
    q, k     q, k     [b, t, h, k]   bfloat16 or float32
    v, o     v, o     [b, t, hv, v]  as q; head j reads q, k of head j // (hv / h)
    g        g        [b, t, hv]     float32, natural log, <= 0; or None
    initial  S_0      [b, hv, k, v]  float32
    index             [b, t]         int32, number of documents that started since the beginning; or None
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
from pallas_kernels.tpu._tiles import Grid, Marks, Specs, beside, product, product_nt, product_tn

NAME = "linear_attention on TPU"
WIDEST = 256


def supports(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array | None) -> str | None:
    """Why the kernel cannot compute this, or None."""
    dtypes = {x.dtype for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= _tiles.DTYPES:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected all bfloat16 or all float32"
    if g is not None and g.ndim == 4:
        return "g is a decay per channel; expected one per head or none"
    if g is not None and g.dtype != jnp.float32:
        return f"g is {g.dtype}; expected float32"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"heads have {q.shape[-1]} key and {v.shape[-1]} value channels; expected at most {WIDEST}"
    return None


def linear_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array | None,
    initial: jax.Array,
    index: jax.Array | None,
    *,
    scale: float,
    chunk_size: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Outputs [b, t, hv, v] in v's dtype and the final state, equation (1).

    Positions of padding come with k = 0 and g = 0. chunk_size: rounded up to a multiple of 128; None is the choice for
    the generation. interpret: as for `pallas_call`.
    """
    plan = _tiles.grid(q.shape, v.shape, q.dtype.itemsize, sizes(), chunk_size)
    length, value_dim = v.shape[1], v.shape[3]
    how = _How(plan, float(scale), interpret)
    inputs = _Inputs(
        *(_tiles.lay_out(x, plan, plan.key_dim) for x in (q, k)),
        _tiles.lay_out(v, plan, plan.value_dim),
        None if g is None else _tiles.lay_out_decay(g, plan),
        None if index is None else _tiles.lay_out_index(index, plan),
    )
    o, final = _run(how, inputs, _tiles.lay_out_state(initial, plan))
    o = o.reshape(*o.shape[:2], plan.heads, plan.value_dim)
    return o[:, :length, :, :value_dim], final[:, :, : q.shape[3], :value_dim]


class _How(NamedTuple):
    plan: Grid
    scale: float
    interpret: Any


class _Inputs(NamedTuple):
    """As the grid reads them: see `Specs`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array | None
    index: jax.Array | None

    def with_specs(self, specs: Specs) -> dict[str, tuple[jax.Array | None, pl.BlockSpec]]:
        blocks = (specs.keys(), specs.keys(), specs.values(), specs.decay(), specs.index())
        return dict(zip(self._fields, zip(self, blocks)))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(how: _How, inputs: _Inputs, initial: jax.Array) -> tuple[jax.Array, jax.Array]:
    found = _forward(how, inputs, initial, keep=False)
    return found.o, found.final


def _run_forward(how: _How, inputs: _Inputs, initial: jax.Array) -> tuple[tuple, tuple]:
    def forward(inputs: _Inputs, initial: jax.Array) -> tuple[jax.Array, ...]:
        found = _forward(how, inputs, initial, keep=True)
        return found.o, found.final, found.entered

    *outputs, entered = differentiated_once(NAME, forward)(inputs, initial)
    return tuple(outputs), (inputs, entered)


def _run_backward(how: _How, residuals: tuple, cotangents: tuple) -> tuple:
    return differentiated_once(NAME, partial(_backward, how))(*residuals, *cotangents)


_run.defvjp(_run_forward, _run_backward)


# ----- weights of a chunk -------------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    """A chunk of a step, for all its heads.

    at     its positions within the step
    units  the chunk and each of its heads: which of the step's rows and columns of sums are theirs
    """

    at: slice
    units: range
    marks: Marks


class _Weights(NamedTuple):
    """Of one head in one chunk; None is 1.

    row, column   b as [1, c] and as [c, 128]; None without decay
    enter, leave  [c, 128]: of the entering state in a position, of a position in the leaving state
    through       [1, 1]: of the entering state in the leaving one
    """

    row: jax.Array | None
    column: jax.Array | None
    enter: jax.Array | None
    leave: jax.Array | None
    through: jax.Array | None


def _weights(sums: tuple[jax.Array, jax.Array] | None, chunk: _Chunk, head: int) -> _Weights:
    """sums: of g to each position of its chunk, all units of the step as rows [units, c] and columns [c, units]."""
    marks = chunk.marks
    if sums is None:
        to_number = [None if x is None else jnp.where(x, 1.0, 0.0) for x in marks[2:]]
        return _Weights(None, None, *to_number)
    (rows, columns), unit = sums, chunk.units[head]
    row = rows[unit : unit + 1]
    size = row.shape[1]
    column = jnp.broadcast_to(columns[:, unit : unit + 1], (size, _tiles.LANES))
    end = row[:, size - 1 :]
    enter, leave, through = jnp.exp(column), jnp.exp(end - column), jnp.exp(end)
    if marks.first is not None:
        enter, leave = jnp.where(marks.first, enter, 0.0), jnp.where(marks.last, leave, 0.0)
        through = jnp.where(marks.unbroken, through, 0.0)
    return _Weights(row, column, enter, leave, through)


def _pair_decay(w: _Weights, marks: Marks, *, transposed: bool) -> jax.Array:
    """D, or D^T."""
    pairs = marks.pairs_t if transposed else marks.pairs
    if w.row is None:
        return jnp.where(pairs, 1.0, 0.0)
    column = beside(w.column, w.row.shape[1])
    return jnp.where(pairs, jnp.exp(w.row - column if transposed else column - w.row), 0.0)


def _times(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """x [c, d] in float32, position by position times the weight; or a state times a number."""
    x = x.astype(jnp.float32)
    if weight is None:
        return x
    return x * (weight if weight.shape == (1, 1) else beside(weight, x.shape[1]))


def _chunks(refs: SimpleNamespace, plan: Grid) -> list[_Chunk]:
    chunks = []
    for n, at in enumerate(plan.chunks()):
        marks = _tiles.marks(None if refs.index is None else refs.index[0, :, at], plan.chunk)
        chunks.append(_Chunk(at, range(n * plan.step_heads, (n + 1) * plan.step_heads), marks))
    return chunks


def _sums(refs: SimpleNamespace, plan: Grid, chunks: list[_Chunk]) -> tuple[jax.Array, jax.Array] | None:
    """As `_weights` takes them: one product for all units, whose cost does not depend on how many there are."""
    if refs.g is None:
        return None
    g = jnp.concatenate([refs.g[0, 0, :, chunk.at] for chunk in chunks], axis=0)
    return _tiles.sums_to(g, _tiles.triangle(plan.chunk))


# ----- forward ------------------------------------------------------------------------------------------------------


def _forward(how: _How, inputs: _Inputs, initial: jax.Array, *, keep: bool) -> SimpleNamespace:
    """Outputs, the final state, and where they are kept the states that entered each step."""
    plan = how.plan
    specs, state = Specs(plan), (plan.key_dim, plan.value_dim)
    entered = jax.ShapeDtypeStruct((plan.rows, plan.blocks, plan.heads, *state), jnp.float32)
    return _tiles.run(
        partial(_forward_step, plan, how.scale),
        name="linear_attention_forward",
        plan=plan,
        inputs={**inputs.with_specs(specs), "initial": (initial, specs.state(*state))},
        outputs={
            "o": (jax.ShapeDtypeStruct(inputs.v.shape, inputs.v.dtype), specs.values()),
            "final": (jax.ShapeDtypeStruct(initial.shape, jnp.float32), specs.state(*state)),
            "entered": (entered, specs.entered(*state)) if keep else None,
        },
        scratch={"S": (plan.step_heads, *state)},
        interpret=how.interpret,
    )


def _forward_step(plan: Grid, scale: float, refs: SimpleNamespace) -> None:
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        refs.S[...] = refs.initial[0]

    if refs.entered is not None:
        refs.entered[0, 0] = refs.S[...]
    chunks = _chunks(refs, plan)
    sums = _sums(refs, plan, chunks)
    for head in range(plan.step_heads):
        keys, values = plan.key_lanes(head), plan.value_lanes(head)
        S = refs.S[head]
        for chunk in chunks:
            at, w = chunk.at, _weights(sums, chunk, head)
            q, k, v = refs.q[0, at, keys], refs.k[0, at, keys], refs.v[0, at, values]
            A = product_nt(q, k) * _pair_decay(w, chunk.marks, transposed=False)
            o = product(A.astype(v.dtype), v) + _times(product(q, S.astype(q.dtype)), w.enter)
            refs.o[0, at, values] = (scale * o).astype(refs.o.dtype)
            S = _times(S, w.through) + product_tn(k, _times(v, w.leave).astype(v.dtype))
        refs.S[head] = S

    @pl.when(step == plan.blocks - 1)
    def _():
        refs.final[0] = refs.S[...]


# ----- backward -----------------------------------------------------------------------------------------------------


def _backward(
    how: _How, inputs: _Inputs, entered: jax.Array, do: jax.Array, d_final: jax.Array
) -> tuple[_Inputs, jax.Array]:
    """Cotangents of the inputs and of the initial state."""
    plan = how.plan
    specs, state = Specs(plan, backwards=True), (plan.key_dim, plan.value_dim)
    # Parts of a sum are not rounded before it.
    dtype = inputs.q.dtype if plan.shares == 1 else jnp.float32
    parts = jax.ShapeDtypeStruct((*inputs.q.shape[:2], inputs.q.shape[2] * plan.shares), dtype)
    found = _tiles.run(
        partial(_backward_step, plan, how.scale),
        name="linear_attention_backward",
        plan=plan,
        inputs={
            **inputs.with_specs(specs),
            "entered": (entered, specs.entered(*state)),
            "do": (do, specs.values()),
            "d_final": (d_final, specs.state(*state)),
        },
        outputs={
            "dq": (parts, specs.key_gradients()),
            "dk": (parts, specs.key_gradients()),
            "dv": (jax.ShapeDtypeStruct(inputs.v.shape, inputs.v.dtype), specs.values()),
            "dg": None if inputs.g is None else (jax.ShapeDtypeStruct(inputs.g.shape, jnp.float32), specs.decay()),
            "d_initial": (jax.ShapeDtypeStruct(d_final.shape, jnp.float32), specs.state(*state)),
        },
        scratch={"dS": (plan.step_heads, *state)},
        interpret=how.interpret,
    )
    dq, dk = (_tiles.sum_shares(x, plan).astype(inputs.q.dtype) for x in (found.dq, found.dk))
    return _Inputs(dq, dk, found.dv, found.dg, None), found.d_initial


def _backward_step(plan: Grid, scale: float, refs: SimpleNamespace) -> None:
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        refs.dS[...] = refs.d_final[0]

    chunks = _chunks(refs, plan)
    sums = _sums(refs, plan, chunks)
    from_here = up_to_here = None
    shared = {}
    for head in range(plan.step_heads):
        keys, values = plan.key_lanes(head), plan.value_lanes(head)
        weights = [_weights(sums, chunk, head) for chunk in chunks]
        states = [refs.entered[0, 0, head]]
        for chunk, w in zip(chunks, weights):
            k, v = refs.k[0, chunk.at, keys], refs.v[0, chunk.at, values]
            states.append(_times(states[-1], w.through) + product_tn(k, _times(v, w.leave).astype(v.dtype)))
        dS = refs.dS[head]
        for n, (chunk, w) in reversed(list(enumerate(zip(chunks, weights)))):
            at = chunk.at
            q, k = refs.q[0, at, keys], refs.k[0, at, keys]
            v, do = refs.v[0, at, values], refs.do[0, at, values]
            D = _pair_decay(w, chunk.marks, transposed=True)
            A = (product_nt(k, q) * D).astype(v.dtype)
            dA = (product_nt(v, do) * D).astype(v.dtype)
            S_before, dS_after = states[n].astype(v.dtype), dS.astype(v.dtype)
            # Products within the chunk first: in another order more values wait in VMEM, and a step is a tenth longer.
            dk, dv = scale * product(dA, q), scale * product(A, do)
            dq = scale * (product_tn(dA, k) + _times(product_nt(do, S_before), w.enter))
            dk_out = _times(product_nt(v, dS_after), w.leave)
            dv += _times(product(k, dS_after), w.leave)
            refs.dv[0, at, values] = dv.astype(refs.dv.dtype)
            if refs.g is not None:
                entering, leaving = _decay_terms(q, dq, k, dk, dk_out, _times(dS, w.through) * states[n])
                from_here = _tiles.put_column(from_here, chunk.units[head], entering)
                up_to_here = _tiles.put_column(up_to_here, chunk.units[head], leaving)
            dk += dk_out
            if head % plan.sharing:
                dq, dk = shared[n][0] + dq, shared[n][1] + dk
            shared[n] = dq, dk
            if (head + 1) % plan.sharing == 0:
                refs.dq[0, at, keys], refs.dk[0, at, keys] = dq.astype(refs.dq.dtype), dk.astype(refs.dk.dtype)
            dS = _times(dS, w.through) + product_tn(q, (scale * _times(do, w.enter)).astype(do.dtype))
        refs.dS[head] = dS
    if refs.g is not None:
        ones = _tiles.triangle(plan.chunk)
        entering, leaving = (jnp.transpose(x)[: len(chunks) * plan.step_heads] for x in (from_here, up_to_here))
        dg = _tiles.sums_from(entering, ones) + _tiles.sums_to(leaving, ones)[0] - leaving
        for chunk in chunks:
            refs.dg[0, 0, :, chunk.at] = dg[chunk.units.start : chunk.units.stop]

    @pl.when(step == plan.blocks - 1)
    def _():
        refs.d_initial[0] = refs.dS[...]


def _decay_terms(
    q: jax.Array, dq: jax.Array, k: jax.Array, dk: jax.Array, dk_out: jax.Array, through: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What (10) sums from t on, and up to t, as [c, 1]. dk, dk_out: dk^A and dk^S. through: exp(b_C) dS' * S."""
    q, k = q.astype(jnp.float32), k.astype(jnp.float32)
    from_here = jnp.sum(q * dq - k * dk, axis=1, keepdims=True)
    total = jnp.sum(jnp.sum(through, axis=0, keepdims=True), axis=1, keepdims=True)
    position = jax.lax.broadcasted_iota(jnp.int32, from_here.shape, 0)
    # The end is in every sum.
    from_here += jnp.where(position == from_here.shape[0] - 1, total, 0.0)
    return from_here, jnp.sum(k * dk_out, axis=1, keepdims=True)
