"""Aaren, attention as a recurrent network: the softmax attention of one learned query over everything before.

    s_t = scale query . k_t                                                                                       (1)
    o_t = sum_{j <= t} exp(s_j) v_j / sum_{j <= t} exp(s_j)                                                       (2)

(Feng et al. 2024, arXiv 2405.13956.) The query is a parameter, the same at every position, so the sums go on from one
position to the next. They are kept relative to the largest score so far, which leaves no positive exponent:

    m_t = max(m_{t-1}, s_t)                                                                                       (3)
    u_t = exp(m_{t-1} - m_t) u_{t-1} + exp(s_t - m_t)                                                             (4)
    w_t = exp(m_{t-1} - m_t) w_{t-1} + exp(s_t - m_t) v_t                                                         (5)
    o_t = w_t / u_t                                                                                               (6)

The (m, u, w) of two adjacent spans compose in the same way, and a token alone is (s_t, 1, v_t): `_merge`. That is an
associative operation, so a prefix scan gives every o_t; the parallel form is that scan.

    code    symbol   shape          range, dtype
    query   q        [h, k]         any float
    k       k        [b, t, h, k]   any float
    v       v        [b, t, h, v]   any float
    m       m        [b, h]         float32, the largest score
    u       u        [b, h]         float32, at least 1; 0 where no token was seen, and then m and w are 0 too
    w       w        [b, h, v]      float32
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from seqmodels.errors import InputError
from seqmodels.notation import Array, Keys, SegmentIds, Values
from seqmodels.ops import _dispatch, _scan
from seqmodels.ops._aaren_chunked import AarenState, chunk_of, chunked
from seqmodels.ops._chunks import positions_per_token
from seqmodels.ops._op import Example, Inputs, Kernel, Options, SeqOp
from seqmodels.ops._scan import Documents


def aaren(
    k: Keys,
    v: Values,
    query: Float[Array, "h k"],
    *,
    scale: float | None = None,
    initial_state: AarenState | None = None,
    segment_ids: SegmentIds | Documents | None = None,
    causal: bool = True,
    form: str = "chunked",
    chunk_size: int | None = None,
    backend: str = "auto",
    exchange: str = "auto",
) -> tuple[Values, AarenState]:
    """Softmax attention of one query per head over the prefix of every position, equations (1) and (2).

    Returns o [b, t, h, v] in v's dtype and the final `AarenState`.

    scale: factor of the scores; None is k ** -0.5.
    initial_state: a final state; it belongs to the document of the first real token.
    segment_ids: [b, t] document numbers; the state is forgotten where they change, 0 is padding.
    causal: False takes the sums in (2) over the whole document. The state is ().
    form: "recurrent" (`lax.scan` of the definition), "chunked" (training), "parallel" (a prefix scan over all tokens).
    chunk_size: positions per chunk; None is 32.

    Raises InputError where shapes disagree.
    """
    if k.ndim != 4:
        raise InputError(f"aaren: k has shape {k.shape}; expected [batch, time, heads, key channels]")
    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise InputError(f"aaren: v has shape {v.shape}; expected {k.shape[:3]} as k has, and value channels")
    if query.shape != k.shape[2:]:
        raise InputError(f"aaren: query has shape {query.shape}; expected {k.shape[2:]}, heads and channels of k")
    return _dispatch.run(
        AAREN,
        {"k": k, "v": v, "query": query},
        {"scale": k.shape[-1] ** -0.5 if scale is None else scale},
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
        backend=backend,
        exchange=exchange,
        causal=causal,
    )


def empty_state(batch: int, heads: int, value_dim: int) -> AarenState:
    """The state before the first token, in float32."""
    return AarenState(jnp.zeros((batch, heads)), jnp.zeros((batch, heads)), jnp.zeros((batch, heads, value_dim)))


def aaren_flops(
    length: int, *, heads: int, key_dim: int, value_dim: int, chunk_size: int | None = None, decoding: bool = False
) -> float:
    """FLOPs of matrix products for a token, in the chunked form over `length` tokens, or in a step."""
    scores = 2 * heads * key_dim  # with the one query
    if decoding:
        return scores
    size = chunk_of(length, chunk_size)
    return scores + positions_per_token(length, size) * 2 * size * heads * value_dim  # P V


def _initial_state(arrays: Inputs, options: Options) -> AarenState:
    k, v = arrays["k"], arrays["v"]
    dtype = _scan.state_dtype(k, v, arrays["query"])
    return jax.tree.map(lambda x: x.astype(dtype), empty_state(v.shape[0], *v.shape[2:]))


def _scores(arrays: Inputs, options: Options) -> Array:
    """Equation (1), in the state's dtype and at full precision, which a TPU's products have only when asked."""
    k, query = arrays["k"], arrays["query"]
    dtype = _scan.state_dtype(k, arrays["v"], query)
    query = options["scale"] * query.astype(dtype)
    return jnp.einsum("...hk,hk->...h", k.astype(dtype), query, precision="highest")


def _step(state: AarenState, arrays: Inputs, options: Options) -> tuple[AarenState, Array]:
    m, u, w = state
    s, v, seen = _scores(arrays, options), arrays["v"], u > 0
    m_after = jnp.where(seen, jnp.maximum(m, s), s)
    keep = jnp.where(seen, jnp.exp(jnp.where(seen, m - m_after, 0)), 0)
    add = jnp.exp(s - m_after)
    u = keep * u + add
    w = keep[..., None] * w + add[..., None] * v
    return AarenState(m_after, u, w), (w / u[..., None]).astype(v.dtype)


def _chunked(
    arrays: Inputs, state: AarenState, docs: Documents | None, chunk_size: int | None, options: Options
) -> tuple[Array, AarenState]:
    return chunked(_scores(arrays, options), arrays["v"], state, docs, chunk_size=chunk_size)


def _kernel(platform: str, name: str, *, automatic: bool = True) -> Kernel:
    """Of the module of this name, which has the functions of `pallas_kernels.tpu.aaren`.

    It is imported when it is first asked: a program without kernels need not load Pallas.
    """

    def supports(arrays: Inputs, options: Options) -> str | None:
        # On a GPU the size of a chunk is a part of the kernel.
        size = {"chunk_size": options["chunk_size"]} if platform == "cuda" else {}
        return importlib.import_module(name).supports(arrays["k"], arrays["v"], **size)

    def call(
        arrays: Inputs,
        state: AarenState,
        docs: Documents | None,
        *,
        chunk_size: int | None,
        options: Options,
        **how: Any,
    ) -> tuple[Array, AarenState]:
        index, real = (None, None) if docs is None else (docs.index, docs.real)
        how = {"scale": options["scale"], "chunk_size": chunk_size, **how}
        kernel = importlib.import_module(name).aaren
        o, state = kernel(arrays["k"], arrays["v"], arrays["query"], *state, index, real, **how)
        return o if docs is None else _scan.zero_at_padding(docs, o)[0], AarenState(*state)

    return Kernel(platform, supports, call, automatic)


def _whole(
    arrays: Inputs,
    docs: Documents | None,
    chunk_size: int | None,
    options: Options,
    both_ways: Callable[[Inputs, Options], Array],
) -> Array:
    """Equation (2) over the whole document: one output, the same at all its positions."""
    s, v = _scores(arrays, options), arrays["v"]
    if docs is None:
        p = jax.nn.softmax(s, axis=1)
        return jnp.broadcast_to(jnp.einsum("bth,bthv->bhv", p, v)[:, None], v.shape).astype(v.dtype)

    def row(s: Array, v: Array, index: Array, real: Array) -> Array:
        totals = {"segment_ids": index, "num_segments": index.shape[0]}
        s = jnp.where(real[:, None], s, jnp.finfo(s.dtype).min)
        m = jax.lax.stop_gradient(jax.ops.segment_max(s, **totals)[index])
        p = jnp.where(real[:, None], jnp.exp(s - m), 0)
        u, w = (jax.ops.segment_sum(x, **totals)[index] for x in (p, p[..., None] * v))
        return jnp.where(real[:, None, None], w / jnp.where(u > 0, u, 1)[..., None], 0)

    return jax.vmap(row)(s, v, docs.index, docs.real).astype(v.dtype)


class AarenSummary(NamedTuple):
    """What a span does to a state: forget it where a document started, then merge it with what the span saw.

    through: [b, 1], 0 where a document started, else 1
    """

    through: Array
    written: AarenState


def _merge(earlier: AarenState, later: AarenState) -> AarenState:
    """The state after two spans, from that of each alone; one that saw nothing has no say in m."""
    m = jnp.where(later.u > 0, jnp.maximum(earlier.m, later.m), earlier.m)
    m = jnp.where(earlier.u > 0, m, later.m)

    def relative_to_m(x: AarenState) -> tuple[Array, Array]:
        keep = jnp.where(x.u > 0, jnp.exp(jnp.where(x.u > 0, x.m - m, 0)), 0)
        return keep * x.u, keep[..., None] * x.w

    (u_earlier, w_earlier), (u_later, w_later) = relative_to_m(earlier), relative_to_m(later)
    return AarenState(m, u_earlier + u_later, w_earlier + w_later)


def _apply(summary: AarenSummary, state: AarenState, options: Options) -> AarenState:
    m, u, w = state
    through = summary.through
    return _merge(AarenState(through * m, through * u, through[..., None] * w), summary.written)


def _combine(earlier: AarenSummary, later: AarenSummary, options: Options) -> AarenSummary:
    return AarenSummary(earlier.through * later.through, _apply(later, earlier.written, options))


def _summarize(arrays: Inputs, docs: Documents | None, options: Options) -> AarenSummary:
    empty = _initial_state(arrays, options)
    _, written = _chunked(arrays, empty, docs, None, options)
    if docs is None:
        return AarenSummary(jnp.ones_like(written.m[:, :1]), written)
    return AarenSummary((docs.index[:, -1:] == 0).astype(written.m.dtype), written)


def _parallel(
    arrays: Inputs, state: AarenState, docs: Documents | None, chunk_size: int | None, options: Options
) -> tuple[Array, AarenState]:
    """A prefix scan of `_combine` over the tokens: O(t) states in memory, O(log t) steps."""
    s, v = _scores(arrays, options), arrays["v"]
    tokens = AarenState(s, jnp.ones_like(s), v.astype(s.dtype))
    through = jnp.ones_like(s[..., :1])
    if docs is not None:
        real = docs.real[..., None]
        tokens = AarenState(*(jnp.where(mask, x, 0) for mask, x in zip((real, real, real[..., None]), tokens)))
        through = jnp.where(docs.starts[..., None], 0, through)

    def follow(earlier: AarenSummary, later: AarenSummary) -> AarenSummary:
        return _combine(earlier, later, options)

    prefixes = jax.lax.associative_scan(follow, AarenSummary(through, tokens), axis=1)
    _, u, w = after = _apply(prefixes, jax.tree.map(lambda x: x[:, None], state), options)
    o = (w / jnp.where(u > 0, u, 1)[..., None]).astype(v.dtype)
    o = o if docs is None else jnp.where(docs.real[..., None, None], o, 0)
    return o, jax.tree.map(lambda x: x[:, -1], after)


def _examples(key: Array, batch: int, length: int) -> dict[str, Example]:
    keys = jax.random.split(key, 3)
    heads, key_dim, value_dim = 2, 4, 3
    arrays = {
        "k": jax.random.normal(keys[0], (batch, length, heads, key_dim)),
        "v": jax.random.normal(keys[1], (batch, length, heads, value_dim)),
        "query": jax.random.normal(keys[2], (heads, key_dim)),
    }
    return {
        "one query": Example(arrays, {}),
        "scores beyond exp": Example(arrays, {"scale": 400.0}, extreme=True),
    }


AAREN = SeqOp(
    name="aaren",
    call=aaren,
    time_args=("k", "v"),
    step=_step,
    initial_state=_initial_state,
    forms={"chunked": _chunked, "parallel": _parallel},
    kernels={
        "pallas_tpu": _kernel("tpu", "pallas_kernels.tpu.aaren"),
        "pallas_gpu": _kernel("cuda", "pallas_kernels.gpu.aaren", automatic=False),
    },
    summarize=_summarize,
    combine=_combine,
    apply=_apply,
    summary_kind="prefix",
    head_axes={"k": 2, "v": 2, "query": 0},
    examples=_examples,
    whole=_whole,
)
