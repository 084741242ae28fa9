"""What every operator shares along the time axis: documents, padding, chunks, and the recurrence itself."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int

from seqmodels.notation import Array, SegmentIds
from seqmodels.ops._mesh import running
from seqmodels.ops._op import Inputs, Options, State


class Documents(NamedTuple):
    """Which document each position belongs to, in the form that operators use.

    index   [b, t] int32, 0 for the document that the state at the start belongs to, then 1, 2, ... A padding position
            carries the index of the last real token before it.
    real    [b, t] bool, False at padding
    starts  [b, t] bool, True where a document begins and the state must be forgotten
    """

    index: Array
    real: Array
    starts: Array


def documents(segment_ids: SegmentIds, current: Int[Array, " b"] | None = None) -> Documents:
    """Number the documents of each row from the one that the incoming state belongs to.

    A new document starts at a real token (id != 0) whose id differs from that of the real token before it. `current`
    is the id of the incoming state's document; where it is 0 or not given, the first real token continues the state.
    """
    real = segment_ids != 0
    id_before = running("last", segment_ids, exclusive=True)
    if current is not None:
        id_before = jnp.where(id_before != 0, id_before, current[:, None])
    starts = real & (id_before != 0) & (segment_ids != id_before)
    return Documents(running("sum", starts.astype(jnp.int32)), real, starts)


def places(docs: Documents, seen: Int[Array, " b"]) -> Int[Array, "b t"]:
    """The place of each token in its document, from 0; `seen` tokens of the incoming document came before.

    A padding position has the place of the last real token before it, -1 where there is none.
    """
    count = running("sum", docs.real.astype(jnp.int32))
    count_before = running("max", jnp.where(docs.starts, count - 1, 0))
    return count - 1 - count_before + jnp.where(docs.index == 0, seen[:, None], 0)


def backwards(docs: Documents) -> Documents:
    """The documents of the reversed span, numbered from its start."""
    return documents(jnp.flip(jnp.where(docs.real, docs.index + 1, 0), axis=1))


def zero_at_padding(docs: Documents, *arrays: Array | None) -> tuple[Array | None, ...]:
    """The arrays [b, t, ...] with zeros at padding; None stays None."""

    def masked(x: Array | None) -> Array | None:
        return None if x is None else jnp.where(docs.real.reshape(docs.real.shape + (1,) * (x.ndim - 2)), x, 0)

    return tuple(masked(x) for x in arrays)


def where_row(condition: Array, if_true: State, if_false: State) -> State:
    """Choose between two states row by row; `condition` is [b]."""

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(condition.reshape(condition.shape + (1,) * (a.ndim - 1)), a, b)

    return jax.tree.map(choose, if_true, if_false)


def recurrent(
    step: Callable[[State, Inputs, Options], tuple[State, Array]],
    fresh: State,
    arrays: Inputs,
    time_args: tuple[str, ...],
    state: State,
    docs: Documents | None,
    options: Options,
) -> tuple[Array, State]:
    """`lax.scan` of `step`: the definition of every operator, of a packed document and of padding.

    Where a document starts the state is `fresh`; at padding the state passes through and the output is zero.
    A span of one token is one call of `step`.
    """
    timed = {name: x for name, x in arrays.items() if name in time_args and x is not None}

    def body(state: State, position: tuple) -> tuple[State, Array]:
        inputs, marks = position
        if marks is None:
            return step(state, {**arrays, **inputs}, options)
        start, real = marks
        state = where_row(start, fresh, state)
        after, o = step(state, {**arrays, **inputs}, options)
        return where_row(real, after, state), where_row(real, o, jnp.zeros_like(o))

    marks = None if docs is None else (docs.starts, docs.real)
    if next(iter(timed.values())).shape[1] == 1:
        state, o = body(state, jax.tree.map(lambda x: x[:, 0], (timed, marks)))
        return o[:, None], state
    by_time = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (timed, marks))
    state, o = jax.lax.scan(body, state, by_time)
    return jnp.moveaxis(o, 0, 1), state


def recurrent_in_spans(
    step: Callable[[State, Inputs, Options], tuple[State, Array]],
    fresh: State,
    arrays: Inputs,
    time_args: tuple[str, ...],
    state: State,
    docs: Documents,
    options: Options,
) -> tuple[Array, State]:
    """`recurrent`, whose backward pass keeps about 2 sqrt(t) states instead of t."""
    length = docs.index.shape[1]
    size = math.isqrt(length - 1) + 1
    timed = {name: x for name, x in arrays.items() if name in time_args and x is not None}
    index, real, starts = pad_time(docs.index, size, "edge"), pad_time(docs.real, size), pad_time(docs.starts, size)
    before = jnp.pad(index[:, size - 1 : -1 : size], ((0, 0), (1, 0)))

    def in_spans(x: Array) -> Array:
        x = pad_time(x, size)
        return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def span(state: State, inputs: tuple) -> tuple[State, Array]:
        part, (index, real, starts), before = inputs
        docs = Documents(index - before[:, None], real, starts)
        o, state = recurrent(step, fresh, {**arrays, **part}, time_args, state, docs, options)
        return state, o

    parts = *jax.tree.map(in_spans, (timed, (index, real, starts))), before.T
    state, o = jax.lax.scan(span, state, parts)
    o = jnp.moveaxis(o, 0, 1)
    return o.reshape(o.shape[0], -1, *o.shape[3:])[:, :length], state


def pad_time(x: Array, multiple: int, value: str = "zero") -> Array:
    """Lengthen axis 1 to a multiple, with zeros or with copies of the last position (`value="edge"`)."""
    missing = -x.shape[1] % multiple
    if missing == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, missing)
    return jnp.pad(x, widths, mode="edge" if value == "edge" else "constant")


def state_dtype(*arrays: Array | None) -> jnp.dtype:
    """float32, or float64 when an input is float64."""
    return jnp.result_type(jnp.float32, *(x.dtype for x in arrays if x is not None))


def sums_after(x: Array, size: int = 128) -> Array:
    """[b, t, ...]: the sum over all later positions, for each; 0 for the last.

    As products with triangles of ones over `size` positions: a cumulative sum costs the square of the length on TPU.
    """
    length = x.shape[1]
    parts = pad_time(x, min(size, length))
    parts = parts.reshape(x.shape[0], -1, min(size, length), *x.shape[2:])
    later = jnp.triu(jnp.ones((parts.shape[2],) * 2, x.dtype), 1)
    within = jnp.einsum("ij,bnj...->bni...", later, parts, precision="highest")
    if parts.shape[1] > 1:
        within = within + sums_after(parts.sum(axis=2), size)[:, :, None]
    return within.reshape(x.shape[0], -1, *x.shape[2:])[:, :length]
