"""The delta rule on TPU, without decay, with one for each head and step, or per channel: forward and backward.

    S~_t = diag(exp(g_t)) S_{t-1};   S_t = S~_t + beta_t k_t^T (v_t - k_t S~_t);   o_t = scale q_t S_t             (1)

(DeltaNet, Yang et al. 2024, arXiv 2406.06484; with decay Gated DeltaNet, Yang, Kautz, Hatamizadeh 2024, 2412.06464;
with a decay per channel KDA, Kimi Team 2025, 2510.26692.) In a chunk of C positions, with b the inclusive cumulative
sum of g, D_ij = exp(b_i - b_j), S the state that enters and S' the one that leaves:

    N_ij = beta_i (k_i k_j) D_ij,  j < i         T = (I + N)^-1                                                    (2)
    E    = V - exp(b) * (K S)                    Y = T (beta * E)                                                  (3)
    A_ij = (q_i k_j) D_ij,  j <= i               O = scale (A Y + exp(b) * (Q S))                                  (4)
    S'   = exp(b_C) S + K^T (exp(b_C - b) * Y)                                                                     (5)

Three products, two of (3) and that of (5), wait for one another and for the chunk before; those of several heads are
written between them. E is what the state would get wrong: it is rounded after the subtraction, not before.

The backward pass walks the steps from the end. It keeps one state per step from the forward pass and finds those of
the chunks from it by (3) and (5). With N = scale dO, dO and dS' the cotangents of O and S':

    dY  = A^T N + exp(b_C - b) * (K dS')         dR = T^T dY          dV = beta * dR                               (6)
    dA  = (N Y^T) * D,  j <= i                   H  = -(dR Y^T) * D,  j < i                                        (7)
    dQ  = dA K + exp(b) * (N S^T)                                                                                  (8)
    F   = H K - exp(b) * (dR S^T)                                                                                  (9)
    W   = dA^T Q + H^T (beta * K) + exp(b_C - b) * (Y dS'^T)                                                      (10)
    dK  = W + beta * F                           dbeta_t = v_t dR_t + k_t F_t                                     (11)
    dS  = exp(b_C) dS' + Q^T (exp(b) * N) - K^T (exp(b) * beta * dR)                                              (12)
    dg_t = sum_{i >= t} (q_i dQ_i + beta_i k_i F_i - k_i W_i) + <dS', S'>                                         (13)

What the last term of W adds to the sum of (13) over all the chunk is in <dS', S'> too. Where decay is strong the two
would cancel, so that both leave it out, and its positions before t are added instead.

Decay per channel does not factor out of (2) and (4). There `_channel_scores` finds N, from the rows beta * K against K,
and A; exp(b) and exp(b_C - b) are then factors of rows of K and Q before the products, not after; and (13) holds
channel by channel, with products and <dS', S'> not summed over the channels of keys.

Every exponent is <= 0 where it is used, but for those within 8 positions in `_channel_scores`. Documents are masks on
(2) to (5).

A unit is a head in a chunk. The inverses of two units share their products (see `_triangular_inverse`), where those of
every second unit are upper triangular: such a unit is flipped, it has the transposes of N, T, A, D, dA and H.

    code     symbol   shape          dtype
    q, k     q, k     [b, t, h, k]   bfloat16 or float32
    v, o     v, o     [b, t, hv, v]  as q; head j reads q, k of head j // (hv / h)
    beta     beta     [b, t, hv]     float32, in [0, 2]
    g        g        [b, t, hv]     float32, natural log, <= 0; or [b, t, hv, k]; or None
    initial  S_0      [b, hv, k, v]  float32
    index             [b, t]         int32, number of documents that started since the beginning; or None
"""

from collections.abc import Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import _channel_scores, _matrix_state, _tiles
from pallas_kernels.tpu._channel_scores import Decay, Meetings
from pallas_kernels.tpu._generations import sizes
from pallas_kernels.tpu._matrix_state import KeyGradients, Operator
from pallas_kernels.tpu._scalar_decay import DecayGradient, Weights, pair_decay, sums, times, weights
from pallas_kernels.tpu._tiles import Chunk, Grid, beside, chunks, product, product_nt, product_tn
from pallas_kernels.tpu._triangular_inverse import inverses

# Bytes of one operand that a step reads. Longer ones are up to a tenth faster, and take twice as long to compile.
STEP_BYTES = 1 << 19
# What a step of the backward pass takes of VMEM, in bytes of one operand: without and with decay per channel.
VMEM, CHANNEL_VMEM = 60, 100


def supports(q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, g: jax.Array | None) -> str | None:
    """Why the kernel cannot compute this, or None."""
    if not jnp.issubdtype(beta.dtype, jnp.floating):
        return f"beta is {beta.dtype}; expected a floating-point type"
    return _tiles.declined(g, q=q, k=k, v=v)


def delta_rule(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    beta: jax.Array,
    g: jax.Array | None,
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
    by_channel = g is not None and g.ndim == 4
    limits, chunk = sizes(), _tiles.power_of_two(chunk_size, q.shape[1])
    limits = limits.at_most(min(STEP_BYTES, limits.memory // (CHANNEL_VMEM if by_channel else VMEM)))
    plan = _tiles.grid(q.shape, v.shape, q.dtype.itemsize, limits, chunk, by_channel=by_channel)
    arrays = {"q": q, "k": k, "v": v, "beta": beta.astype(jnp.float32), "g": g, "index": index}
    return _matrix_state.run(OPERATOR, plan, arrays, initial, scale=scale, interpret=interpret)


# ----- units --------------------------------------------------------------------------------------------------------


class _Unit(NamedTuple):
    """A head in a chunk.

    number         among all units of the step
    flipped        its square matrices are transposes
    keys, values   its lanes
    weights        of positions; with decay per channel those without decay
    beta           [c, 128], the same in all lanes
    """

    number: int
    head: int
    chunk: Chunk
    flipped: bool
    keys: slice
    values: slice
    weights: Weights
    beta: jax.Array

    def pairs(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a b^T, or its transpose b a^T."""
        return product_nt(b, a) if self.flipped else product_nt(a, b)

    def apply(self, matrix: jax.Array, x: jax.Array) -> jax.Array:
        return (product_tn if self.flipped else product)(matrix, x)

    def apply_transposed(self, matrix: jax.Array, x: jax.Array) -> jax.Array:
        return (product if self.flipped else product_tn)(matrix, x)

    def decay(self) -> jax.Array:
        """D, 0 where one position does not see the other."""
        return pair_decay(self.weights, self.chunk.marks, transposed=self.flipped)


def _by_channel(refs: SimpleNamespace) -> bool:
    return refs.g is not None and len(refs.g.shape) == 3


def _units(refs: SimpleNamespace, plan: Grid) -> list[list[_Unit]]:
    """Of each chunk, its heads."""
    of_step = chunks(refs, plan)
    b = None if _by_channel(refs) else sums(refs, plan, of_step)
    columns = _columns(jnp.concatenate([refs.beta[0, 0, :, chunk.at] for chunk in of_step], axis=0))
    found = []
    for chunk in of_step:
        units = []
        for head in range(plan.step_heads):
            number = chunk.units[head]
            beta = jnp.broadcast_to(columns[:, number : number + 1], (plan.chunk, _tiles.LANES))
            lanes = plan.key_lanes(head), plan.value_lanes(head)
            w = weights(b, chunk, head)
            units.append(_Unit(number, head, chunk, number % 2 == 1, *lanes, w, beta))
        found.append(units)
    return found


def _columns(rows: jax.Array) -> jax.Array:
    """[n, c] -> [c, 128], n <= 128."""
    zeros = jnp.zeros((_tiles.LANES - rows.shape[0], rows.shape[1]), rows.dtype)
    return jnp.transpose(jnp.concatenate([rows, zeros], axis=0))


def _strict(size: int) -> tuple[jax.Array, jax.Array]:
    """[c, c] bool: below the diagonal, above it."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return row > column, row < column


def _in_turns(tasks: Iterable[Iterator[None]]) -> None:
    """Runs tasks, each until it waits for a product, then the next one.

    The compiler keeps products about in the order in which they are written. While one task waits for its product,
    those of the others run.
    """
    tasks = list(tasks)
    while tasks:
        tasks = [task for task in tasks if next(task, tasks) is None]


# ----- keys and queries within a chunk ------------------------------------------------------------------------------


class _Scores(NamedTuple):
    """Of a unit. Rows are as products take them.

    N, A           [c, c], float32 and as products take it
    q_in, k_in     rows that read the state: of queries, and of what is corrected
    k_out          rows that write it
    erase          [c, 128]: weight of what k_in reads; None is 1
    through        of the entering state in the leaving one: [1, 1] or [k, 128]; None is 1
    """

    N: jax.Array
    A: jax.Array
    q_in: jax.Array
    k_in: jax.Array
    k_out: jax.Array
    erase: jax.Array | None
    through: jax.Array | None


def _scores(refs: SimpleNamespace, unit: _Unit) -> _Scores:
    """Equations (2) and (4)."""
    at, w = unit.chunk.at, unit.weights
    q, k = refs.q[0, at, unit.keys], refs.k[0, at, unit.keys]
    beta = beside(unit.beta, unit.beta.shape[0])
    if unit.flipped:
        beta = refs.beta[0, 0, unit.head : unit.head + 1, at]
    D = unit.decay()
    N, A = unit.pairs(k, k) * D * beta, unit.pairs(q, k) * D
    erase = unit.beta if w.enter is None else unit.beta * w.enter
    return _Scores(N, A.astype(q.dtype), q, k, k, erase, w.through)


class _Channels(NamedTuple):
    """Of a unit with decay per channel: the decay, queries and beta K against keys, rows that read and write states."""

    decay: Decay
    queries: Meetings
    corrections: Meetings
    q_in: jax.Array
    k_in: jax.Array
    k_out: jax.Array


def _channels(refs: SimpleNamespace, plan: Grid, unit: _Unit) -> _Channels:
    at, dtype = unit.chunk.at, refs.k.dtype
    decay = _channel_scores.decay(refs.g[0, at, plan.decay_lanes(unit.head)])
    q, k = (ref[0, at, unit.keys].astype(jnp.float32) for ref in (refs.q, refs.k))
    queries = _channel_scores.since_start(q, decay)
    corrections = _channel_scores.since_start(times(k, unit.beta), decay)
    keys = _channel_scores.until_end(k, decay)
    q_in, k_in, k_out = (x.blocks[-1].astype(dtype) for x in (queries, corrections, keys))
    queries, corrections = (_channel_scores.meetings(x, keys, dtype) for x in (queries, corrections))
    return _Channels(decay, queries, corrections, q_in, k_in, k_out)


def _channel_scores_of(refs: SimpleNamespace, plan: Grid, unit: _Unit) -> _Scores:
    """As `_scores`: beta is in the rows that correct, the decay in all rows."""
    x, marks, w = _channels(refs, plan, unit), unit.chunk.marks, unit.weights
    pairs = marks.pairs_t if unit.flipped else marks.pairs
    N, A = (
        jnp.where(pairs, _channel_scores.scores(m, transposed=unit.flipped), 0.0) for m in (x.corrections, x.queries)
    )
    through = jnp.broadcast_to(x.decay.through[-1][:1], (_tiles.LANES, x.k_in.shape[1]))
    through = times(jnp.transpose(through), w.through)
    return _Scores(N, A.astype(x.k_in.dtype), x.q_in, x.k_in, x.k_out, w.enter, through)


def _correct(
    refs: SimpleNamespace, plan: Grid, pair: Sequence[_Unit], found: dict[int, tuple[_Scores, jax.Array]]
) -> Iterator[None]:
    """Equation (2) for one or two units: puts scores and T of each under its number."""
    of_pair = []
    for unit in pair:
        of_pair.append(_channel_scores_of(refs, plan, unit) if _by_channel(refs) else _scores(refs, unit))
        yield
    matrix = of_pair[0].N
    if len(pair) == 2:
        matrix = jnp.where(_strict(plan.chunk)[0], matrix, of_pair[1].N)
    of_both = yield from inverses(matrix, passes=6 if refs.k.dtype == jnp.float32 else 3)
    for unit, scores, inverse in zip(pair, of_pair, of_both):
        found[unit.number] = scores, inverse.astype(refs.k.dtype)


# ----- forward ------------------------------------------------------------------------------------------------------


def _forward_step(plan: Grid, scale: float, refs: SimpleNamespace) -> None:
    states = [refs.S[head] for head in range(plan.step_heads)]
    _walk(refs, plan, _units(refs, plan), states, scale, outputs=True)
    for head, S in enumerate(states):
        refs.S[head] = S


class _Found(NamedTuple):
    """Of a unit. T and Y as products take them, S and S' in float32."""

    scores: _Scores
    T: jax.Array
    S: jax.Array
    Y: jax.Array
    S_after: jax.Array


def _walk(
    refs: SimpleNamespace,
    plan: Grid,
    of_step: Sequence[Sequence[_Unit]],
    states: list[jax.Array],
    scale: float,
    *,
    outputs: bool,
) -> dict[int, _Found]:
    """Equations (2), (3) and (5) through the chunks of a step, and (4) for `outputs`. It replaces the heads' states."""
    dtype = refs.v.dtype
    corrected, found = {}, {}

    def advance(unit: _Unit) -> Iterator[None]:
        at, values, w, (x, T) = unit.chunk.at, unit.values, unit.weights, corrected[unit.number]
        S = states[unit.head]
        # Of keys and queries together: S is loaded into the matrix units once.
        read = product(jnp.concatenate([x.k_in, x.q_in], axis=0) if outputs else x.k_in, S.astype(dtype))
        R = times(refs.v[0, at, values], unit.beta) - times(read[: plan.chunk], x.erase)
        yield
        Y = unit.apply(T, R.astype(dtype))
        yield
        S_after = times(S, x.through) + product_tn(x.k_out, times(Y, w.leave).astype(dtype))
        found[unit.number], states[unit.head] = _Found(x, T, S, Y.astype(dtype), S_after), S_after
        if outputs:
            o = scale * (times(read[plan.chunk :], w.enter) + unit.apply(x.A, Y.astype(dtype)))
            refs.o[0, at, values] = o.astype(dtype)

    units = [unit for heads in of_step for unit in heads]
    _in_turns(_correct(refs, plan, units[n : n + 2], corrected) for n in range(0, len(units), 2))
    for heads in of_step:
        _in_turns(advance(unit) for unit in heads)
    return found


# ----- backward -----------------------------------------------------------------------------------------------------


def _backward_step(plan: Grid, scale: float, refs: SimpleNamespace) -> None:
    dtype = refs.v.dtype
    of_step = _units(refs, plan)
    states = [refs.entered[0, 0, head] for head in range(plan.step_heads)]
    found = _walk(refs, plan, of_step, states, scale, outputs=False)
    cotangents = [refs.dS[head] for head in range(plan.step_heads)]
    key_gradients, decay_gradient = KeyGradients(plan, refs), DecayGradient()
    dbeta = None

    def differentiate(unit: _Unit) -> Iterator[None]:
        nonlocal dbeta
        at, keys, values, w = unit.chunk.at, unit.keys, unit.values, unit.weights
        q, k, v, do = refs.q[0, at, keys], refs.k[0, at, keys], refs.v[0, at, values], refs.do[0, at, values]
        (x, T, S, Y, S_after), dS = found[unit.number], cotangents[unit.head]
        S_before, dS_after = S.astype(dtype), dS.astype(dtype)
        dA = _pairs_cotangent(refs, unit, do, Y, scale=scale)
        dY = times(product(x.k_out, dS_after), w.leave)
        yield
        dY += scale * unit.apply_transposed(x.A, do)
        yield
        dR = unit.apply_transposed(T, dY.astype(dtype))
        d_queries = scale * times(product_nt(do, S_before), w.enter)
        yield
        refs.dv[0, at, values] = times(dR, unit.beta).astype(dtype)
        dS_before = product_tn(x.q_in, (scale * times(do, w.enter)).astype(dtype))
        dS_before -= product_tn(x.k_in, times(dR, x.erase).astype(dtype))
        cotangents[unit.head] = times(dS, x.through) + dS_before
        dR_ = dR.astype(dtype)
        H = _pairs_cotangent(refs, unit, dR_, Y, scale=-1.0, strict=True)
        yield
        d_corrections = -times(product_nt(dR_, S_before), w.enter)
        d_keys = times(product_nt(Y, dS_after), w.leave)
        dq, dx, dk = _rows_cotangents(refs, plan, unit, (dA, H), (d_queries, d_corrections, d_keys))
        yield
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        dbeta = _tiles.put_column(dbeta, unit.number, _sum(v.astype(jnp.float32) * dR) + _sum(k * dx))
        corrections = times(dx, unit.beta)
        if _by_channel(refs):
            through = jnp.sum(jnp.transpose(dS * S_after), axis=0, keepdims=True)
            dg = _channel_scores.sums_from(q * dq + k * (corrections - dk), through)
            refs.dg[0, at, plan.decay_lanes(unit.head)] = dg
        elif refs.g is not None:
            from_here, up_to_here = _sum(q * dq + k * (corrections - dk + d_keys)), _sum(k * d_keys)
            decay_gradient.put(unit.number, from_here, up_to_here, times(dS, x.through) * S)
        key_gradients.add(unit.head, at, dq, dk + corrections)

    for units in reversed(of_step):
        _in_turns(differentiate(unit) for unit in units)
    for head, dS in enumerate(cotangents):
        refs.dS[head] = dS
    of_chunks = [units[0].chunk for units in of_step]
    rows = jnp.transpose(dbeta)
    for chunk in of_chunks:
        refs.dbeta[0, 0, :, chunk.at] = rows[chunk.units.start : chunk.units.stop]
    if refs.g is not None and not _by_channel(refs):
        decay_gradient.write(refs, plan, of_chunks)


def _pairs_cotangent(
    refs: SimpleNamespace, unit: _Unit, a: jax.Array, b: jax.Array, *, scale: float, strict: bool = False
) -> jax.Array:
    """scale a_i b_j for the pairs that see each other, as `_rows_cotangents` takes it. strict: j < i."""
    size = a.shape[0]
    if _by_channel(refs):
        earlier, later = unit.chunk.marks.pairs, unit.chunk.marks.pairs_t
        if strict:
            earlier, later = (x & y for x, y in zip((earlier, later), _strict(size)))
        return scale * jnp.where(earlier, product_nt(a, b), jnp.where(later, product_nt(b, a), 0.0))
    pairs = scale * unit.pairs(a, b) * unit.decay()
    if strict:
        pairs = jnp.where(_strict(size)[1 if unit.flipped else 0], pairs, 0.0)
    return pairs.astype(a.dtype)


def _rows_cotangents(
    refs: SimpleNamespace,
    plan: Grid,
    unit: _Unit,
    pairs: tuple[jax.Array, jax.Array],
    outside: tuple[jax.Array, jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of Q, of K as what is corrected (F) and of K as what writes (W): equations (8) to (10).

    pairs    dA and H
    outside  what is not of the pairs: cotangents through the states
    """
    dA, H = pairs
    dq, dx, dk = outside
    if _by_channel(refs):
        x = _channels(refs, plan, unit)
        dq, dk = _channel_scores.scores_backward(dA, x.queries, dq, dk, x.decay)
        dx, more = _channel_scores.scores_backward(H, x.corrections, dx, jnp.zeros_like(dk), x.decay)
        return dq, dx, dk + more
    q, k = (ref[0, unit.chunk.at, unit.keys] for ref in (refs.q, refs.k))
    dq += unit.apply(dA, k)
    dx += unit.apply(H, k)
    dk += unit.apply_transposed(dA, q) + unit.apply_transposed(H, times(k, unit.beta).astype(k.dtype))
    return dq, dx, dk


def _sum(x: jax.Array) -> jax.Array:
    """[c, d] -> [c, 1]."""
    return jnp.sum(x, axis=1, keepdims=True)


OPERATOR = Operator("delta_rule", _forward_step, _backward_step)
