"""Linear attention with optional decay: one operator for a family of mixers.

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t                                                                      (1)
    o_t = scale q_t S_t                                                                                           (2)
    z_t = diag(exp(g_t)) z_{t-1} + k_t;   o_t = q_t S_t / (q_t z_t + 1e-6)      with normalize=True                (3)

With causal=False every position sees its whole document, each token once:

    o_i = scale sum_j D_ij (q_i k_j) v_j,   D_ij = exp(sum of g over j < m <= i), or over i <= m < j where j > i  (4)

(normalize=True divides by the same sum with 1 for v_j, plus 1e-6). The tokens behind i are what a causal reader of the
reversed document sees, so the result of a reversed document is the reversed result, and (4) is (1), (2) over the span,
plus the same over the reversed span, less the diagonal that both count.

    g             mixer                                   source
    None          linear attention, after a feature map   Katharopoulos et al. 2020, 2006.16236
    [h]           retention; lightning attention          Sun et al. 2023, 2307.08621; Qin et al. 2024, 2401.04658
    [b, t, h]     simple GLA, Mamba-2                     Dao, Gu 2024, 2405.21060
    [b, t, h, k]  gated linear attention                  Yang et al. 2023, 2312.06635

    code    symbol   shape            range, dtype
    q, k    q, k     [b, t, h, k]     any float
    v       v        [b, t, hv, v]    any float; hv is a multiple of h, head j reads q, k of head j // (hv / h)
    g       g        as above, hv     <= 0, natural log, float32
    S       S        [b, hv, k, v]    float32
    z       z        [b, hv, k]       float32, with normalize=True
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from seqmodels.errors import InputError
from seqmodels.notation import (
    Array,
    ChannelDecay,
    HeadDecay,
    Keys,
    MatrixState,
    Normaliser,
    Queries,
    ScalarDecay,
    SegmentIds,
    Values,
)
from seqmodels.ops import _dispatch, _scan
from seqmodels.ops._arguments import check_log_decay, check_qkv
from seqmodels.ops._chunks import decay_flops, positions_per_token, score_flops
from seqmodels.ops._linear_attention_chunked import EPSILON, chunk_of, chunked
from seqmodels.ops._linear_attention_kernels import KERNELS
from seqmodels.ops._op import Example, Inputs, Options, SeqOp
from seqmodels.ops._scan import Documents


class NormalizedState(NamedTuple):
    """The state with `normalize=True`: S of equation (1) and z of equation (3)."""

    S: MatrixState
    z: Normaliser


LinearState = MatrixState | NormalizedState


def linear_attention(
    q: Queries,
    k: Keys,
    v: Values,
    g: HeadDecay | ScalarDecay | ChannelDecay | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    initial_state: LinearState | None = None,
    segment_ids: SegmentIds | Documents | None = None,
    causal: bool = True,
    form: str = "chunked",
    chunk_size: int | None = None,
    backend: str = "auto",
    exchange: str = "auto",
) -> tuple[Values, LinearState]:
    """Linear attention, equations (1) to (3).

    Returns o [b, t, hv, v] in v's dtype and the final state: S [b, hv, k, v] float32, or `NormalizedState`.

    scale: factor on q; None is k ** -0.5. With `normalize` it changes only the weight of the 1e-6 in (3).
    initial_state: a final state; it belongs to the document of the first real token.
    segment_ids: [b, t] document numbers; the state is forgotten where they change, 0 is padding.
    causal: False lets every position see its whole document, each token once: equation (4). The state is ().
    form: "recurrent" (`lax.scan` of the definition), "chunked" (training), "parallel" (quadratic).
    chunk_size: positions per chunk; None is 64, and 128 where keys have 512 channels or more. With decay per channel
        it is rounded up to a power of two.

    Raises InputError where shapes disagree, and outside of jit for decays above 0.
    """
    _check(q, k, v, g)
    batch, length, _, key_dim = q.shape
    if g is not None:
        g = g.astype(_scan.state_dtype(g))
        if g.ndim == 1:
            g = jnp.broadcast_to(g, (batch, length, *g.shape))
    return _dispatch.run(
        LINEAR_ATTENTION,
        {"q": q, "k": k, "v": v, "g": g},
        {"scale": key_dim**-0.5 if scale is None else scale, "normalize": normalize},
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
        backend=backend,
        exchange=exchange,
        causal=causal,
    )


def zero_state(batch: int, heads: int, key_dim: int, value_dim: int, *, normalize: bool = False) -> LinearState:
    """The state before the first token, in float32."""
    S = jnp.zeros((batch, heads, key_dim, value_dim))
    return NormalizedState(S, jnp.zeros((batch, heads, key_dim))) if normalize else S


def linear_attention_flops(
    length: int,
    *,
    heads: int,
    key_dim: int,
    value_dim: int,
    key_heads: int | None = None,
    decays: int = 0,
    normalize: bool = False,
    chunk_size: int | None = None,
    decoding: bool = False,
) -> float:
    """FLOPs of matrix products for a token, in the chunked form over `length` tokens, or in a step.

    heads: those of v; key_heads: those of q and k, None for as many. decays: numbers of decay of a head and token: 0,
    1, or key_dim. In a step k^T v is element-wise work, which does not count.
    """
    read = 2 * heads * key_dim * (value_dim + normalize)  # q S, and q z
    if decoding:
        return read
    size = chunk_of(length, key_dim, chunk_size, per_channel=decays > 1)
    key_heads = key_heads or heads
    scores = score_flops(size, heads=heads, key_heads=key_heads, key_dim=key_dim, decays=decays)
    answer, write = 2 * size * heads * value_dim, 2 * heads * key_dim * value_dim  # A V, K^T V
    sums = decay_flops(size, heads=heads, decays=decays)
    return positions_per_token(length, size) * (scores + answer + read + write + sums)


def _check(q: Array, k: Array, v: Array, g: Array | None) -> None:
    check_qkv("linear_attention", q, k, v)
    heads = v.shape[2]
    decays = ((heads,), (*q.shape[:2], heads), (*q.shape[:2], heads, q.shape[3]))
    if g is not None and g.shape not in decays:
        raise InputError(f"linear_attention: g has shape {g.shape}; expected one of {', '.join(map(str, decays))}")
    check_log_decay("linear_attention", g)


def _initial_state(arrays: Inputs, options: Options) -> LinearState:
    q, v = arrays["q"], arrays["v"]
    dtype = _scan.state_dtype(*(arrays[name] for name in "qkvg"))
    state = zero_state(q.shape[0], v.shape[2], q.shape[3], v.shape[3], normalize=options["normalize"])
    return jax.tree.map(lambda x: x.astype(dtype), state)


def _step(state: LinearState, arrays: Inputs, options: Options) -> tuple[LinearState, Array]:
    S, z = state if options["normalize"] else (state, None)
    q, k, v, g = (arrays[name] for name in "qkvg")
    q, k = (jnp.repeat(x, v.shape[1] // x.shape[1], axis=1).astype(S.dtype) for x in (q * options["scale"], k))
    decay = 1.0 if g is None else jnp.exp(g).reshape(*g.shape[:2], -1)
    S = jnp.asarray(decay)[..., None] * S + k[..., :, None] * v[..., None, :]
    o = jnp.einsum("bhk,bhkv->bhv", q, S)
    if z is None:
        return S, o.astype(v.dtype)
    z = decay * z + k
    o = o / (jnp.einsum("bhk,bhk->bh", q, z) + EPSILON)[..., None]
    return NormalizedState(S, z), o.astype(v.dtype)


def _chunked(
    arrays: Inputs, state: LinearState, docs: Documents | None, chunk_size: int | None, options: Options
) -> tuple[Array, LinearState]:
    S, z = state if options["normalize"] else (state, None)
    inputs = (arrays[name] for name in "qkvg")
    o, S, z = chunked(*inputs, S, z, docs, scale=options["scale"], chunk_size=chunk_size)
    return o, S if z is None else NormalizedState(S, z)


def _parallel(
    arrays: Inputs, state: LinearState, docs: Documents | None, chunk_size: int | None, options: Options
) -> tuple[Array, LinearState]:
    """All pairs at once: O(t^2 k) with decay per channel. For reading and for tests."""
    S, z = state if options["normalize"] else (state, None)
    q, k, v, g = (arrays[name] for name in "qkvg")
    q, k = (jnp.repeat(x, v.shape[2] // x.shape[2], axis=2).astype(S.dtype) for x in (q * options["scale"], k))
    index = jnp.zeros(q.shape[:2], jnp.int32) if docs is None else docs.index
    real = jnp.ones(q.shape[:2], bool) if docs is None else docs.real
    g = jnp.zeros((*v.shape[:3], 1), S.dtype) if g is None else g.reshape(*g.shape[:3], -1)
    k, g = (jnp.where(real[..., None, None], x, 0) for x in (k, g))
    b = jnp.cumsum(g, axis=1)
    pairs = jnp.tril(index[:, :, None] == index[:, None, :])[..., None, None]
    decay = jnp.where(pairs, jnp.exp(jnp.where(pairs, b[:, :, None] - b[:, None], 0)), 0)
    A = jnp.sum(q[:, :, None] * k[:, None] * decay, axis=-1)
    q_in = q * jnp.exp(b) * (index == 0)[..., None, None]
    k_out = k * jnp.exp(b[:, -1:] - b) * (index == index[:, -1:])[..., None, None]
    through = jnp.exp(b[:, -1]) * (index[:, -1] == 0)[:, None, None]
    o = jnp.einsum("bijh,bjhv->bihv", A, v) + jnp.einsum("bihk,bhkv->bihv", q_in, S)
    S = through[..., None] * S + jnp.einsum("bjhk,bjhv->bhkv", k_out, v)
    if z is not None:
        o = o / (A.sum(axis=2) + jnp.einsum("bihk,bhk->bih", q_in, z) + EPSILON)[..., None]
        z = through * z + k_out.sum(axis=1)
    o = jnp.where(real[..., None, None], o, 0).astype(v.dtype)
    return o, S if z is None else NormalizedState(S, z)


def _whole(
    arrays: Inputs,
    docs: Documents | None,
    chunk_size: int | None,
    options: Options,
    both_ways: Callable[[Inputs, Options], Array],
) -> Array:
    """Equation (4); the normaliser is one more value channel, of ones."""
    q, k, v, g = (arrays[name] for name in "qkvg")
    dtype = _scan.state_dtype(q, k, v, g)
    wide = v.astype(dtype)
    if options["normalize"]:
        wide = jnp.concatenate([wide, jnp.ones_like(wide[..., :1])], axis=-1)
    q_wide, k_wide = (jnp.repeat(x.astype(dtype), v.shape[2] // x.shape[2], axis=2) for x in (q, k))
    if g is None and docs is None:
        M = jnp.einsum("bjhk,bjhv->bhkv", k_wide, wide)
        o = options["scale"] * jnp.einsum("bihk,bhkv->bihv", q_wide, M)
    else:
        own = options["scale"] * jnp.sum(q_wide * k_wide, axis=-1, keepdims=True) * wide
        o = both_ways({**arrays, "v": wide}, {**options, "normalize": False}) - own
    if options["normalize"]:
        o = o[..., :-1] / (o[..., -1:] + EPSILON)
    o = o if docs is None else jnp.where(docs.real[..., None, None], o, 0)
    return o.astype(v.dtype)


class LinearSummary(NamedTuple):
    """What a span does to a state: scale its key channels by `through`, then add `written`.

    through: [b, hv, 1 or k], in linear space, so that a reset is a 0 and two of them still combine.
    """

    through: Array
    written: LinearState


def _summarize(arrays: Inputs, docs: Documents | None, options: Options) -> LinearSummary:
    """All of the span in one product: token j is written with the weight exp(sum of g after j)."""
    q, k, v, g = (arrays[name] for name in "qkvg")
    dtype = _scan.state_dtype(q, k, v, g)
    real = jnp.ones(v.shape[:2], bool) if docs is None else docs.real
    g = jnp.zeros((*v.shape[:3], 1), dtype) if g is None else g.reshape(*g.shape[:3], -1)
    g = jnp.where(real[..., None, None], g, 0)
    through, mine = jnp.exp(g.sum(axis=1)), real
    if docs is not None:
        through = through * (docs.index[:, -1] == 0)[:, None, None]
        mine = mine & (docs.index == docs.index[:, -1:])
    weight = jnp.where(mine[..., None, None], jnp.exp(_scan.sums_after(g)), 0)
    # Heads that share a key stand side by side: [b, t, h, n, ...].
    v, weight = (x.reshape(*k.shape[:3], -1, x.shape[-1]).astype(dtype) for x in (v, weight))
    k, product = k.astype(dtype), functools.partial(jnp.einsum, precision="highest")
    if weight.shape[-1] == 1:
        S, z = product("bthk,bthnv->bhnkv", k, weight * v), product("bthk,bthn->bhnk", k, weight[..., 0])
    else:
        k = weight * k[:, :, :, None]
        S, z = product("bthnk,bthnv->bhnkv", k, v), k.sum(axis=1)
    S, z = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (S, z))
    return LinearSummary(through, NormalizedState(S, z) if options["normalize"] else S)


def _apply(summary: LinearSummary, state: LinearState, options: Options) -> LinearState:
    through, written = summary
    if not options["normalize"]:
        return through[..., None] * state + written
    return NormalizedState(through[..., None] * state.S + written.S, through * state.z + written.z)


def _combine(earlier: LinearSummary, later: LinearSummary, options: Options) -> LinearSummary:
    return LinearSummary(earlier.through * later.through, _apply(later, earlier.written, options))


def _examples(key: Array, batch: int, length: int) -> dict[str, Example]:
    keys = jax.random.split(key, 5)
    heads, key_dim, value_dim = 2, 4, 3
    q, k = (jax.random.normal(x, (batch, length, heads, key_dim)) for x in keys[:2])
    v = jax.random.normal(keys[2], (batch, length, heads, value_dim))
    scalar = -jax.nn.softplus(jax.random.normal(keys[3], (batch, length, heads)))
    channel = -jax.nn.softplus(2 * jax.random.normal(keys[4], (batch, length, heads, key_dim)))
    plain, positive = {"q": q, "k": k, "v": v, "g": None}, {"q": jax.nn.elu(q) + 1, "k": jax.nn.elu(k) + 1, "v": v}
    normalized = {"normalize": True}
    return {
        "no decay": Example(plain, {}),
        "no decay, normalized": Example({**positive, "g": None}, normalized),
        "decay per head": Example({**plain, "g": jnp.array([-0.1, -0.7])}, {"scale": 1.0}),
        "scalar decay": Example({**plain, "g": scalar}, {}),
        "scalar decay, normalized": Example({**positive, "g": scalar}, normalized),
        "decay per channel": Example({**plain, "g": channel}, {}),
        "decay per channel, normalized": Example({**positive, "g": channel}, normalized),
        "grouped heads": Example({**plain, "q": q[:, :, :1], "k": k[:, :, :1], "g": channel}, {}),
        "strong decay": Example({**plain, "g": jnp.full_like(channel, -50.0)}, {}, extreme=True),
        "weak decay": Example({**plain, "g": jnp.full_like(scalar, -1e-6)}, {}, extreme=True),
    }


LINEAR_ATTENTION = SeqOp(
    name="linear_attention",
    call=linear_attention,
    time_args=("q", "k", "v", "g"),
    step=_step,
    initial_state=_initial_state,
    forms={"chunked": _chunked, "parallel": _parallel},
    kernels=KERNELS,
    summarize=_summarize,
    combine=_combine,
    apply=_apply,
    summary_kind="prefix",
    head_axes={"q": 2, "k": 2, "v": 2, "g": 2},
    examples=_examples,
    whole=_whole,
)
