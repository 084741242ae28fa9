"""Titans' memory as context: attention within a segment, over what a neural memory recalls and the segment itself.

Documents are cut into segments of L tokens, counted from their start. For token t of a segment that starts with a,

    h_t = M_{W_{a-1}}(r_t)                     recall: the memory as the segment before left it, without a write  (1)
    y_t = softmax_i(scale * q_t . k_i) v_i     i over the prefix P, and over h_j and x_j with a <= j <= t         (2)
    o_t = M_{W_t}(r'_t)                        after writing y_t to the memory (`neural_memory`)                  (3)

(Behrouz, Zhong, Mirrokni 2024, arXiv 2501.00663.) The keys and values of h_j are `context` of it; r'_t and what is
written are `written` of y_t. W is that of a document not yet read in its first segment.

In the paper's figure a segment attends to [P | h | x] with all of the segment's h. h_j answers to token j, so for a
causal model h_j with j > t would tell t what comes: (2) leaves it out.

    code     symbol    shape               dtype, meaning
    q, k, v  q, k, v   [b, t, h, k or v]   any float; the attention's, of x
    r        r         [b, t, h, c]        as q; what the memory is asked, of x
    prefix_k, prefix_v [n, h, k or v]      as q; persistent tokens, None for none
    maps               any                 arrays that `context` and `written` are handed

A segment is computed at once, segments one after another: what one writes the next one recalls.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from seqmodels.errors import InputError
from seqmodels.notation import Array, Keys, Queries, SegmentIds, Values
from seqmodels.ops import _dispatch, _scan, _tiles
from seqmodels.ops._chunks import positions_per_token
from seqmodels.ops._memory_network import Linear, Norm, Weights
from seqmodels.ops._neural_memory_chunked import Memory, MiniBatch, in_slots
from seqmodels.ops._op import Example, Inputs, Options, SeqOp
from seqmodels.ops._scan import Documents
from seqmodels.ops.neural_memory import (
    NeuralMemoryState,
    fresh_state,
    neural_memory,
    neural_memory_flops,
    recall,
    recall_flops,
)
from seqmodels.ops.softmax_attention import attend

TIME_ARGS = ("q", "k", "v", "r")

Context = Callable[[Any, Array], tuple[Array, Array]]
Written = Callable[[Any, Array], dict[str, Array]]


class MemoryAsContextState(NamedTuple):
    """The state of equations (1) to (3), in float32.

    memory   that of `neural_memory`
    past     W_{a-1} of the current segment; of the one before until the next token
    k, v     [b, 2, L, h, k or v] keys and values of h and of x by place in the segment; 0 where none came yet
    place    [b] int32, tokens of the current segment seen so far
    """

    memory: NeuralMemoryState
    past: Weights
    k: Float[Array, "b 2 l h k"]
    v: Float[Array, "b 2 l h v"]
    place: Int[Array, " b"]


def memory_as_context(
    q: Queries,
    k: Keys,
    v: Values,
    r: Queries,
    *,
    context: Context,
    written: Written,
    maps: Any,
    weights: Weights,
    norm: Norm | None = None,
    prefix_k: Float[Array, "n h k"] | None = None,
    prefix_v: Float[Array, "n h v"] | None = None,
    segment: int = 64,
    mini_batch: int = 16,
    activation: str = "gelu",
    residual: bool = False,
    initial_state: MemoryAsContextState | None = None,
    segment_ids: SegmentIds | Documents | None = None,
    form: str = "chunked",
    chunk_size: int | None = None,
    backend: str = "auto",
    exchange: str = "auto",
) -> tuple[Float[Array, "b t 2 h v"], MemoryAsContextState]:
    """Attention within segments with a neural memory as context, equations (1) to (3).

    Returns y and o side by side, [b, t, 2, h, v] in q's dtype, and the state after the span. Values of the attention
    and of the memory have the same number of channels.

    context: (maps, h [b, t, h, v]) -> keys and values [b, t, h, k or v] of h in the attention, token by token.
    written: (maps, y [b, t, h, v]) -> the arguments q, k, v, theta, alpha, eta of `neural_memory`, token by token.
    weights, norm, mini_batch, activation, residual: as for `neural_memory`.
    segment: L, a multiple of mini_batch.
    form: "recurrent" (`lax.scan` of the definition), "chunked" (a segment at a time; chunk_size has no part in it).

    Raises InputError where shapes disagree.
    """
    _check(q, k, v, r, segment, mini_batch)
    return _dispatch.run(
        MEMORY_AS_CONTEXT,
        {
            **{"q": q, "k": k, "v": v, "r": r, "prefix_k": prefix_k, "prefix_v": prefix_v},
            **{"maps": maps, "weights": weights, "norm": norm},
        },
        {
            **{"context": context, "written": written, "segment": segment},
            **{"mini_batch": mini_batch, "activation": activation, "residual": residual},
        },
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
        backend=backend,
        exchange=exchange,
    )


def memory_as_context_flops(
    length: int,
    *,
    heads: int,
    widths: Sequence[int],
    segment: int,
    mini_batch: int,
    prefix: int = 0,
    maps: float = 0.0,
    decoding: bool = False,
) -> float:
    """FLOPs of matrix products for a token, a segment at a time over `length` tokens, or in a step.

    widths: as for `neural_memory`; keys and values of the attention have as many channels as those of the memory.
    prefix: tokens in front of a segment. maps: FLOPs of `context` and `written` for a token.
    """
    attended = 2 * heads * (widths[0] + widths[-1]) * (prefix + 2 * segment)  # masked pairs included
    memory = {"heads": heads, "widths": widths, "mini_batch": mini_batch, "has_momentum": True}
    written = neural_memory_flops(segment, **memory, decoding=decoding)
    positions = 1 if decoding else positions_per_token(length, segment)
    return positions * (recall_flops(heads, widths) + attended + maps + written)


def _check(q: Array, k: Array, v: Array, r: Array, segment: int, mini_batch: int) -> None:
    if mini_batch < 1 or segment < 1 or segment % mini_batch:
        raise InputError(
            f"memory_as_context: segment={segment}, mini_batch={mini_batch}; expected a segment of whole mini-batches"
        )
    if q.ndim != 4:
        raise InputError(f"memory_as_context: q has shape {q.shape}; expected [batch, time, heads, key channels]")
    if k.shape != q.shape:
        raise InputError(f"memory_as_context: k has shape {k.shape}; expected {q.shape} as q has")
    for name, x in (("v", v), ("r", r)):
        if x.ndim != 4 or x.shape[:3] != q.shape[:3]:
            raise InputError(f"memory_as_context: {name} has shape {x.shape}; expected {(*q.shape[:3], 'channels')}")


def start_state(
    batch: int, segment: int, heads: int, key_dim: int, value_dim: int, weights: Weights
) -> MemoryAsContextState:
    """The state before the first token of a document, in the accumulation dtype of `weights`."""
    memory = fresh_state(batch, weights, None, has_momentum=True)
    slots = (batch, 2, segment, heads)
    dtype = memory.weights[0].A.dtype
    k, v = jnp.zeros((*slots, key_dim), dtype), jnp.zeros((*slots, value_dim), dtype)
    return MemoryAsContextState(memory, memory.weights, k, v, jnp.zeros(batch, jnp.int32))


def _initial_state(arrays: Inputs, options: Options) -> MemoryAsContextState:
    q, v = arrays["q"], arrays["v"]
    dtype = _scan.state_dtype(q, *jax.tree.leaves(arrays["weights"]))
    weights = jax.tree.map(lambda x: x.astype(dtype), arrays["weights"])
    return start_state(q.shape[0], options["segment"], *q.shape[2:], v.shape[3], weights)


def _network(arrays: Inputs, options: Options) -> dict[str, Any]:
    return {"norm": arrays["norm"], **{name: options[name] for name in ("activation", "residual")}}


def _begin(state: MemoryAsContextState, begins: Array) -> MemoryAsContextState:
    """The state at the first token of a segment where `begins` [b]: the memory of (1) is that of now."""
    started = state._replace(past=state.memory.weights, k=jnp.zeros_like(state.k), v=jnp.zeros_like(state.v))
    return _scan.where_row(begins, started, state)


def _context(state: MemoryAsContextState, arrays: Inputs, r: Array, options: Options) -> tuple[Array, Array]:
    """Equation (1): keys and values of h [b, t, h, k or v]."""
    return options["context"](arrays["maps"], recall(r, state.past, **_network(arrays, options)))


def _attend(q: Array, k: Array, v: Array, seen: Array, arrays: Inputs) -> Array:
    """Equation (2) for queries [b, t, h, k]. k, v: of the state. seen [b, t, l]: places of the segment."""
    batch, length = q.shape[:2]
    k, v = (x.reshape(batch, -1, *x.shape[3:]).astype(q.dtype) for x in (k, v))
    seen = jnp.concatenate([seen, seen], axis=-1)
    if arrays["prefix_k"] is not None:
        prefix = [jnp.broadcast_to(arrays[name], (batch, *arrays[name].shape)) for name in ("prefix_k", "prefix_v")]
        k, v = (jnp.concatenate(parts, axis=1) for parts in zip(prefix, (k, v), strict=True))
        always = jnp.ones((batch, length, prefix[0].shape[1]), bool)
        seen = jnp.concatenate([always, seen], axis=-1)
    return attend(q, k, v, seen, {})


def _step(state: MemoryAsContextState, arrays: Inputs, options: Options) -> tuple[MemoryAsContextState, Array]:
    state = _begin(state, state.place == 0)
    q, k, v, r = (arrays[name][:, None] for name in TIME_ARGS)
    h_k, h_v = _context(state, arrays, r, options)
    here = jnp.arange(options["segment"]) == state.place[:, None]

    def put(slots: Array, h: Array, x: Array) -> Array:
        return jnp.where(here[:, None, :, None, None], jnp.stack([h, x], axis=1).astype(slots.dtype), slots)

    state = state._replace(k=put(state.k, h_k, k), v=put(state.v, h_v, v))
    seen = jnp.arange(options["segment"]) <= state.place[:, None]
    y = _attend(q, state.k, state.v, seen[:, None], arrays)
    o, memory = neural_memory(
        **options["written"](arrays["maps"], y),
        weights=arrays["weights"],
        **_network(arrays, options),
        mini_batch=options["mini_batch"],
        initial_state=state.memory,
        form="recurrent",
    )
    state = state._replace(memory=memory, place=(state.place + 1) % options["segment"])
    return state, jnp.stack([y, o.astype(y.dtype)], axis=2)[:, 0]


def _chunked(
    arrays: Inputs, state: MemoryAsContextState, docs: Documents | None, chunk_size: int | None, options: Options
) -> tuple[Array, MemoryAsContextState]:
    size, length = options["segment"], arrays["q"].shape[1]
    fresh, tiles = _initial_state(arrays, options), _tiles.lay(docs, state.place, length, size)
    if docs is None and options["fresh"]:  # No segment was begun before: one tile less.
        count = -(-length // size)
        parts = {name: getattr(tiles, name)[:, :count] for name in ("position", "real", "starts")}
        tiles = tiles._replace(**parts)

    def by_segments() -> tuple[Array, MemoryAsContextState]:
        spans = [_tiles.to_tiles(arrays[name], tiles) for name in TIME_ARGS]
        by_tile = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (spans, tiles.real, tiles.starts))
        run = jax.checkpoint(partial(_segment, arrays=arrays, fresh=fresh, options=options), prevent_cse=False)
        end, outputs = jax.lax.scan(run, state, by_tile)
        o = _tiles.from_tiles(jnp.moveaxis(outputs, 0, 1), tiles)
        return o, end._replace(place=tiles.place)

    def by_tokens() -> tuple[Array, MemoryAsContextState]:
        return _scan.recurrent_in_spans(_step, fresh, arrays, TIME_ARGS, state, docs, options)

    return by_segments() if tiles.fit is None else jax.lax.cond(tiles.fit, by_segments, by_tokens)


def _segment(
    state: MemoryAsContextState, tile: tuple, *, arrays: Inputs, fresh: MemoryAsContextState, options: Options
) -> tuple[MemoryAsContextState, Array]:
    """A segment, or the part of one that there is: q, k, v, r [b, l, h, ...], real [b, l], starts [b]."""
    (q, k, v, r), real, starts = tile
    state = _begin(_scan.where_row(starts, fresh, state), real[:, 0])
    h_k, h_v = _context(state, arrays, r, options)

    def put(slots: Array, h: Array, x: Array) -> Array:
        return jnp.where(real[:, None, :, None, None], jnp.stack([h, x], axis=1).astype(slots.dtype), slots)

    state = state._replace(k=put(state.k, h_k, k), v=put(state.v, h_v, v))
    places = jnp.tril(jnp.ones((q.shape[1],) * 2, bool))
    y = _attend(q, state.k, state.v, jnp.broadcast_to(places, (q.shape[0], *places.shape)), arrays)
    inputs = MiniBatch(**options["written"](arrays["maps"], y), reach=None)
    start = Memory(*state.memory[:3])
    o, memory = in_slots(inputs, real, start, arrays["norm"], _settings(options))
    # The place in the mini-batch: segments are whole mini-batches.
    filled = jnp.max(jnp.where(real, jnp.arange(1, q.shape[1] + 1, dtype=jnp.int32), 0), axis=1)
    filled = filled % options["mini_batch"]
    place = jnp.where(real.any(axis=1), filled, state.memory.place)
    state = state._replace(memory=NeuralMemoryState(*memory, place))
    return state, jnp.stack([y, o.astype(y.dtype)], axis=2)


def _settings(options: Options) -> Options:
    return {**options, "loss_scale": 1.0, "epsilon": 1e-6}


def _example_context(maps: Any, h: Array) -> tuple[Array, Array]:
    return h @ maps["context_k"], h @ maps["context_v"]


def _example_written(maps: Any, y: Array) -> dict[str, Array]:
    q, k, v = (y @ maps[name] for name in ("q", "k", "v"))
    theta, alpha, eta = (jax.nn.sigmoid((y @ maps[name])[..., 0]) for name in ("theta", "alpha", "eta"))
    k = k * jax.lax.rsqrt(jnp.sum(k * k, axis=-1, keepdims=True) + 1e-6)
    return {"q": q, "k": k, "v": v, "theta": theta / 4, "alpha": alpha / 4, "eta": eta}


def _examples(key: Array, batch: int, length: int) -> dict[str, Example]:
    keys = iter(jax.random.split(key, 24))
    heads, dim, hidden = 2, 4, 6

    def normal(*shape: int, scale: float = 1.0) -> Array:
        return scale * jax.random.normal(next(keys), shape)

    arrays = {name: normal(batch, length, heads, dim) for name in TIME_ARGS}
    maps = {name: normal(dim, dim, scale=0.5) for name in ("context_k", "context_v", "q", "k", "v")}
    maps |= {name: normal(dim, 1, scale=0.5) for name in ("theta", "alpha", "eta")}
    layers = Linear(normal(heads, dim, hidden, scale=0.5)), Linear(normal(heads, hidden, dim, scale=0.5))
    prefix = {name: normal(3, heads, dim) for name in ("prefix_k", "prefix_v")}
    options = {"context": _example_context, "written": _example_written, "segment": 8, "mini_batch": 4}
    return {"two layers, prefix": Example({**arrays, **prefix, "maps": maps, "weights": layers}, options)}


MEMORY_AS_CONTEXT = SeqOp(
    name="memory_as_context",
    call=memory_as_context,
    time_args=TIME_ARGS,
    step=_step,
    initial_state=_initial_state,
    forms={"chunked": _chunked},
    summary_kind="relay",
    examples=_examples,
    known_gaps={"summary": "what a segment writes depends on what it recalls: a span has no summary"},
)
