"""The linear neural memory on TPU, with momentum and forgetting: forward and backward.

    u_t = 2 lambda k_t^T (k_t R - v_t)          S_t = eta_t S_{t-1} - theta_t u_t
    W_t = (1 - alpha_t) W_{t-1} + S_t           o_t = q_t W_t                                                      (1)

(Titans: Behrouz, Zhong, Mirrokni 2024, arXiv 2501.00663), R the weights at the start of a mini-batch of C tokens. With
W, S what a mini-batch starts from, and t, j its tokens:

    M_tj = prod_{j < s <= t} eta_s              G_tj = (1 - alpha_t) G_{t-1,j} + M_tj,  j <= t                     (2)
    m_t  = prod_{s <= t} eta_s                  f_t  = (1 - alpha_t) f_{t-1} + m_t                                 (3)
    b_t  = prod_{s <= t} (1 - alpha_s)          Gamma_tj = G_tj theta_j,  gamma = Gamma_C     mu_j = M_Cj theta_j  (4)
    D    = 2 lambda (K W - V)                   A = (Q K^T) * Gamma                                                (5)
    O    = b * (Q W) + f * (Q S) - A D                                                                             (6)
    W'   = b_C W + f_C S - (gamma * K)^T D      S' = m_C S - (mu * K)^T D                                          (7)

(2) to (4) are sums and products of numbers in [0, 1], which no gate makes inaccurate. XLA works them out, and their
gradients: C numbers per token and head, where a token has the width of a head. Only (5) and (7), without the queries,
wait for the mini-batch before: the kernel takes the heads of a step in turn, and (5), (6) in tiles of 128 tokens.

The backward pass walks the steps from the end. It keeps the W, S that entered each step, finds those of its
mini-batches by (5) and (7), and, with N, dW', dS' the cotangents of O, W', S', and P = -(N D^T) * Gamma:

    dD   = -(A^T N + gamma * (K dW') + mu * (K dS'))        E = 2 lambda dD        dV = -E                         (8)
    dQ   = b * (N W^T) + f * (N S^T) + P K                                                                         (9)
    dK   = P^T Q + E W^T - gamma * (D dW'^T) - mu * (D dS'^T)                                                     (10)
    dW   = Q^T (b * N) + K^T E + b_C dW'                    dS = Q^T (f * N) + f_C dW' + m_C dS'                  (11)
    db_t = q_t (N W^T)_t                                    df_t = q_t (N S^T)_t                                  (12)
    dGamma = -(N D^T) * (Q K^T)                                                                                   (13)
    dgamma_j = -k_j (D dW'^T)_j                             dmu_j = -k_j (D dS'^T)_j                              (14)
    db_C = <dW', W>          df_C = <dW', S>                dm_C = <dS', S>                                       (15)

A row may hold several documents, laid out so that each begins with a mini-batch. A position without a token has
alpha = 0, eta = 1, theta = 0, and adds no M_tj, m_t in (2), (3): it leaves W and S as they are. A mini-batch before one
that begins a document leaves W_f, S_f in place of (7): backward, dW', dS' are theirs, and 0 for (8) to (15).

    code            symbol     shape          dtype
    q, k            q, k       [b, t, h, k]   bfloat16 or float32
    v, o            v, o       [b, t, h, v]   as q
    theta           theta      [b, t, h]      float32
    alpha           alpha      [b, t, h]      float32, or None for 0
    eta             eta        [b, t, h]      float32, or None: no momentum
    weights         W          [b, h, k, v]   float32
    momentum        S          [b, h, k, v]   float32; None without eta
    loss_scale      lambda
    token                      [b, t]         bool, whether there is one at a position; None: everywhere
    fresh.starts               [b, t / C]     bool, whether a mini-batch begins a document
    fresh.weights   W_f        [h, k, v]      float32
    fresh.momentum  S_f        [h, k, v]      float32; None without eta
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.once import differentiated_once
from pallas_kernels.tpu import _tiles
from pallas_kernels.tpu._generations import sizes
from pallas_kernels.tpu._tiles import LANES, Grid, Specs, beside, product, product_nt, product_tn

NAME = "neural_memory on TPU"
MINI_BATCHES = (16, 32, 64, 128)


class Fresh(NamedTuple):
    """Where documents begin, and the memory that they begin with."""

    starts: jax.Array
    weights: jax.Array
    momentum: jax.Array | None


def supports(q: jax.Array, k: jax.Array, v: jax.Array, mini_batch: int) -> str | None:
    """Why the kernel cannot compute this, or None."""
    if mini_batch not in MINI_BATCHES:
        return f"mini_batch={mini_batch}; expected one of {MINI_BATCHES}"
    return _tiles.declined(q=q, k=k, v=v)


def neural_memory(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    theta: jax.Array,
    alpha: jax.Array | None,
    eta: jax.Array | None,
    weights: jax.Array,
    momentum: jax.Array | None,
    *,
    mini_batch: int,
    loss_scale: float,
    token: jax.Array | None = None,
    fresh: Fresh | None = None,
    chunk_size: int | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Outputs [b, t, h, v] in v's dtype, the final weights and momentum, equation (1).

    t is a multiple of mini_batch. The first mini-batch starts from weights and momentum, whether or not it begins a
    document. Outputs where there is no token mean nothing, and their cotangents are to be zero. chunk_size: tokens
    between states that are kept for the backward pass, rounded up to a multiple of 128; None is 128. interpret: as for
    `pallas_call`.
    """
    length, value_dim = v.shape[1], v.shape[3]
    plan = _grid(q, v, mini_batch, chunk_size or LANES, fresh is not None)
    how = _How(plan, mini_batch, 2 * loss_scale, interpret)
    pairs, rows = _coefficients(theta, alpha, eta, token, mini_batch)
    inputs = _Inputs(
        *(_tiles.lay_out(x, plan, channels) for x, channels in ((q, plan.key_dim), (k, plan.key_dim))),
        _tiles.lay_out(v, plan, plan.value_dim),
        _pad_time(pairs, plan),
        _lay_out_rows(rows, plan),
        None if fresh is None else _lay_out_marks(token, fresh.starts, mini_batch, plan),
    )
    start = _Memory(weights, momentum)
    if fresh is not None:
        fresh = _Memory(*jax.tree.map(lambda x: jnp.broadcast_to(x, (plan.rows, *x.shape)), fresh[1:]))
    start, fresh = jax.tree.map(lambda x: _tiles.lay_out_state(x, plan), (start, fresh))
    o, final = _run(how, inputs, start, fresh)
    o = o.reshape(*o.shape[:2], plan.heads, plan.value_dim)[:, :length, :, :value_dim]
    return o, *jax.tree.map(lambda x: x[:, :, : q.shape[3], :value_dim], final)


def _grid(q: jax.Array, v: jax.Array, mini_batch: int, chunk_size: int, has_fresh: bool) -> Grid:
    """Steps of `chunk_size` tokens of several heads; the chunks within are tiles of 128."""
    limits = sizes()
    plan = _tiles.grid(q.shape, v.shape, q.dtype.itemsize, limits, LANES)
    block = min(_tiles.round_up(chunk_size, LANES), _tiles.round_up(q.shape[1], LANES))
    # What the backward pass has in VMEM: the states of every mini-batch, twice those that come and go, and blocks.
    state = 4 * plan.key_dim * plan.value_dim
    states = 2 * block // mini_batch + (22 if has_fresh else 14)
    of_head = state * states + 20 * block * (plan.key_dim + plan.value_dim) * q.dtype.itemsize
    most = max(1, plan.memory // of_head)
    dims = plan.key_dim, plan.value_dim
    heads = min(plan.step_heads, most)
    heads = _tiles.step_heads(plan.rows, plan.heads, plan.heads, *dims, heads, cores=limits.cores) or plan.step_heads
    return plan._replace(block=block, positions=_tiles.round_up(q.shape[1], block), step_heads=heads)


class _How(NamedTuple):
    """factor: 2 lambda."""

    plan: Grid
    mini_batch: int
    factor: float
    interpret: Any

    def mini_batches(self) -> list[slice]:
        """The positions of each within a tile."""
        return [slice(at, at + self.mini_batch) for at in range(0, LANES, self.mini_batch)]


# ----- coefficients -------------------------------------------------------------------------------------------------

KINDS = ("b", "f", "m", "mu")
NEUTRAL = {"b": 1.0, "f": 0.0, "m": 1.0, "mu": 0.0}


def _coefficients(
    theta: jax.Array, alpha: jax.Array | None, eta: jax.Array | None, token: jax.Array | None, size: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Gamma [b, h, c, t] with j before t, and the numbers [b, h, t] of equations (2) to (4) that are needed."""
    token = None if token is None else token[:, None]

    def where_token(x: jax.Array | None, empty: float) -> jax.Array | None:
        return x if x is None or token is None else jnp.where(token, x, empty)

    theta, alpha, eta = (None if x is None else jnp.swapaxes(x, 1, 2) for x in (theta, alpha, eta))
    theta, alpha, eta = where_token(theta, 0), where_token(alpha, 0), where_token(eta, 1)
    place = jnp.arange(theta.shape[2]) % size
    written = jnp.where(jnp.arange(size)[:, None] == place, theta[:, :, None], 0)
    keep = jnp.ones_like(theta) if alpha is None else 1 - alpha
    b = _products(keep, place, size)
    if eta is None:
        return _decayed_sums(keep, written, place, size), {"b": b}
    m = _products(eta, place, size)
    f = _decayed_sums(keep, where_token(m, 0)[:, :, None], place, size)[:, :, 0]
    # From the end, of the gates of the tokens after.
    mu = theta * jnp.flip(_products(jnp.flip(_of_next(eta, place), axis=2), place, size), axis=2)
    written = _decayed_sums(eta, written, place, size)
    written = written if token is None else jnp.where(token[:, :, None], written, 0)
    return _decayed_sums(keep, written, place, size), {"b": b, "f": f, "m": m, "mu": mu}


def _of_next(x: jax.Array, place: jax.Array) -> jax.Array:
    """x_{t + 1}, or 1 where that is in another mini-batch."""
    return jnp.flip(_shifted(jnp.flip(x, axis=2), 1, place, 1), axis=2)


def _decayed_sums(decay: jax.Array, x: jax.Array, place: jax.Array, size: int) -> jax.Array:
    """y_t = decay_t y_{t-1} + x_t within each mini-batch: decay [b, h, t], x [b, h, c, t]; by doubling of spans."""
    decay, stride = decay[:, :, None], 1
    while stride < size:
        x = x + decay * _shifted(x, stride, place, 0)
        decay = decay * _shifted(decay, stride, place, 1)
        stride *= 2
    return x


def _products(x: jax.Array, place: jax.Array, size: int) -> jax.Array:
    """prod_{s <= t} x_s within each mini-batch."""
    stride = 1
    while stride < size:
        x = x * _shifted(x, stride, place, 1)
        stride *= 2
    return x


def _shifted(x: jax.Array, stride: int, place: jax.Array, empty: float) -> jax.Array:
    """x_{t - stride}, or `empty` where that is in another mini-batch."""
    widths = [(0, 0)] * (x.ndim - 1) + [(stride, 0)]
    return jnp.where(place >= stride, jnp.pad(x, widths)[..., : x.shape[-1]], empty)


def _pad_time(x: jax.Array, plan: Grid, value: float = 0.0) -> jax.Array:
    widths = [(0, 0)] * (x.ndim - 1) + [(0, plan.positions - x.shape[-1])]
    return jnp.pad(x, widths, constant_values=value)


def _lay_out_rows(rows: dict[str, jax.Array], plan: Grid) -> jax.Array:
    """-> [b, blocks of heads, kinds * heads of a step, positions]; what follows the last token changes no state."""
    x = jnp.stack([_pad_time(rows[name], plan, NEUTRAL[name]) for name in KINDS if name in rows], axis=1)
    x = x.reshape(plan.rows, -1, plan.heads // plan.step_heads, plan.step_heads, plan.positions)
    return jnp.swapaxes(x, 1, 2).reshape(plan.rows, plan.heads // plan.step_heads, -1, plan.positions)


def _lay_out_marks(token: jax.Array | None, starts: jax.Array, size: int, plan: Grid) -> jax.Array:
    """-> [b, 3, positions] float32: whether a position's mini-batch ends a document, whether it begins one; token."""
    later = starts[:, 1:]
    ends, starts = (jnp.repeat(jnp.pad(later, ((0, 0), side)), size, axis=1) for side in ((0, 1), (1, 0)))
    token = jnp.ones_like(ends) if token is None else token
    return _pad_time(jnp.stack([ends, starts, token], axis=1).astype(jnp.float32), plan)


class _Memory(NamedTuple):
    """W and S [b, h, k, v], as laid out, or their cotangents; S is None without momentum."""

    W: jax.Array
    S: jax.Array | None

    def with_spec(self, spec: pl.BlockSpec, name: str) -> dict[str, tuple[jax.Array | None, pl.BlockSpec]]:
        return {name.format(state): (x, spec) for state, x in self._asdict().items()}


_NO_MEMORY = _Memory(None, None)


class _Inputs(NamedTuple):
    """As the grid reads them: see `Specs`. pairs [b, h, c, t], rows [b, blocks of heads, kinds * heads, t].

    marks [b, 3, t]: see `_lay_out_marks`; None where a row is one document.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    pairs: jax.Array
    rows: jax.Array
    marks: jax.Array | None

    def with_specs(self, specs: Specs) -> dict[str, tuple[jax.Array | None, pl.BlockSpec]]:
        blocks = (specs.keys(), specs.keys(), specs.values(), *self.coefficient_specs(specs), self.marks_spec(specs))
        return dict(zip(self._fields, zip(self, blocks)))

    def marks_spec(self, specs: Specs) -> pl.BlockSpec:
        return pl.BlockSpec((1, 3, specs.plan.block), lambda b, h, t: (b, 0, specs.block_at(t)))

    def coefficient_specs(self, specs: Specs) -> tuple[pl.BlockSpec, pl.BlockSpec]:
        plan = specs.plan
        return (
            pl.BlockSpec(
                (1, plan.step_heads, self.pairs.shape[2], plan.block), lambda b, h, t: (b, h, 0, specs.block_at(t))
            ),
            pl.BlockSpec((1, 1, self.rows.shape[2], plan.block), lambda b, h, t: (b, h, 0, specs.block_at(t))),
        )


class _Columns(NamedTuple):
    """Of one head in one tile, [128, 128] each; None without momentum."""

    b: jax.Array
    f: jax.Array | None = None
    m: jax.Array | None = None
    mu: jax.Array | None = None


def _columns(refs: SimpleNamespace, plan: Grid, at: slice) -> list[_Columns]:
    """Of each head of a step."""
    columns = jnp.transpose(refs.rows[0, 0, :, at])

    def of(n: int) -> jax.Array:
        return jnp.broadcast_to(columns[:, n : n + 1], (LANES, LANES))

    return [_Columns(*map(of, range(head, columns.shape[1], plan.step_heads))) for head in range(plan.step_heads)]


def _same_mini_batch(size: int) -> jax.Array:
    """[128, 128]: row and column are of one mini-batch."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    # Of a power of two: the numbers of one mini-batch differ in low bits alone.
    return (row ^ column) < size


def _square(pairs: jax.Array, same: jax.Array) -> jax.Array:
    """Gamma^T of a tile, [128, 128], from [c, 128]."""
    return jnp.where(same, jnp.concatenate([pairs] * (LANES // pairs.shape[0]), axis=0), 0.0)


def _gamma(pairs: jax.Array, here: slice) -> jax.Array:
    """gamma [c, 128] of a mini-batch of a tile."""
    return jnp.broadcast_to(pairs[:, here.stop - 1 : here.stop], (pairs.shape[0], LANES))


def _times(x: jax.Array, column: jax.Array) -> jax.Array:
    """x [n, d] in float32 times the column [n, 128], or one number per state, [1, 128]."""
    return x.astype(jnp.float32) * beside(column, x.shape[1])


# ----- forward ------------------------------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(how: _How, inputs: _Inputs, start: _Memory, fresh: _Memory | None) -> tuple[jax.Array, _Memory]:
    o, final, _ = _forward(how, inputs, start, fresh, keep=False)
    return o, final


def _run_forward(how: _How, inputs: _Inputs, start: _Memory, fresh: _Memory | None) -> tuple[tuple, tuple]:
    rule = differentiated_once(NAME, partial(_forward, how, keep=True))
    o, final, entered = rule(inputs, start, fresh)
    return (o, final), (inputs, entered, fresh)


def _run_backward(how: _How, residuals: tuple, cotangents: tuple) -> tuple:
    return differentiated_once(NAME, partial(_backward, how))(*residuals, *cotangents)


_run.defvjp(_run_forward, _run_backward)


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _forward(
    how: _How, inputs: _Inputs, start: _Memory, fresh: _Memory | None, *, keep: bool
) -> tuple[jax.Array, _Memory, _Memory]:
    """Outputs, the final state, and where they are kept the states that entered each step."""
    plan, specs = how.plan, Specs(how.plan)
    state = (plan.key_dim, plan.value_dim)
    has_momentum = start.S is not None
    entered = (_float32(plan.rows, plan.blocks, plan.heads, *state), specs.entered(*state)) if keep else None
    final = (_float32(*start.W.shape), specs.state(*state))
    found = _tiles.run(
        partial(_forward_step, how),
        name="neural_memory_forward",
        plan=plan,
        inputs={
            **inputs.with_specs(specs),
            **start.with_spec(specs.state(*state), "{}_initial"),
            **(fresh or _NO_MEMORY).with_spec(specs.state(*state), "{}_fresh"),
        },
        outputs={
            "o": (jax.ShapeDtypeStruct(inputs.v.shape, inputs.v.dtype), specs.values()),
            "W_final": final,
            "S_final": final if has_momentum else None,
            "W_entered": entered,
            "S_entered": entered if has_momentum else None,
        },
        scratch=dict.fromkeys("WS" if has_momentum else "W", (plan.step_heads, *state))
        | dict.fromkeys("DO", (plan.step_heads, LANES, plan.value_dim)),
        interpret=how.interpret,
    )
    return found.o, _Memory(found.W_final, found.S_final), _Memory(found.W_entered, found.S_entered)


def _forward_step(how: _How, refs: SimpleNamespace) -> None:
    plan, step = how.plan, pl.program_id(2)
    states = ("W", "S") if refs.S_initial is not None else ("W",)

    @pl.when(step == 0)
    def _():
        for name in states:
            getattr(refs, name)[...] = getattr(refs, f"{name}_initial")[0]

    if refs.W_entered is not None:
        for name in states:
            getattr(refs, f"{name}_entered")[0, 0] = getattr(refs, name)[...]

    @_where_used(refs)
    def _():
        for at in plan.chunks():
            _tile_forward(how, refs, at)

    @pl.when(step == plan.blocks - 1)
    def _():
        for name in states:
            getattr(refs, f"{name}_final")[0] = getattr(refs, name)[...]


def _where_used(refs: SimpleNamespace) -> Callable[[Callable[[], None]], None]:
    """Runs a function where the step has a token or begins a document; the others, at a row's end, change nothing."""
    if refs.marks is None:
        return lambda body: body()
    return pl.when(_is_used(refs))


def _is_used(refs: SimpleNamespace) -> jax.Array:
    return jnp.max(refs.marks[0]) > 0


def _tile_forward(how: _How, refs: SimpleNamespace, at: slice) -> None:
    plan, dtype = how.plan, refs.v.dtype
    has_momentum = refs.S_initial is not None
    heads = range(plan.step_heads)
    same = _same_mini_batch(how.mini_batch)
    columns = _columns(refs, plan, at)
    for here in how.mini_batches():
        now = slice(at.start + here.start, at.start + here.stop)
        xs = [_here(columns[head], here) for head in heads]
        # The products of all heads come before what waits for them.
        reads = [_read(how, refs, now, head) for head in heads]
        for head, (x, (kW, qW, qS)) in enumerate(zip(xs, reads)):
            v = refs.v[0, now, plan.value_lanes(head)]
            D = how.factor * (kW - v.astype(jnp.float32))
            refs.D[head, here] = D
            refs.O[head, here] = _times(qW, x.b) + (0.0 if qS is None else _times(qS, x.f))
        for head, x in enumerate(xs):
            k, D = refs.k[0, now, plan.key_lanes(head)], refs.D[head, here]
            gamma = _gamma(refs.pairs[0, head, :, at], here)
            S = refs.S[head] if has_momentum else None
            W, S = _written(refs.W[head], S, k, D.astype(dtype), gamma, x)
            refs.W[head], S = _left(refs, now, head, W, S)
            if has_momentum:
                refs.S[head] = S
    for head in heads:
        keys, values = plan.key_lanes(head), plan.value_lanes(head)
        A = product_nt(refs.k[0, at, keys], refs.q[0, at, keys]) * _square(refs.pairs[0, head, :, at], same)
        o = refs.O[head] - product_tn(A.astype(dtype), refs.D[head].astype(dtype))
        refs.o[0, at, values] = o.astype(dtype)


def _here(columns: _Columns, here: slice) -> _Columns:
    return _Columns(*(None if y is None else y[here] for y in columns))


def _read(how: _How, refs: SimpleNamespace, now: slice, head: int) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """K W, Q W and Q S."""
    dtype, keys = refs.v.dtype, how.plan.key_lanes(head)
    q, k = refs.q[0, now, keys], refs.k[0, now, keys]
    read = product(jnp.concatenate([k, q], axis=0), refs.W[head].astype(dtype))
    qS = None if refs.S_initial is None else product(q, refs.S[head].astype(dtype))
    return read[: how.mini_batch], read[how.mini_batch :], qS


def _written(
    W: jax.Array, S: jax.Array | None, k: jax.Array, D: jax.Array, gamma: jax.Array, x: _Columns
) -> tuple[jax.Array, jax.Array | None]:
    """Equation (7)."""
    weights = [gamma] if S is None else [gamma, x.mu]
    added = product_tn(jnp.concatenate([_times(k, weight).astype(k.dtype) for weight in weights], axis=1), D)
    W = _times(W, x.b[-1:]) - added[: W.shape[0]]
    if S is None:
        return W, None
    return W + _times(S, x.f[-1:]), _times(S, x.m[-1:]) - added[W.shape[0] :]


def _left(
    refs: SimpleNamespace, now: slice, head: int, W: jax.Array, S: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """What the mini-batch after `now` starts from, where W and S are those of equation (7)."""
    if refs.marks is None:
        return W, S
    ends = refs.marks[0, :1, now.stop - 1 : now.stop] > 0
    return jnp.where(ends, refs.W_fresh[0, head], W), None if S is None else jnp.where(ends, refs.S_fresh[0, head], S)


# ----- backward -----------------------------------------------------------------------------------------------------


def _backward(
    how: _How, inputs: _Inputs, entered: _Memory, fresh: _Memory | None, do: jax.Array, d_final: _Memory
) -> tuple[_Inputs, _Memory, _Memory | None]:
    """Cotangents of the inputs, of the initial state and of the fresh one. entered: what entered each step."""
    plan, specs = how.plan, Specs(how.plan, backwards=True)
    has_momentum = entered.S is not None
    state, count = (plan.key_dim, plan.value_dim), plan.block // how.mini_batch
    dtype = inputs.v.dtype
    pairs_spec, rows_spec = inputs.coefficient_specs(specs)
    ends = (plan.step_heads, count * (3 if has_momentum else 1), plan.value_dim)
    d_state = (_float32(*d_final.W.shape), specs.state(*state))
    found = _tiles.run(
        partial(_backward_step, how),
        name="neural_memory_backward",
        plan=plan,
        inputs={
            **inputs.with_specs(specs),
            **entered.with_spec(specs.entered(*state), "{}_entered"),
            **(fresh or _NO_MEMORY).with_spec(specs.state(*state), "{}_fresh"),
            "do": (do, specs.values()),
            **d_final.with_spec(specs.state(*state), "d{}_final"),
        },
        outputs={
            "dq": (jax.ShapeDtypeStruct(inputs.q.shape, dtype), specs.keys()),
            "dk": (jax.ShapeDtypeStruct(inputs.k.shape, dtype), specs.keys()),
            "dv": (jax.ShapeDtypeStruct(inputs.v.shape, dtype), specs.values()),
            "dpairs": (_float32(*inputs.pairs.shape), pairs_spec),
            "drows": (_float32(*inputs.rows.shape), rows_spec),
            "dends": (_float32(plan.rows, plan.blocks, plan.heads, *ends[1:]), specs.entered(*ends[1:])),
            "dW_initial": d_state,
            "dS_initial": d_state if has_momentum else None,
            "dW_fresh": d_state if fresh is not None else None,
            "dS_fresh": d_state if fresh is not None and has_momentum else None,
        },
        scratch={
            "dW": (plan.step_heads, *state),
            "dS": (plan.step_heads, *state),
            # Of each mini-batch of the step: what it started from.
            "W": (plan.step_heads, count, *state),
            "S": (plan.step_heads, count if has_momentum else 1, *state),
            "D": (plan.step_heads, plan.block, plan.value_dim),
            "sum_dk": (plan.step_heads, LANES, plan.key_dim),
            "sum_dq": (plan.step_heads, LANES, plan.key_dim),
            "dD": (plan.step_heads, LANES, plan.value_dim),
            "columns": (LANES, LANES),
        },
        interpret=how.interpret,
    )
    drows = _with_ends(how, found.drows, found.dends, has_momentum)
    gradients = _Inputs(found.dq, found.dk, found.dv, found.dpairs, drows, None)
    d_fresh = None if fresh is None else _Memory(found.dW_fresh, found.dS_fresh)
    return gradients, _Memory(found.dW_initial, found.dS_initial), d_fresh


def _with_ends(how: _How, drows: jax.Array, dends: jax.Array, has_momentum: bool) -> jax.Array:
    """Adds equation (15), whose sums over lanes are still to be taken, at the last token of each mini-batch."""
    plan = how.plan
    kinds = 3 if has_momentum else 1
    ends = dends.sum(axis=-1).reshape(plan.rows, plan.blocks, plan.heads, -1, kinds)
    ends = ends.transpose(0, 4, 2, 1, 3).reshape(plan.rows, kinds, plan.heads // plan.step_heads, plan.step_heads, -1)
    ends = jnp.swapaxes(ends, 1, 2).reshape(plan.rows, plan.heads // plan.step_heads, kinds * plan.step_heads, -1)
    at_ends = jnp.pad(ends[..., None], ((0, 0),) * 4 + ((how.mini_batch - 1, 0),)).reshape(*ends.shape[:3], -1)
    return drows.at[:, :, : ends.shape[2]].add(at_ends)


def _backward_step(how: _How, refs: SimpleNamespace) -> None:
    plan, step = how.plan, pl.program_id(2)
    states = ("W", "S") if refs.S_entered is not None else ("W",)

    @pl.when(step == 0)
    def _():
        for name in states:
            getattr(refs, f"d{name}")[...] = getattr(refs, f"d{name}_final")[0]
            if refs.marks is not None:
                d_fresh = getattr(refs, f"d{name}_fresh")
                d_fresh[...] = jnp.zeros_like(d_fresh)

    @_where_used(refs)
    def _():
        same = _same_mini_batch(how.mini_batch)
        columns = [_columns(refs, plan, at) for at in plan.chunks()]
        _states_again(how, refs, columns)
        for n, at in reversed(list(enumerate(plan.chunks()))):
            _tile_backward(how, refs, n, at, columns[n], same)

    if refs.marks is not None:

        @pl.when(~_is_used(refs))
        def _():
            for gradient in (refs.dq, refs.dk, refs.dv, refs.dpairs, refs.drows, refs.dends):
                gradient[...] = jnp.zeros_like(gradient)

    @pl.when(step == plan.blocks - 1)
    def _():
        for name in states:
            getattr(refs, f"d{name}_initial")[0] = getattr(refs, f"d{name}")[...]


def _states_again(how: _How, refs: SimpleNamespace, columns: list[list[_Columns]]) -> None:
    """What each mini-batch of the step started from, and its D, by equations (5) and (7)."""
    plan, dtype = how.plan, refs.v.dtype
    has_momentum = refs.S_entered is not None
    for head in range(plan.step_heads):
        refs.W[head, 0] = refs.W_entered[0, 0, head]
        if has_momentum:
            refs.S[head, 0] = refs.S_entered[0, 0, head]
    count = plan.block // how.mini_batch
    for n in range(count):
        now = slice(n * how.mini_batch, (n + 1) * how.mini_batch)
        tile, start = divmod(now.start, LANES)
        here = slice(start, start + how.mini_batch)
        heads = range(plan.step_heads)
        reads = [product(refs.k[0, now, plan.key_lanes(head)], refs.W[head, n].astype(dtype)) for head in heads]
        for head in heads:
            k, v = refs.k[0, now, plan.key_lanes(head)], refs.v[0, now, plan.value_lanes(head)]
            D = how.factor * (reads[head] - v.astype(jnp.float32))
            refs.D[head, now] = D
            if n + 1 < count:
                gamma = _gamma(refs.pairs[0, head, :, plan.chunks()[tile]], here)
                S = refs.S[head, n] if has_momentum else None
                W, S = _written(refs.W[head, n], S, k, D.astype(dtype), gamma, _here(columns[tile][head], here))
                refs.W[head, n + 1], S = _left(refs, now, head, W, S)
                if has_momentum:
                    refs.S[head, n + 1] = S


def _tile_backward(
    how: _How, refs: SimpleNamespace, tile: int, at: slice, columns: list[_Columns], same: jax.Array
) -> None:
    """Equations (8) to (15) for the mini-batches of a tile, from the last to the first."""
    plan, dtype = how.plan, refs.v.dtype
    size = how.mini_batch
    refs.columns[...] = jnp.zeros_like(refs.columns)
    # 1. What does not wait for the mini-batches after.
    for head in range(plan.step_heads):
        keys, values = plan.key_lanes(head), plan.value_lanes(head)
        q, k, N = refs.q[0, at, keys], refs.k[0, at, keys], refs.do[0, at, values]
        gamma = _square(refs.pairs[0, head, :, at], same)
        KQ, DN = product_nt(k, q), product_nt(refs.D[head, at].astype(dtype), N)
        A, P = (KQ * gamma).astype(dtype), (-DN * gamma).astype(dtype)
        refs.dD[head] = -product(A, N)
        refs.sum_dq[head] = product_tn(P, k)
        refs.sum_dk[head] = product(P, q)
        dgamma = jnp.where(same, -DN * KQ, 0.0)
        refs.dpairs[0, head, :, at] = sum(dgamma[i : i + size] for i in range(0, LANES, size))
    # 2. What does.
    for here in reversed(how.mini_batches()):
        n = (tile * LANES + here.start) // size
        now = slice(at.start + here.start, at.start + here.stop)
        products = [_state_products(how, refs, n, now, head) for head in range(plan.step_heads)]
        for head, x in enumerate(products):
            _mini_batch_backward(how, refs, n, now, here, head, _here(columns[head], here), x)
    for head in range(plan.step_heads):
        keys = plan.key_lanes(head)
        refs.dq[0, at, keys], refs.dk[0, at, keys] = (x[head].astype(dtype) for x in (refs.sum_dq, refs.sum_dk))
    refs.drows[0, 0, :, at] = jnp.transpose(refs.columns[...])[: refs.drows.shape[2]]


class _StateProducts(NamedTuple):
    """Of one head in one mini-batch: the cotangent of the state that leaves, and products with states."""

    d_state: jax.Array
    N_state: jax.Array
    k_d_state: jax.Array
    D_d_state: jax.Array


def _state_products(
    how: _How, refs: SimpleNamespace, n: int, now: slice, head: int
) -> tuple[_StateProducts, _StateProducts | None]:
    """For W and for S."""
    plan, dtype = how.plan, refs.v.dtype
    k, N, D = refs.k[0, now, plan.key_lanes(head)], refs.do[0, now, plan.value_lanes(head)], refs.D[head, now]

    def of(state: jax.Array, d_state: jax.Array) -> _StateProducts:
        rounded = d_state.astype(dtype)
        return _StateProducts(
            d_state, product_nt(N, state.astype(dtype)), product(k, rounded), product_nt(D.astype(dtype), rounded)
        )

    of_W = of(refs.W[head, n], refs.dW[head])
    return of_W, None if refs.S_entered is None else of(refs.S[head, n], refs.dS[head])


def _mini_batch_backward(
    how: _How, refs: SimpleNamespace, n: int, now: slice, here: slice, head: int, x: _Columns, products: tuple
) -> None:
    plan, dtype, size = how.plan, refs.v.dtype, how.mini_batch
    keys, values = plan.key_lanes(head), plan.value_lanes(head)
    q, k, N = refs.q[0, now, keys], refs.k[0, now, keys], refs.do[0, now, values]
    pairs = refs.pairs[0, head, :, now]
    gamma = jnp.broadcast_to(pairs[:, size - 1 :], (size, LANES))
    W = refs.W[head, n]
    (dW, NW, kdW, DdW), of_S = products
    dD = refs.dD[head, here] - _times(kdW, gamma)
    dq = _times(NW, x.b)
    dk = -_times(DdW, gamma)
    if of_S is not None:
        S = refs.S[head, n]
        dS, NS, kdS, DdS = of_S
        dD -= _times(kdS, x.mu)
        dq += _times(NS, x.f)
        dk -= _times(DdS, x.mu)
    E = how.factor * dD
    refs.dv[0, now, values] = (-E).astype(dtype)
    E = E.astype(dtype)
    refs.sum_dq[head, here] += dq
    refs.sum_dk[head, here] += dk + product_nt(E, W.astype(dtype))
    read = jnp.concatenate([_times(N, x.b).astype(dtype), E], axis=0)
    before = product_tn(jnp.concatenate([q, k], axis=0), read) + _times(dW, x.b[-1:])
    refs.dW[head] = _handed_back(refs, now, head, before, refs.dW_fresh)
    if x.f is not None:
        before = product_tn(q, _times(N, x.f).astype(dtype)) + _times(dW, x.f[-1:]) + _times(dS, x.m[-1:])
        refs.dS[head] = _handed_back(refs, now, head, before, refs.dS_fresh)
    # Gradients of the coefficients.
    lane = jax.lax.broadcasted_iota(jnp.int32, (size, LANES), 1)
    last = _sums(k, -DdW)
    place = jax.lax.broadcasted_iota(jnp.int32, pairs.shape, 1)
    refs.dpairs[0, head, :, now] += jnp.where(place == size - 1, last, 0.0)
    found = {0: _sums(q, NW)}
    ends = [dW * W]
    if x.f is not None:
        found |= {1: _sums(q, NS), 3: _sums(k, -DdS)}
        ends += [dW * S, dS * S]
    kept = refs.columns[here]
    for kind, column in found.items():
        kept = jnp.where(lane == kind * plan.step_heads + head, column, kept)
    refs.columns[here] = kept
    for kind, y in enumerate(ends):
        row = n * len(ends) + kind
        refs.dends[0, 0, head, row : row + 1] = jnp.sum(y, axis=0, keepdims=True)


def _handed_back(refs: SimpleNamespace, now: slice, head: int, d_state: jax.Array, d_fresh: Any) -> jax.Array:
    """The cotangent of what the mini-batch before `now` leaves, d_state that of what `now` starts from."""
    if refs.marks is None:
        return d_state
    starts = refs.marks[0, 1:2, now.start : now.start + 1] > 0
    d_fresh[0, head] += jnp.where(starts, d_state, 0.0)
    return jnp.where(starts, 0.0, d_state)


def _sums(x: jax.Array, y: jax.Array) -> jax.Array:
    """[c, 1]: x_t y_t."""
    return jnp.sum(x.astype(jnp.float32) * y, axis=1, keepdims=True)
