"""The matrix LSTM of xLSTM: linear attention with a forget gate, an exponential input gate, and a bounded normaliser.

    C_t = exp(g_t) C_{t-1} + exp(i_t) k_t^T v_t          n_t = exp(g_t) n_{t-1} + exp(i_t) k_t                     (1)
    o_t = q_t C_t / max(|q_t . n_t|, 1)                                                                           (2)

(Beck et al. 2024, arXiv 2405.04517; in chunks: Beck et al. 2025, arXiv 2503.14376; without the output gate, which is
the layer's.) exp(i) has no bound, so C and n are kept relative to exp(m), m the largest log weight of any token:

    m_t = max(g_t + m_{t-1}, i_t)                                                                                 (3)
    C_t = exp(g_t + m_{t-1} - m_t) C_{t-1} + exp(i_t - m_t) k_t^T v_t                      n_t likewise            (4)
    o_t = q_t C_t / (max(|q_t . n_t|, exp(-m_t)) + 1e-6)                                                          (5)

with the 1e-6 of the authors' code (NX-AI/mlstm_kernels), from m_0 = 0.

    code    symbol        shape             range, dtype
    q, k    q, k          [b, t, h, k]      any float; q is multiplied by `scale`
    v       v             [b, t, hv, v]     any float; hv is a multiple of h, head j reads q, k of head j // (hv / h)
    g       log f         [b, t, hv]        <= 0, natural log of the forget gate, float32
    i       log i         [b, t, hv]        natural log of the input gate, float32
    C       C             [b, hv, k, v]     float32
    n       n             [b, hv, k]        float32
    m       m             [b, hv]           float32

With m known, (4) is linear attention with decay g_t + m_{t-1} - m_t <= 0, whose values are exp(i_t - m_t) [v_t, 1]; the
last column of its state is n. That is the chunked form. m itself is a prefix scan over the gates alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from seqmodels.errors import InputError
from seqmodels.notation import Array, Keys, MatrixState, Normaliser, Queries, ScalarDecay, SegmentIds, Values
from seqmodels.ops import _dispatch, _linear_attention_chunked, _scan
from seqmodels.ops._arguments import check_log_decay, check_qkv
from seqmodels.ops._op import Example, Inputs, Options, SeqOp
from seqmodels.ops._scan import Documents
from seqmodels.ops.linear_attention import linear_attention_flops

EPSILON = 1e-6


class MLSTMState(NamedTuple):
    """C and n of equation (4), relative to exp(m)."""

    C: MatrixState
    n: Normaliser
    m: Float[Array, "b h"]


def mlstm(
    q: Queries,
    k: Keys,
    v: Values,
    g: ScalarDecay,
    i: Float[Array, "b t h"],
    *,
    scale: float | None = None,
    initial_state: MLSTMState | None = None,
    segment_ids: SegmentIds | Documents | None = None,
    causal: bool = True,
    form: str = "chunked",
    chunk_size: int | None = None,
    backend: str = "auto",
    exchange: str = "auto",
) -> tuple[Values, MLSTMState]:
    """The matrix LSTM without its output gate, equations (3) to (5).

    Returns o [b, t, hv, v] in v's dtype and the final `MLSTMState`.

    g, i: logarithms of the forget and of the input gate. A forget gate sigmoid(f) has g = log_sigmoid(f).
    scale: factor on q; None is k ** -0.5.
    initial_state: a final state; it belongs to the document of the first real token.
    segment_ids: [b, t] document numbers; the state is forgotten where they change, 0 is padding.
    causal: False adds the outputs of the reversed span, each document reversed in its place. The state is ().
    form: "recurrent" (`lax.scan` of the definition), "chunked" (training), "parallel" (quadratic).
    chunk_size: positions per chunk; None is that of `linear_attention`.

    Raises InputError where shapes disagree, and outside of jit for decays above 0.
    """
    _check(q, k, v, g, i)
    g, i = (x.astype(_scan.state_dtype(x)) for x in (g, i))
    return _dispatch.run(
        MLSTM,
        {"q": q, "k": k, "v": v, "g": g, "i": i},
        {"scale": q.shape[-1] ** -0.5 if scale is None else scale},
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
        backend=backend,
        exchange=exchange,
        causal=causal,
    )


def mlstm_flops(length: int, *, heads: int, key_dim: int, value_dim: int, **how: Any) -> float:
    """FLOPs of matrix products for a token: those of linear attention with a scalar decay, n one more value channel.

    how: key_heads, chunk_size, decoding as for `linear_attention_flops`.
    """
    return linear_attention_flops(length, heads=heads, key_dim=key_dim, value_dim=value_dim + 1, decays=1, **how)


def zero_state(batch: int, heads: int, key_dim: int, value_dim: int) -> MLSTMState:
    """The state before the first token, in float32."""
    dims = (batch, heads, key_dim)
    return MLSTMState(jnp.zeros((*dims, value_dim)), jnp.zeros(dims), jnp.zeros(dims[:2]))


def _check(q: Array, k: Array, v: Array, g: Array, i: Array) -> None:
    check_qkv("mlstm", q, k, v)
    for name, x in (("g", g), ("i", i)):
        if x.shape != v.shape[:3]:
            raise InputError(f"mlstm: {name} has shape {x.shape}; expected {v.shape[:3]}, a number per head of v")
    check_log_decay("mlstm", g)


def _initial_state(arrays: Inputs, options: Options) -> MLSTMState:
    q, v = arrays["q"], arrays["v"]
    dtype = _scan.state_dtype(*(arrays[name] for name in "qkvgi"))
    state = zero_state(v.shape[0], v.shape[2], q.shape[3], v.shape[3])
    return jax.tree.map(lambda x: x.astype(dtype), state)


def _step(state: MLSTMState, arrays: Inputs, options: Options) -> tuple[MLSTMState, Array]:
    C, n, m = state
    q, k, v, g, i = (arrays[name] for name in "qkvgi")
    q, k = (jnp.repeat(x, v.shape[1] // x.shape[1], axis=1).astype(C.dtype) for x in (q * options["scale"], k))
    m_after = jnp.maximum(g + m, i)
    keep, add = jnp.exp(g + m - m_after), jnp.exp(i - m_after)
    C = keep[..., None, None] * C + add[..., None, None] * k[..., :, None] * v[..., None, :]
    n = keep[..., None] * n + add[..., None] * k
    o = _read(jnp.einsum("bhk,bhkv->bhv", q, C), jnp.einsum("bhk,bhk->bh", q, n), m_after)
    return MLSTMState(C, n, m_after), o.astype(v.dtype)


def _read(qC: Array, qn: Array, m: Array) -> Array:
    """Equation (5), both sides of the fraction times exp(m) where m < 0: so no exponent is positive."""
    unit, one = jnp.exp(jnp.minimum(m, 0)), jnp.exp(-jnp.maximum(m, 0))
    return qC * (unit / (jnp.maximum(unit * jnp.abs(qn), one) + unit * EPSILON))[..., None]


def _largest_weights(arrays: Inputs, docs: Documents | None) -> tuple[Array, Array]:
    """F and M, [b, t, h] each, such that m_t = max(F_t + m_0, M_t): equation (3) over prefixes of the span.

    A document that starts in the span has a zero m before its first token, and what was before it has no say.
    """
    F, M = arrays["g"], arrays["i"]
    if docs is not None:
        start, real = docs.starts[..., None], docs.real[..., None]
        F, M = jnp.where(start, -jnp.inf, F), jnp.where(start, jnp.maximum(F, M), M)
        F, M = jnp.where(real, F, 0), jnp.where(real, M, -jnp.inf)

    def follow(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
        return earlier[0] + later[0], jnp.maximum(earlier[1] + later[0], later[1])

    return jax.lax.associative_scan(follow, (F, M), axis=1)


def _chunked(
    arrays: Inputs, state: MLSTMState, docs: Documents | None, chunk_size: int | None, options: Options
) -> tuple[Array, MLSTMState]:
    """Linear attention on [v, 1], with the gates relative to m."""
    q, k, v, g, i = (arrays[name] for name in "qkvgi")
    F, M = _largest_weights(arrays, docs)
    m = jnp.maximum(F + state.m[:, None], M)
    before = jnp.concatenate([state.m[:, None], m[:, :-1]], axis=1)
    decay, add = jnp.minimum(g + before - m, 0), jnp.exp(jnp.minimum(i - m, 0))
    if docs is not None:
        decay = jnp.where(docs.starts[..., None], 0, decay)
    values = add[..., None] * jnp.pad(v.astype(m.dtype), ((0, 0),) * 3 + ((0, 1),), constant_values=1)
    S = jnp.concatenate([state.C, state.n[..., None]], axis=-1)
    o, S, _ = _linear_attention_chunked.chunked(
        q, k, values, decay, S, None, docs, scale=options["scale"], chunk_size=chunk_size
    )
    o = _read(o[..., :-1], o[..., -1], m)
    return o.astype(v.dtype), MLSTMState(S[..., :-1], S[..., -1], m[:, -1])


def _parallel(
    arrays: Inputs, state: MLSTMState, docs: Documents | None, chunk_size: int | None, options: Options
) -> tuple[Array, MLSTMState]:
    """All pairs at once: O(t^2). For reading and for tests."""
    C, n, m_before = state
    q, k, v, g, i = (arrays[name] for name in "qkvgi")
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2).astype(C.dtype) for x in (q * options["scale"], k))
    index = jnp.zeros(q.shape[:2], jnp.int32) if docs is None else docs.index
    real = jnp.ones(q.shape[:2], bool) if docs is None else docs.real
    start = jnp.diff(index, axis=1, prepend=0)[..., None] > 0
    b = jnp.cumsum(jnp.where(real[..., None], g, 0), axis=1)
    # 1. Log weights of token j and of the incoming state at position t, and the largest of them, [b, t, j, h].
    pairs = (jnp.tril(index[:, :, None] == index[:, None]) & real[:, None])[..., None]
    enters = (index == 0)[..., None]
    decays = b[:, :, None] - b[:, None]
    peaks = decays + jnp.where(start, jnp.maximum(g, i), i)[:, None]
    m = jnp.max(jnp.where(pairs, peaks, -jnp.inf), axis=2)
    m = jnp.maximum(m, jnp.where(enters, b + m_before[:, None], -jnp.inf))
    # 2. The weights.
    P = jnp.where(pairs, jnp.exp(jnp.minimum(decays + i[:, None] - m[:, :, None], 0)), 0)
    p = jnp.where(enters, jnp.exp(jnp.minimum(b + m_before[:, None] - m, 0)), 0)
    # 3. Equations (4) and (5).
    A, q_in = P * jnp.einsum("bihk,bjhk->bijh", q, k), p[..., None] * q
    qC = jnp.einsum("bijh,bjhv->bihv", A, v) + jnp.einsum("bihk,bhkv->bihv", q_in, C)
    qn = A.sum(axis=2) + jnp.einsum("bihk,bhk->bih", q_in, n)
    o = jnp.where(real[..., None, None], _read(qC, qn, m), 0).astype(v.dtype)
    k_out, p_out = P[:, -1, ..., None] * k, p[:, -1, :, None]
    C = p_out[..., None] * C + jnp.einsum("bjhk,bjhv->bhkv", k_out, v)
    return o, MLSTMState(C, p_out * n + k_out.sum(axis=1), m[:, -1])


class MLSTMSummary(NamedTuple):
    """What a span does to a state: let it decay, or forget it where a document started, and add what it wrote itself.

    decay     [b, h] log decay over the span
    starts    [b, 1] bool: a document started
    writes    [b, 1] bool: the span has a real token; otherwise `written` has no say in m
    written   the sums over the tokens of the span's last document, relative to the largest of their weights
    """

    decay: Array
    starts: Array
    writes: Array
    written: MLSTMState


def _merge(earlier: MLSTMState, has_earlier: Array, later: MLSTMState, has_later: Array) -> MLSTMState:
    """The sum of two states, each of which counts only where told so."""
    m = jnp.where(has_later, jnp.maximum(earlier.m, later.m), earlier.m)
    m = jnp.where(has_earlier, m, later.m)

    def relative_to_m(x: MLSTMState, counts: Array) -> tuple[Array, Array]:
        keep = jnp.where(counts, jnp.exp(jnp.where(counts, x.m - m, 0)), 0)
        return keep[..., None, None] * x.C, keep[..., None] * x.n

    sides = relative_to_m(earlier, has_earlier), relative_to_m(later, has_later)
    return MLSTMState(*(a + b for a, b in zip(*sides)), m)


def _decayed(state: MLSTMState, by: MLSTMSummary) -> MLSTMState:
    return state._replace(m=state.m + by.decay)


def _apply(summary: MLSTMSummary, state: MLSTMState, options: Options) -> MLSTMState:
    return _merge(_decayed(state, summary), ~summary.starts, summary.written, summary.writes)


def _combine(earlier: MLSTMSummary, later: MLSTMSummary, options: Options) -> MLSTMSummary:
    still_there = earlier.writes & ~later.starts
    return MLSTMSummary(
        earlier.decay + later.decay,
        earlier.starts | later.starts,
        earlier.writes | later.writes,
        _merge(_decayed(earlier.written, later), still_there, later.written, later.writes),
    )


def _summarize(arrays: Inputs, docs: Documents | None, options: Options) -> MLSTMSummary:
    """`written` is the final state from an empty one, whose m is so low that it is not the largest at the end."""
    F, M = (x[:, -1] for x in _largest_weights(arrays, docs))
    g, rows = arrays["g"], F[:, :1]
    starts, writes = jnp.zeros_like(rows, bool), jnp.ones_like(rows, bool)
    if docs is not None:
        starts, writes = docs.index[:, -1:] > 0, docs.real.any(axis=1, keepdims=True)
        g = jnp.where(docs.real[..., None], g, 0)
    empty = _initial_state(arrays, options)._replace(m=jnp.where(starts | ~writes, 0, M - F))
    _, written = _chunked(arrays, empty, docs, None, options)
    return MLSTMSummary(g.sum(axis=1), starts, writes, written)


def _examples(key: Array, batch: int, length: int) -> dict[str, Example]:
    keys = jax.random.split(key, 5)
    heads, key_dim, value_dim = 2, 4, 3
    q, k = (jax.random.normal(x, (batch, length, heads, key_dim)) for x in keys[:2])
    v = jax.random.normal(keys[2], (batch, length, heads, value_dim))
    g = jax.nn.log_sigmoid(1 + jax.random.normal(keys[3], (batch, length, heads)))
    i = 2 * jax.random.normal(keys[4], (batch, length, heads))
    arrays = {"q": q, "k": k, "v": v, "g": g, "i": i}
    grouped = {**arrays, "q": q[:, :, :1], "k": k[:, :, :1], "i": i - 10}
    limits = jnp.broadcast_to(jnp.array([-50.0, -1e-6]), g.shape)
    return {
        "gates from the input": Example(arrays, {}),
        "grouped heads, closed input gates": Example(grouped, {"scale": 1.0}),
        "input gates beyond exp": Example({**arrays, "i": 50 * i}, {}, extreme=True),
        "strong and weak decay": Example({**arrays, "g": limits}, {}, extreme=True),
    }


MLSTM = SeqOp(
    name="mlstm",
    call=mlstm,
    time_args=("q", "k", "v", "g", "i"),
    step=_step,
    initial_state=_initial_state,
    forms={"chunked": _chunked, "parallel": _parallel},
    summarize=_summarize,
    combine=_combine,
    apply=_apply,
    summary_kind="prefix",
    head_axes={"q": 2, "k": 2, "v": 2, "g": 2, "i": 2},
    examples=_examples,
)
