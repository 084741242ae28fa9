"""Linear attention on TPU with a decay for each channel of the keys: forward and backward.

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t;   o_t = scale q_t S_t                                                (1)

(gated linear attention: Yang et al. 2023, arXiv 2312.06635; HGRN2: Qin et al. 2024, arXiv 2404.07904.) In a chunk of C
positions, with b the inclusive cumulative sum of g, S the state that enters and S' the one that leaves:

    A_ij = sum_k q_ik k_jk exp(b_ik - b_jk),  j <= i                (`_channel_scores`)                            (2)
    O    = scale (A V + (Q * exp(b)) S)                                                                            (3)
    S'   = diag(exp(b_C)) S + (K * exp(b_C - b))^T V                                                               (4)

Only (4), and in it only a sum and a product with a number per channel, waits for the chunk before. So a step of the
grid holds several chunks of several heads, and their products run one after the other without a pause.

The backward pass walks the steps from the end. It keeps one state per step from the forward pass and finds those of
the chunks from it by (4). With N = scale dO, dO and dS' the cotangents of O and S':

    dA   = N V^T on j <= i         dV = A^T N + (K * exp(b_C - b)) dS'                                             (5)
    dQ   = exp(b) * (N S^T) + what comes from dA                                                                   (6)
    dK   = exp(b_C - b) * (V dS'^T) + what comes from dA                                                           (7)
    dS   = diag(exp(b_C)) dS' + (Q * exp(b))^T N                                                                   (8)
    dg_t = sum_{i >= t} (q_i * dq_i - k_i * dk_i) + sum_v (dS' * S')_v                                             (9)

Documents are masks on (2) to (4). Kernels hold states transposed, [v, k], so that a decay multiplies lanes, and take
scale into the queries.

    code     symbol   shape          dtype
    q, k     q, k     [b, t, h, k]   bfloat16 or float32
    v, o     v, o     [b, t, hv, v]  as q; head j reads q, k of head j // (hv / h)
    g        g        [b, t, hv, k]  float32, natural log, <= 0
    initial  S_0      [b, hv, k, v]  float32
    index             [b, t]         int32, number of documents that started since the beginning; or None
"""

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.once import differentiated_once
from pallas_kernels.tpu import _channel_scores, _tiles
from pallas_kernels.tpu._channel_scores import Decay, Meetings
from pallas_kernels.tpu._generations import sizes
from pallas_kernels.tpu._tiles import Grid, Marks, Specs, beside, product, product_nt, product_tn

NAME = "linear_attention with decay per channel on TPU"
WIDEST = 256
CHUNK = 128
DELAY = 4
# Bytes of VMEM that a step takes at most for one byte of an operand of it, by the size of its numbers.
VMEM = {2: 56, 4: 64}


def supports(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array | None) -> str | None:
    """Why the kernel cannot compute this, or None."""
    dtypes = {x.dtype for x in (q, k, v)}
    if len(dtypes) > 1 or not dtypes <= _tiles.DTYPES:
        return f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; expected all bfloat16 or all float32"
    if g is None or g.ndim != 4:
        return "g is not a decay per channel"
    if g.dtype != jnp.float32:
        return f"g is {g.dtype}; expected float32"
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        return f"heads have {q.shape[-1]} key and {v.shape[-1]} value channels; expected at most {WIDEST}"
    return None


def channel_decay(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    initial: jax.Array,
    index: jax.Array | None,
    *,
    scale: float,
    chunk_size: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Outputs [b, t, hv, v] in v's dtype and the final state, equation (1).

    Positions of padding come with k = 0 and g = 0. chunk_size: rounded up to 128, or to 256 at most; None is 128.
    interpret: as for `pallas_call`.
    """
    plan = _plan(q.shape, v.shape, q.dtype.itemsize, chunk_size)
    length, key_dim, value_dim = v.shape[1], q.shape[3], v.shape[3]
    # On narrow matrix units what a backward pass holds longer costs more than the wait that it saves.
    how = _How(plan, float(scale), DELAY if sizes().chunk > CHUNK else 0, interpret)
    inputs = _Inputs(
        *(_tiles.lay_out(x, plan, plan.key_dim) for x in (q, k)),
        _tiles.lay_out(v, plan, plan.value_dim),
        _tiles.lay_out(g, plan, plan.key_dim),
        None if index is None else _tiles.lay_out_index(index, plan),
    )
    o, final = _run(how, inputs, jnp.swapaxes(_tiles.lay_out_state(initial, plan), 2, 3))
    o = o.reshape(*o.shape[:2], plan.heads, plan.value_dim)
    return o[:, :length, :, :value_dim], jnp.swapaxes(final, 2, 3)[:, :, :key_dim, :value_dim]


def _plan(q_shape: tuple[int, ...], v_shape: tuple[int, ...], itemsize: int, chunk: int | None) -> Grid:
    if q_shape[2] != v_shape[2]:
        # The lanes of g, whose heads are those of v, are to divide among the steps as those of v do.
        q_shape = (*q_shape[:3], _tiles.round_up(q_shape[3], _tiles.LANES))
    # A power of two, as halves of blocks want it.
    chunk = CHUNK if chunk is None or min(chunk, q_shape[1]) <= CHUNK else 2 * CHUNK
    limits = sizes()
    step_bytes = min(limits.step_bytes, limits.memory // VMEM[itemsize])
    return _tiles.grid(q_shape, v_shape, itemsize, limits._replace(step_bytes=step_bytes), chunk)


class _How(NamedTuple):
    """backward_delay: of `_with_delay`, in the backward pass."""

    plan: Grid
    scale: float
    backward_delay: int
    interpret: Any


class _Inputs(NamedTuple):
    """As the grid reads them: see `Specs`."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array
    index: jax.Array | None

    def with_specs(self, specs: Specs) -> dict[str, tuple[jax.Array | None, pl.BlockSpec]]:
        blocks = (specs.keys(), specs.keys(), specs.values(), specs.key_decay(), specs.index())
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


# ----- a chunk ------------------------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    """What the heads of a step share in one chunk: its positions within the step, and its documents."""

    at: slice
    marks: Marks


def _chunks(refs: SimpleNamespace, plan: Grid) -> list[_Chunk]:
    return [
        _Chunk(at, _tiles.marks(None if refs.index is None else refs.index[0, :, at], plan.chunk))
        for at in plan.chunks()
    ]


def _seen(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """x [c, d] where the mask [c, 128] holds. None: everywhere."""
    return x if mask is None else x * beside(jnp.where(mask, 1.0, 0.0), x.shape[1])


class _Head(NamedTuple):
    """Of one head in one chunk.

    decay     of its channels
    pairs     how its queries meet its keys
    enter     Q * exp(b) of the positions that see the entering state
    leave     K * exp(b_C - b) of the positions that the leaving state sees
    through   exp(b_C): [1, k]
    """

    decay: Decay
    pairs: Meetings
    enter: jax.Array
    leave: jax.Array
    through: jax.Array


def _head(refs: SimpleNamespace, plan: Grid, scale: float, chunk: _Chunk, head: int) -> _Head:
    at, marks, keys = chunk.at, chunk.marks, plan.key_lanes(head)
    decay = _channel_scores.decay(refs.g[0, at, plan.decay_lanes(head)])
    queries = _channel_scores.since_start(scale * refs.q[0, at, keys].astype(jnp.float32), decay)
    keys = _channel_scores.until_end(refs.k[0, at, keys].astype(jnp.float32), decay)
    dtype = refs.v.dtype
    enter, leave = (_seen(x.blocks[-1], seen) for x, seen in ((queries, marks.first), (keys, marks.last)))
    through = decay.through[-1][:1]
    if marks.unbroken is not None:
        through = jnp.where(marks.unbroken, through, 0.0)
    pairs = _channel_scores.meetings(queries, keys, dtype)
    return _Head(decay, pairs, enter.astype(dtype), leave.astype(dtype), through)


def _with_delay(products: Iterator[Callable[[], None]], delay: int) -> None:
    """Runs `products` to its end, and each function that it yields `delay` of its steps later.

    Matrix units take products in the order they are written: one that waits for another is written after some that do
    not, of the next chunks.
    """
    waiting = []
    for finish in products:
        waiting.append(finish)
        if len(waiting) > delay:
            waiting.pop(0)()
    for finish in waiting:
        finish()


# ----- forward ------------------------------------------------------------------------------------------------------


def _forward(how: _How, inputs: _Inputs, initial: jax.Array, *, keep: bool) -> SimpleNamespace:
    """Outputs, the final state, and where they are kept the states that entered each step."""
    plan = how.plan
    specs, state = Specs(plan), (plan.value_dim, plan.key_dim)
    entered = jax.ShapeDtypeStruct((plan.rows, plan.blocks, plan.heads, *state), jnp.float32)
    return _tiles.run(
        partial(_forward_step, plan, how.scale),
        name="channel_decay_forward",
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
    _with_delay(_forward_products(plan, scale, refs), DELAY)

    @pl.when(step == plan.blocks - 1)
    def _():
        refs.final[0] = refs.S[...]


def _forward_products(plan: Grid, scale: float, refs: SimpleNamespace) -> Iterator[Callable[[], None]]:
    """Yields for each head and chunk what finishes it."""

    def finish(at: slice, values: slice, A: jax.Array, from_state: jax.Array) -> None:
        refs.o[0, at, values] = (product(A, refs.v[0, at, values]) + from_state).astype(refs.o.dtype)

    chunks, dtype = _chunks(refs, plan), refs.v.dtype
    for head in range(plan.step_heads):
        values = plan.value_lanes(head)
        S = refs.S[head]
        for chunk in chunks:
            at, marks = chunk
            x = _head(refs, plan, scale, chunk, head)
            from_state = product_nt(x.enter, S.astype(dtype))
            S = S * x.through + product_tn(refs.v[0, at, values], x.leave)
            A = jnp.where(marks.pairs, _channel_scores.scores(x.pairs), 0.0).astype(dtype)
            yield partial(finish, at, values, A, from_state)
        refs.S[head] = S


# ----- backward -----------------------------------------------------------------------------------------------------


def _backward(
    how: _How, inputs: _Inputs, entered: jax.Array, do: jax.Array, d_final: jax.Array
) -> tuple[_Inputs, jax.Array]:
    """Cotangents of the inputs and of the initial state."""
    plan = how.plan
    specs, state = Specs(plan, backwards=True), (plan.value_dim, plan.key_dim)
    # Parts of a sum are not rounded before it.
    dtype = inputs.q.dtype if plan.shares == 1 else jnp.float32
    parts = jax.ShapeDtypeStruct((*inputs.q.shape[:2], inputs.q.shape[2] * plan.shares), dtype)
    found = _tiles.run(
        partial(_backward_step, plan, how.scale, how.backward_delay),
        name="channel_decay_backward",
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
            "dg": (jax.ShapeDtypeStruct(inputs.g.shape, jnp.float32), specs.key_decay()),
            "d_initial": (jax.ShapeDtypeStruct(d_final.shape, jnp.float32), specs.state(*state)),
        },
        scratch={"dS": (plan.step_heads, *state)},
        interpret=how.interpret,
    )
    dq, dk = (_tiles.sum_shares(x, plan).astype(inputs.q.dtype) for x in (found.dq, found.dk))
    return _Inputs(dq, dk, found.dv, found.dg, None), found.d_initial


def _backward_step(plan: Grid, scale: float, delay: int, refs: SimpleNamespace) -> None:
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        refs.dS[...] = refs.d_final[0]

    _with_delay(_backward_products(plan, scale, refs), delay)

    @pl.when(step == plan.blocks - 1)
    def _():
        refs.d_initial[0] = refs.dS[...]


def _backward_products(plan: Grid, scale: float, refs: SimpleNamespace) -> Iterator[Callable[[], None]]:
    """Yields for each head and chunk what finishes it."""
    shared = {}

    def finish(
        head: int,
        at: slice,
        x: _Head,
        both: jax.Array,
        A_t: jax.Array,
        d_enter: jax.Array,
        d_leave: jax.Array,
        dv: jax.Array,
        kept: jax.Array,
    ) -> None:
        keys, values = plan.key_lanes(head), plan.value_lanes(head)
        dq, dk = _channel_scores.scores_backward(both, x.pairs, d_enter, d_leave, x.decay)
        dv += product(A_t, refs.do[0, at, values])
        refs.dv[0, at, values] = dv.astype(refs.dv.dtype)
        dq = scale * dq
        q, k = (ref[0, at, keys].astype(jnp.float32) for ref in (refs.q, refs.k))
        refs.dg[0, at, plan.decay_lanes(head)] = _channel_scores.sums_from(q * dq - k * dk, kept)
        if head % plan.sharing:
            dq, dk = shared[at.start][0] + dq, shared[at.start][1] + dk
        shared[at.start] = dq, dk
        if (head + 1) % plan.sharing == 0:
            refs.dq[0, at, keys], refs.dk[0, at, keys] = dq.astype(refs.dq.dtype), dk.astype(refs.dk.dtype)

    chunks, dtype = _chunks(refs, plan), refs.v.dtype
    for head in range(plan.step_heads):
        values = plan.value_lanes(head)
        of_chunks = [_head(refs, plan, scale, chunk, head) for chunk in chunks]
        states = [refs.entered[0, 0, head]]
        for (at, _), x in zip(chunks, of_chunks):
            states.append(states[-1] * x.through + product_tn(refs.v[0, at, values], x.leave))
        dS = refs.dS[head]
        for (at, marks), x in zip(chunks[::-1], of_chunks[::-1]):
            v, do = refs.v[0, at, values], refs.do[0, at, values]
            S_after, S_before, dS_after = states.pop(), states[-1].astype(dtype), dS.astype(dtype)
            both = jnp.where(marks.pairs, product_nt(do, v), jnp.where(marks.pairs_t, product_nt(v, do), 0.0))
            d_enter = _seen(product(do, S_before), marks.first)
            d_leave = _seen(product(v, dS_after), marks.last)
            dv = product_nt(x.leave, dS_after)
            kept = jnp.sum(dS * S_after, axis=0, keepdims=True)
            dS = dS * x.through + product_tn(do, x.enter)
            A_t = jnp.where(marks.pairs_t, _channel_scores.scores(x.pairs, transposed=True), 0.0).astype(dtype)
            yield partial(finish, head, at, x, both, A_t, d_enter, d_leave, dv, kept)
        refs.dS[head] = dS
