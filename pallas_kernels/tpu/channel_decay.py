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
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import _channel_scores, _matrix_state, _tiles
from pallas_kernels.tpu._channel_scores import Decay, Meetings
from pallas_kernels.tpu._generations import sizes
from pallas_kernels.tpu._matrix_state import KeyGradients, Operator
from pallas_kernels.tpu._tiles import Chunk, Grid, beside, chunks, product, product_nt, product_tn

DELAY = 4
# Bytes of VMEM that a step takes at most for one byte of an operand of it, by the size of its numbers.
VMEM = {2: 56, 4: 64}


def supports(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array | None) -> str | None:
    """Why the kernel cannot compute this, or None."""
    if g is None or g.ndim != 4:
        return "g is not a decay per channel"
    return _tiles.declined(g, q=q, k=k, v=v)


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
    limits = sizes()
    size, chunk = q.dtype.itemsize, _tiles.power_of_two(chunk_size, q.shape[1])
    plan = _tiles.grid(q.shape, v.shape, size, limits.at_most(limits.memory // VMEM[size]), chunk, by_channel=True)
    # On narrow matrix units what a backward pass holds longer costs more than the wait that it saves.
    operator = _operator(backward_delay=DELAY if limits.wide_units else 0)
    arrays = {"q": q, "k": k, "v": v, "g": g, "index": index}
    return _matrix_state.run(operator, plan, arrays, initial, scale=scale, interpret=interpret)


@cache
def _operator(*, backward_delay: int) -> Operator:
    forward, backward = (
        partial(_delayed, delay, products)
        for delay, products in ((DELAY, _forward_products), (backward_delay, _backward_products))
    )
    return Operator("channel_decay", forward, backward, transposed=True)


def _delayed(delay: int, products: Callable, plan: Grid, scale: float, refs: SimpleNamespace) -> None:
    """Runs `products` of a step to its end, and each function that it yields `delay` of its turns later.

    Matrix units take products in the order they are written: one that waits for another is written after some that do
    not, of the next chunks.
    """
    waiting = []
    for finish in products(plan, scale, refs):
        waiting.append(finish)
        if len(waiting) > delay:
            waiting.pop(0)()
    for finish in waiting:
        finish()


# ----- a chunk ------------------------------------------------------------------------------------------------------


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


def _head(refs: SimpleNamespace, plan: Grid, scale: float, chunk: Chunk, head: int) -> _Head:
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


def _forward_products(plan: Grid, scale: float, refs: SimpleNamespace) -> Iterator[Callable[[], None]]:
    """Yields for each head and chunk what finishes it."""

    def finish(at: slice, values: slice, A: jax.Array, from_state: jax.Array) -> None:
        refs.o[0, at, values] = (product(A, refs.v[0, at, values]) + from_state).astype(refs.o.dtype)

    of_step, dtype = chunks(refs, plan), refs.v.dtype
    for head in range(plan.step_heads):
        values = plan.value_lanes(head)
        S = refs.S[head]
        for chunk in of_step:
            at, marks = chunk.at, chunk.marks
            x = _head(refs, plan, scale, chunk, head)
            from_state = product_nt(x.enter, S.astype(dtype))
            S = S * x.through + product_tn(refs.v[0, at, values], x.leave)
            A = jnp.where(marks.pairs, _channel_scores.scores(x.pairs), 0.0).astype(dtype)
            yield partial(finish, at, values, A, from_state)
        refs.S[head] = S


def _backward_products(plan: Grid, scale: float, refs: SimpleNamespace) -> Iterator[Callable[[], None]]:
    """Yields for each head and chunk what finishes it."""
    key_gradients = KeyGradients(plan, refs)

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
        key_gradients.add(head, at, dq, dk)

    of_step, dtype = chunks(refs, plan), refs.v.dtype
    for head in range(plan.step_heads):
        values = plan.value_lanes(head)
        of_chunks = [_head(refs, plan, scale, chunk, head) for chunk in of_step]
        states = [refs.entered[0, 0, head]]
        for chunk, x in zip(of_step, of_chunks):
            states.append(states[-1] * x.through + product_tn(refs.v[0, chunk.at, values], x.leave))
        dS = refs.dS[head]
        for chunk, x in zip(of_step[::-1], of_chunks[::-1]):
            at, marks = chunk.at, chunk.marks
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
