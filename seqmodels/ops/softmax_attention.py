"""Causal softmax attention, with a sliding window, attention sinks and grouped heads.

    o_t = sum_j p_tj v_j,    p_tj = exp(s_tj - m_t) / l_t,    s_tj = scale * q_t . k_j                   (1)
    m_t = max_j s_tj,        l_t = sum_j exp(s_tj - m_t)

where j runs over the tokens that t can see: those of its own document, at its position or before it, and with
a window those fewer than `window` positions away or among the first `sinks` of the document; and over a prefix
of keys and values that stands in front of every document and that no window hides. With causal=False j runs over
the whole document and the prefix, with a window over |t - j| < window.

Attention: Vaswani et al. 2017, arXiv 1706.03762. Grouped heads: Ainslie et al. 2023, arXiv 2305.13245. Sinks:
Xiao et al. 2023, arXiv 2309.17453. Prefix: Sukhbaatar et al. 2019, arXiv 1907.01470. The chunked form
(_blockwise_attention.py) takes memory linear in the length, and with a window time too. On TPU splash attention
computes it where it can (_splash_attention.py), on NVIDIA GPUs cuDNN where it is asked for (_cudnn_attention.py).

    code    shape           dtype         meaning
    q       [b, t, h, k]    any float     queries; query head i reads key head i // (h // hk)
    k       [b, t, hk, k]   as q          keys
    v       [b, t, hk, v]   as q          values
    scale                   number        k ** -0.5 unless given
    prefix_k [n, hk, k]     as q          keys of the prefix, prefix_v [n, hk, v] its values; None for no prefix
    m, l    [.., t]         float32       greatest score and sum of exponentials of a query
    p       [.., t, j]      float32       probabilities
    state   `KVCache`       k, v as q     keys and values of the document so far (see _kv_cache.py)

Positions enter through the mask alone; layers that rotate queries and keys do so before.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Float

from seqmodels.errors import InputError
from seqmodels.notation import Array, Keys, Queries, SegmentIds, Values
from seqmodels.ops import _cudnn_attention, _dispatch, _scan, _splash_attention
from seqmodels.ops._blockwise_attention import IN_FRONT, Reach, blockwise_attention, pairs_visited, product, reach, sees
from seqmodels.ops._kv_cache import KVCache, append, emptied, empty_cache, enlarged
from seqmodels.ops._op import Across, Example, Inputs, Kernel, Options, SeqOp
from seqmodels.ops._ring_attention import Attention, Settings, gathered_attention, ring_attention
from seqmodels.ops._scan import Documents
from seqmodels.ops._sequence_parallel import Call, Spread

__all__ = ["SOFTMAX_ATTENTION", "KVCache", "empty_cache", "softmax_attention"]

BLOCK = 128


def softmax_attention(
    q: Queries,
    k: Keys,
    v: Values,
    *,
    prefix_k: Float[Array, "n h k"] | None = None,
    prefix_v: Float[Array, "n h v"] | None = None,
    scale: float | None = None,
    window: int | None = None,
    sinks: int = 0,
    capacity: int | None = None,
    initial_state: KVCache | None = None,
    segment_ids: SegmentIds | Documents | None = None,
    causal: bool = True,
    form: str = "chunked",
    chunk_size: int | None = None,
    backend: str = "auto",
    exchange: str = "auto",
) -> tuple[Float[Array, "b t h v"], KVCache]:
    """Causal softmax attention; equation (1).

    Returns the outputs [b, t, h, v] in q's dtype and the cache of the last document. `window` counts the
    query's own position; None sees everything before. `sinks`: tokens from the start of a document that stay
    visible beside the window. `prefix_k` [n, hk, k], `prefix_v` [n, hk, v]: what every real token sees beside its
    document; not in the cache. `segment_ids` [b, t]: documents, 0 is padding, found only before the first and
    after the last document of a row or between documents; nobody sees padding, and its output is 0.

    The cache has window + sinks slots, whatever the length. Without a window it has `capacity`: by default
    that of `initial_state`, else one for each position of the span. To prefill and then decode with fixed
    shapes, give the length of the whole stream, or start from `empty_cache`. A document longer than that
    raises InputError where the lengths are known; inside jit they are not, and outputs from the first token
    without a slot are NaN.

    causal: False lets every position see its whole document; there are no sinks then, and the state is ().

    Forms: "recurrent", one token at a time; "chunked", in blocks of `chunk_size` queries and keys (default
    128); "parallel", with the whole matrix of probabilities.

    Raises InputError where shapes or dtypes disagree.
    """
    _check(q, k, v, window, sinks, capacity)
    if not causal and sinks:
        raise InputError(f"softmax_attention: sinks={sinks} with causal=False; expected 0, sinks are a decoder's")
    _check_prefix(k, v, prefix_k, prefix_v)
    if not isinstance(initial_state, KVCache | None):
        kind = type(initial_state).__name__
        raise InputError(f"softmax_attention: initial_state is a {kind}; expected a KVCache")
    batch, length, heads, key_dim = k.shape
    if window is not None:
        capacity = window + sinks
    elif capacity is None:
        capacity = length if initial_state is None else initial_state.slots
    if initial_state is not None:
        initial_state = _checked_cache(initial_state, (batch, capacity, heads, key_dim, v.shape[-1]), window)
    if window is None:
        _check_room(initial_state, segment_ids, batch, length, capacity)
    return _dispatch.run(
        SOFTMAX_ATTENTION,
        {"q": q, "k": k, "v": v, "prefix_k": prefix_k, "prefix_v": prefix_v},
        {"scale": scale, "window": window, "sinks": sinks, "capacity": capacity},
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
        backend=backend,
        exchange=exchange,
        causal=causal,
    )


def softmax_attention_flops(
    length: int,
    *,
    heads: int,
    key_dim: int,
    value_dim: int,
    window: int | None = None,
    sinks: int = 0,
    prefix: int = 0,
    chunk_size: int | None = None,
    decoding: bool = False,
) -> float:
    """FLOPs of matrix products for a token: q k^T and P V, masked pairs included.

    In the chunked form over `length` tokens, of the blocks that have pairs to see; in a step, of all slots of the
    cache: `length` of them, with a window those of the window and the sinks. heads: those of q.
    """
    a_pair = 2 * heads * (key_dim + value_dim)
    if decoding:
        return a_pair * (prefix + (length if window is None else window + sinks))
    how = {"prefix": prefix, "window": window, "sinks": sinks, "block": chunk_size or BLOCK}
    return a_pair * pairs_visited(length, **how) / length


def _check(q: Array, k: Array, v: Array, window: int | None, sinks: int, capacity: int | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise InputError(
                f"softmax_attention: {name} has shape {x.shape}; expected [batch, time, heads, channels]"
            )
        if x.dtype != q.dtype:
            raise InputError(f"softmax_attention: {name} is {x.dtype}; expected {q.dtype} as q is")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3] or q.shape[2] % k.shape[2]:
        raise InputError(
            f"softmax_attention: k has shape {k.shape}; expected {(*q.shape[:2], 'heads', q.shape[3])} "
            f"for q, with a number of heads that divides {q.shape[2]}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise InputError(
            f"softmax_attention: v has shape {v.shape}; expected {(*k.shape[:3], 'channels')} for k"
        )
    if window is not None and window < 1:
        raise InputError(
            f"softmax_attention: window={window}; expected None or at least 1, the query's own position"
        )
    if capacity is not None and capacity < 1:
        raise InputError(
            f"softmax_attention: capacity={capacity}; expected None or a positive number of slots"
        )
    if sinks < 0:
        raise InputError(f"softmax_attention: sinks={sinks}; expected a number of tokens")


def _check_prefix(k: Array, v: Array, prefix_k: Array | None, prefix_v: Array | None) -> None:
    if prefix_k is None and prefix_v is None:
        return
    for name, x, like in (("prefix_k", prefix_k, k), ("prefix_v", prefix_v, v)):
        expected = ("n", *like.shape[2:])
        if x is None:
            raise InputError(f"softmax_attention: {name} is None; expected {expected}, or no prefix at all")
        if x.ndim != 3 or x.shape[1:] != like.shape[2:] or x.shape[0] != prefix_k.shape[0]:
            raise InputError(f"softmax_attention: {name} has shape {x.shape}; expected {expected}, n the same in both")
        if x.dtype != like.dtype:
            raise InputError(f"softmax_attention: {name} is {x.dtype}; expected {like.dtype} as q is")


def _checked_cache(cache: KVCache, shape: tuple[int, ...], window: int | None) -> KVCache:
    """The caller's cache with its shapes compared, and enlarged to the capacity that is asked for."""
    batch, capacity, heads, key_dim, value_dim = shape
    expected = jax.eval_shape(lambda: empty_cache(batch, cache.slots, heads, key_dim, value_dim))
    for name, have, want in zip(KVCache._fields, cache, expected):
        if have.shape != want.shape:
            raise InputError(
                f"softmax_attention: initial_state.{name} has shape {have.shape}; expected {want.shape}"
            )
    if cache.slots > capacity or (window is not None and cache.slots != capacity):
        given = "window + sinks" if window is not None else "capacity"
        raise InputError(
            f"softmax_attention: initial_state has {cache.slots} slots; expected {given} = {capacity}"
        )
    return enlarged(cache, capacity)


def _check_room(
    cache: KVCache | None, segment_ids: SegmentIds | Documents | None, batch: int, length: int, capacity: int
) -> None:
    """Refuse a document that outgrows the cache, where the lengths are known."""
    if cache is None and length <= capacity:
        return
    before = jnp.zeros(batch, jnp.int32) if cache is None else cache.length
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((before, segment_ids))):
        return
    with jax.ensure_compile_time_eval():
        known = segment_ids is None or isinstance(segment_ids, Documents)
        docs = segment_ids if known else _scan.documents(segment_ids)
        query = reach(before, docs, length)
        needed = int(jnp.max(query.rank - query.first)) + 1
    if needed > capacity:
        raise InputError(
            f"softmax_attention: a document reaches {needed} tokens and the cache has {capacity} slots; "
            "expected a capacity for the whole stream (capacity=, or the initial_state's), or a window"
        )


def _initial_state(arrays: Inputs, options: Options) -> KVCache:
    k, v = arrays["k"], arrays["v"]
    window = options.get("window")
    if window is not None:
        capacity = window + options.get("sinks", 0)
    else:
        capacity = options.get("capacity") or k.shape[1]
    return empty_cache(k.shape[0], capacity, *k.shape[-2:], v.shape[-1], k.dtype)


def _scale(q: Array, options: Options) -> float:
    scale = options.get("scale")
    return q.shape[-1] ** -0.5 if scale is None else scale


def _grouped(q: Array, key_heads: int) -> Array:
    """[.., h, k] -> [.., hk, g, k]: the g query heads that read one key head, side by side."""
    return q.reshape(*q.shape[:-2], key_heads, -1, q.shape[-1])


def attend(q: Array, k: Array, v: Array, seen: Array, options: Options) -> Array:
    """Equation (1) for q [b, t, h, k], k [b, j, hk, k], v [b, j, hk, v]; seen [b, t, j]: what a query sees.

    In float64 for float64 inputs, which `jax.nn.dot_product_attention` is not.
    """
    seen = seen[:, None, None]
    s = product("bthgk,bjhk->bhgtj", _grouped(q, k.shape[2]), k) * _scale(q, options)
    s = jnp.where(seen, s, jnp.finfo(s.dtype).min)
    p = jnp.where(seen, jnp.exp(s - jnp.max(s, axis=-1, keepdims=True)), 0)
    l = jnp.sum(p, axis=-1, keepdims=True)
    p = p / jnp.where(l > 0, l, 1)
    o = product("bhgtj,bjhv->bthgv", p.astype(v.dtype), v)
    return o.reshape(*q.shape[:3], v.shape[-1]).astype(q.dtype)


def _step(cache: KVCache, arrays: Inputs, options: Options) -> tuple[KVCache, Array]:
    q, k, v = (arrays[name][:, None] for name in "qkv")
    window, sinks = options.get("window"), options.get("sinks", 0)
    now = cache.length[:, None]
    cache = append(cache, k, v, now, cache.length + 1, window, sinks)
    visible = cache.position >= 0
    if window is not None:
        visible &= (now - cache.position < window) | (cache.position < sinks)
    visible = visible[:, None]
    k, v = cache.k, cache.v
    if arrays["prefix_k"] is not None:
        prefix_k, prefix_v = _prefix(arrays, k.shape[0])
        k, v = jnp.concatenate([prefix_k, k], axis=1), jnp.concatenate([prefix_v, v], axis=1)
        visible = jnp.pad(visible, ((0, 0), (0, 0), (prefix_k.shape[1], 0)), constant_values=True)
    o = attend(q, k, v, visible, options)
    return cache, _nan_without_room(o, now, cache, options)[:, 0]


def _prefix(arrays: Inputs, batch: int) -> tuple[Array, Array]:
    """Keys and values of the prefix for every row."""
    return tuple(jnp.broadcast_to(x, (batch, *x.shape)) for x in (arrays["prefix_k"], arrays["prefix_v"]))


def _nan_without_room(o: Array, position: Array, cache: KVCache, options: Options) -> Array:
    """NaN for outputs whose own token found no slot: what misses a key must not look like an answer."""
    if options.get("window") is not None:
        return o
    return jnp.where((position < cache.slots)[..., None, None], o, jnp.nan)


def _with_cache(
    arrays: Inputs, cache: KVCache, docs: Documents | None, options: Options
) -> tuple[Array, Array, Array, Reach]:
    """Keys, values and ranks of prefix, cache and span in one row, and the reach of the span's queries."""
    parts, query = _parts(arrays, None if options.get("fresh", False) else cache, docs, options)
    return *(jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True)), query


def _parts(
    arrays: Inputs, cache: KVCache | None, docs: Documents | None, options: Options
) -> tuple[list[tuple[Array, Array, Array]], Reach]:
    """Keys, values and ranks of the prefix and of the cache, where there are such, and of the span; and the reach of
    its queries."""
    batch, length = arrays["k"].shape[:2]
    query = reach(jnp.zeros(batch, jnp.int32) if cache is None else cache.length, docs, length)
    parts = [(arrays["k"], arrays["v"], query.rank)]
    if cache is not None:
        # In the document of the incoming state a token's rank is its position.
        parts.insert(0, (cache.k, cache.v, cache.position))
    if arrays["prefix_k"] is not None:
        count = arrays["prefix_k"].shape[0]
        parts.insert(0, (*_prefix(arrays, batch), jnp.full((batch, count), IN_FRONT, jnp.int32)))
    return parts, query


def _both_sides(own: Reach, docs: Documents | None, options: Options) -> Reach:
    """The reach of a query that ends at the last token of its document instead of at its own, or with the window."""
    first, last, real = own.first, jnp.full_like(own.rank, own.rank.shape[1] - 1), own.rank >= 0
    if docs is not None:
        count = docs.real.sum(axis=1, keepdims=True, dtype=jnp.int32)
        starts = jnp.where(docs.starts, own.rank, count)
        from_here = jax.lax.cummin(starts, axis=1, reverse=True)
        last = jnp.concatenate([from_here[:, 1:], count], axis=1) - 1
    window = options.get("window")
    if window is not None:
        first, last = jnp.maximum(first, own.rank - window + 1), jnp.minimum(last, own.rank + window - 1)
    return Reach(jnp.where(real, first, 0), jnp.where(real, last, -1))


def _chunked(
    arrays: Inputs, cache: KVCache, docs: Documents | None, chunk_size: int | None, options: Options
) -> tuple[Array, KVCache]:
    q = arrays["q"]
    k, v, key, query = _with_cache(arrays, cache, docs, options)
    o = blockwise_attention(
        _grouped(q, k.shape[2]),
        k,
        v,
        query,
        key,
        scale=_scale(q, options),
        window=options.get("window"),
        sinks=options.get("sinks", 0),
        block=chunk_size or BLOCK,
    )
    o = _nan_without_room(o.reshape(*q.shape[:3], -1), query.rank - query.first, cache, options)
    return o, _final_state(arrays, cache, docs, options)


def _whole(
    arrays: Inputs,
    docs: Documents | None,
    chunk_size: int | None,
    options: Options,
    both_ways: Callable[[Inputs, Options], Array],
) -> Array:
    """In blocks."""
    q = arrays["q"]
    parts, own = _parts(arrays, None, docs, options)
    query = _both_sides(own, docs, options)
    how = {"scale": _scale(q, options), "window": None, "sinks": 0, "block": chunk_size or BLOCK}
    k, v, key = (jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    o = blockwise_attention(_grouped(q, k.shape[2]), k, v, query, key, **how)
    return o.reshape(*q.shape[:3], -1)


def _by_library(
    arrays: Inputs,
    cache: KVCache,
    docs: Documents | None,
    chunk_size: int | None,
    options: Options,
    attend: Callable[..., Array],
    **how: Any,
) -> tuple[Array, KVCache]:
    o = attend(arrays, docs, chunk_size, options, **how)
    if docs is not None:
        o = jnp.where(docs.real[..., None, None], o, 0)
    query = reach(cache.length, docs, o.shape[1])
    o = _nan_without_room(o, query.rank - query.first, cache, options)
    return o, _final_state(arrays, cache, docs, options)


def _parallel(
    arrays: Inputs, cache: KVCache, docs: Documents | None, chunk_size: int | None, options: Options
) -> tuple[Array, KVCache]:
    q = arrays["q"]
    k, v, key, query = _with_cache(arrays, cache, docs, options)
    queries = jax.tree.map(lambda x: x[..., None], query)
    seen = sees(queries, key[:, None], options.get("window"), options.get("sinks", 0))
    o = attend(q, k, v, seen, options)
    o = _nan_without_room(o, query.rank - query.first, cache, options)
    return o, _final_state(arrays, cache, docs, options)


def _reach(arrays: Inputs, options: Options) -> int | None:
    """A window looks back so far; with sinks to the start, though what it keeps has a fixed size."""
    return sys.maxsize if options.get("sinks", 0) else options.get("window")


def _across(call: Call, spread: Spread, exchange: str, causal: bool) -> tuple[Array, KVCache]:
    """Over shards of the time axis; the cache of the last document is whole on every device."""
    options, chunk_size = call.options, call.chunk_size
    parts, query = _parts(call.arrays, call.state, call.docs, options)
    (k, v, key), front = parts[-1], parts[:-1]
    if not causal:
        query = _both_sides(query, call.docs, options)
    settings = Settings(
        _scale(call.arrays["q"], options),
        options.get("window") if causal else None,
        options.get("sinks", 0),
        chunk_size or BLOCK,
        call.line.size,
        causal,
    )
    front = tuple(jnp.concatenate(part, axis=1) for part in zip(*front, strict=True)) if front else None

    def shard(q: Array, k: Array, v: Array, query: Reach, key: Array, front: tuple | None) -> Array:
        k, v = (spread.own_heads({"k": x})["k"] for x in (k, v))
        if front is not None:
            front = (*(spread.own_heads({"k": x})["k"] for x in front[:2]), front[2])
        attend = {"ring": ring_attention, "gather": gathered_attention}[exchange]
        o = attend(Attention(_grouped(q, k.shape[2]), k, v, query, key, front), settings)
        return o.reshape(*q.shape[:3], -1)

    specs, of_front, of_time = spread.of_arrays(call.arrays), None, spread.of_time
    if front is not None:
        whole = PartitionSpec(spread.rows, None, *specs["k"][2:])
        of_front = (whole, whole, PartitionSpec(spread.rows))
    specs = (*(specs[name] for name in "qkv"), of_time, of_time, of_front)
    run = spread.shard_map(shard, specs, spread.of_output)
    o = run(call.arrays["q"], k, v, query, key, front)
    if not causal:
        return o, ()
    start = call.start
    o = _nan_without_room(o, query.rank - query.first, start, options)
    return o, _final_state(call.arrays, start, call.docs, options)


def _final_state(arrays: Inputs, cache: KVCache, docs: Documents | None, options: Options) -> KVCache:
    """The cache with the span's tokens of its last document."""
    k, v = arrays["k"], arrays["v"]
    if docs is None:
        position = cache.length[:, None] + jnp.arange(k.shape[1], dtype=jnp.int32)
    else:
        cache = _scan.where_row(docs.index[:, -1] > 0, emptied(cache), cache)
        mine = docs.real & (docs.index == docs.index[:, -1:])
        position = jnp.where(mine, cache.length[:, None] + jnp.cumsum(mine, axis=1, dtype=jnp.int32) - 1, -1)
    length = jnp.maximum(cache.length, jnp.max(position, axis=1) + 1)
    return append(cache, k, v, position, length, options.get("window"), options.get("sinks", 0))


class CacheSummary(NamedTuple):
    """What a span does to any cache: forget it if a document started, then append what the span left.

    cache    the span's own, filled from nothing; positions count from the span's start, or from that of its
             last document. With the first `sinks` and the last `window` tokens (or all): no other could stay
    starts   [b] bool: whether a document started in the span
    """

    cache: KVCache
    starts: Array


def _summarize(arrays: Inputs, docs: Documents | None, options: Options) -> CacheSummary:
    k = arrays["k"]
    cache = _final_state(arrays, _initial_state(arrays, {**options, "capacity": k.shape[1]}), docs, options)
    starts = jnp.zeros(k.shape[0], bool) if docs is None else docs.index[:, -1] > 0
    return CacheSummary(cache, starts)


def _apply(summary: CacheSummary, cache: KVCache, options: Options) -> KVCache:
    cache = _scan.where_row(summary.starts, emptied(cache), cache)
    k, v, position, length = summary.cache
    position = jnp.where(position < 0, -1, position + cache.length[:, None])
    return append(
        cache, k, v, position, length + cache.length, options.get("window"), options.get("sinks", 0)
    )


def _combine(earlier: CacheSummary, later: CacheSummary, options: Options) -> CacheSummary:
    cache = earlier.cache
    if options.get("window") is None:
        cache = enlarged(cache, cache.slots + later.cache.slots)
    return CacheSummary(_apply(later, cache, options), earlier.starts | later.starts)


def _examples(key: Array, batch: int, length: int) -> dict[str, Example]:
    """Without a window the cache has room for the span twice, so that a test may also continue it."""
    q, k, v = (
        jax.random.normal(each, (batch, length, heads, dim))
        for each, heads, dim in zip(jax.random.split(key, 3), (4, 2, 2), (8, 8, 6))
    )
    grouped = {"q": q, "k": k, "v": v}
    single = {"q": q[:, :, :2], "k": k, "v": v}
    room = {"capacity": 2 * length}
    prefix_dims = {"prefix_k": 8, "prefix_v": 6}
    prefix = {
        name: jax.random.normal(jax.random.fold_in(key, dim), (3, 2, dim)) for name, dim in prefix_dims.items()
    }
    return {
        "full, V != K": Example(single, room),
        "grouped heads": Example(grouped, {**room, "scale": 0.5}),
        "window 5": Example(single, {"window": 5}),
        "window 4, 3 sinks, grouped heads, prefix": Example({**grouped, **prefix}, {"window": 4, "sinks": 3}),
        "scores in the thousands": Example({"q": 30 * q, "k": 30 * k, "v": v}, room, extreme=True),
    }


SOFTMAX_ATTENTION = SeqOp(
    name="softmax_attention",
    call=softmax_attention,
    time_args=("q", "k", "v"),
    step=_step,
    initial_state=_initial_state,
    forms={"chunked": _chunked, "parallel": _parallel},
    kernels={
        "pallas_tpu": Kernel(
            "tpu", _splash_attention.supports, functools.partial(_by_library, attend=_splash_attention.attend)
        ),
        # It has not run yet.
        "cudnn": Kernel(
            "cuda",
            _cudnn_attention.supports,
            functools.partial(_by_library, attend=_cudnn_attention.attend),
            automatic=False,
        ),
    },
    summarize=_summarize,
    combine=_combine,
    apply=_apply,
    summary_kind="ring",
    head_axes={"q": 2, "k": 2, "v": 2, "prefix_k": 1, "prefix_v": 1},
    reach=_reach,
    advance=lambda cache, n: cache._replace(length=cache.length + n),
    across=Across(("k", "v"), _across),
    examples=_examples,
    whole=_whole,
    # With a window the bytes are constant; without, they are those of the capacity.
    state_grows=True,
)
