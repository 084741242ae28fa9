"""The delta rule with optional decay: a memory that corrects what it returns for a key, instead of adding to it.

    S~_t = diag(exp(g_t)) S_{t-1}                                                                                 (1)
    S_t  = S~_t + beta_t k_t^T (v_t - k_t S~_t)                                                                   (2)
    o_t  = scale q_t S_t                                                                                          (3)

(2) is one step of gradient descent, of size beta_t, on |k_t S - v_t|^2 / 2. With |k_t| = 1 and beta_t = 1 the memory
then returns exactly v_t for k_t, whatever it held; the memory is stable while beta_t |k_t|^2 is in [0, 2].

    g             mixer             source
    None          DeltaNet          Schlag et al. 2021, 2102.11174; Yang et al. 2024, 2406.06484
    [b, t, h]     Gated DeltaNet    Yang, Kautz, Hatamizadeh 2024, 2412.06464
    [b, t, h, k]  KDA               Kimi Team 2025, 2510.26692

    code    symbol   shape            range, dtype
    q, k    q, k     [b, t, h, k]     any float; keys of length 1
    v       v        [b, t, hv, v]    any float; hv is a multiple of h, head j reads q, k of head j // (hv / h)
    beta    beta     [b, t, hv]       any float, in [0, 2]
    g       g        as above, hv     <= 0, natural log, float32
    S       S        [b, hv, k, v]    float32
"""

import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.triangular_inverse import inverse_flops
from seqmodels.errors import InputError
from seqmodels.notation import (
    Array,
    ChannelDecay,
    Keys,
    MatrixState,
    Queries,
    ScalarDecay,
    SegmentIds,
    Values,
    WriteStrength,
)
from seqmodels.ops import _dispatch, _scan
from seqmodels.ops._arguments import check_log_decay, check_qkv
from seqmodels.ops._chunks import chunk_length, decay_flops, positions_per_token, score_flops
from seqmodels.ops._delta_rule_chunked import DEFAULT_CHUNK, chunked
from seqmodels.ops._op import Example, Inputs, Kernel, Options, SeqOp
from seqmodels.ops._scan import Documents


def delta_rule(
    q: Queries,
    k: Keys,
    v: Values,
    beta: WriteStrength,
    g: ScalarDecay | ChannelDecay | None = None,
    *,
    scale: float | None = None,
    initial_state: MatrixState | None = None,
    segment_ids: SegmentIds | Documents | None = None,
    causal: bool = True,
    form: str = "chunked",
    chunk_size: int | None = None,
    backend: str = "auto",
    exchange: str = "auto",
) -> tuple[Values, MatrixState]:
    """The delta rule, equations (1) to (3).

    Returns o [b, t, hv, v] in v's dtype and the final state S [b, hv, k, v] float32.

    k: used as it is; normalise it to length 1 (or less), or the memory may grow without bound.
    scale: factor on q; None is k ** -0.5.
    initial_state: a final state; it belongs to the document of the first real token.
    segment_ids: [b, t] document numbers; the state is forgotten where they change, 0 is padding.
    causal: False adds the outputs of the reversed span, each document reversed in its place. The state is ().
    form: "recurrent" (`lax.scan` of the definition), "chunked" (training).
    chunk_size: positions per chunk, rounded up to a power of two; None is 32.

    Raises InputError where shapes disagree, and outside of jit for decays above 0.
    """
    _check(q, k, v, beta, g)
    return _dispatch.run(
        DELTA_RULE,
        {"q": q, "k": k, "v": v, "beta": beta, "g": None if g is None else g.astype(_scan.state_dtype(g))},
        {"scale": q.shape[-1] ** -0.5 if scale is None else scale},
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
        backend=backend,
        exchange=exchange,
        causal=causal,
    )


def zero_state(batch: int, heads: int, key_dim: int, value_dim: int) -> MatrixState:
    """The state before the first token, in float32."""
    return jnp.zeros((batch, heads, key_dim, value_dim))


def delta_rule_flops(
    length: int,
    *,
    heads: int,
    key_dim: int,
    value_dim: int,
    key_heads: int | None = None,
    decays: int = 0,
    chunk_size: int | None = None,
    decoding: bool = False,
) -> float:
    """FLOPs of matrix products for a token, in the chunked form over `length` tokens, or in a step.

    heads: those of v; key_heads: those of q and k, None for as many. decays: numbers of decay of a head and token: 0,
    1, or key_dim. In a step k^T (v - k S) is element-wise work, which does not count.
    """
    state = 2 * heads * key_dim * value_dim
    if decoding:
        return 2 * state  # k S and q S
    size = chunk_length(chunk_size, length, power_of_two=True, default=DEFAULT_CHUNK)
    key_heads = key_heads or heads
    scores = score_flops(size, heads=heads, key_heads=key_heads, key_dim=key_dim, decays=decays)
    chunk = 2 * size * heads * value_dim
    correction = scores + heads * inverse_flops(size) + chunk + state  # G, T, T diag(beta) E, K S
    answer = scores + chunk + state  # A, A Y, Q S
    sums = decay_flops(size, heads=heads, decays=decays)
    return positions_per_token(length, size) * (correction + answer + state + sums)  # and K^T Y


def _check(q: Array, k: Array, v: Array, beta: Array, g: Array | None) -> None:
    check_qkv("delta_rule", q, k, v)
    scalar = v.shape[:3]
    if beta.shape != scalar:
        raise InputError(f"delta_rule: beta has shape {beta.shape}; expected {scalar}")
    channel = (*scalar, q.shape[3])
    if g is not None and g.shape not in (scalar, channel):
        raise InputError(f"delta_rule: g has shape {g.shape}; expected {scalar} or {channel}")
    check_log_decay("delta_rule", g)


def _initial_state(arrays: Inputs, options: Options) -> MatrixState:
    q, v = arrays["q"], arrays["v"]
    return zero_state(q.shape[0], v.shape[2], q.shape[3], v.shape[3]).astype(_scan.state_dtype(*arrays.values()))


def _step(S: MatrixState, arrays: Inputs, options: Options) -> tuple[MatrixState, Array]:
    q, k, v, beta, g = (arrays[name] for name in ("q", "k", "v", "beta", "g"))
    q, k = (jnp.repeat(x, v.shape[1] // x.shape[1], axis=1).astype(S.dtype) for x in (q * options["scale"], k))
    if g is not None:
        S = jnp.exp(g).reshape(*g.shape[:2], -1, 1) * S
    error = v - jnp.einsum("bhk,bhkv->bhv", k, S)
    S = S + k[..., :, None] * (beta[..., None] * error)[..., None, :]
    return S, jnp.einsum("bhk,bhkv->bhv", q, S).astype(v.dtype)


def _chunked(
    arrays: Inputs, S: MatrixState, docs: Documents | None, chunk_size: int | None, options: Options
) -> tuple[Array, MatrixState]:
    inputs = (arrays[name] for name in ("q", "k", "v", "beta", "g"))
    return chunked(*inputs, S, docs, scale=options["scale"], chunk_size=chunk_size)


def _kernel(platform: str, name: str, *, automatic: bool = True) -> Kernel:
    """Of the module of this name, imported when it is first asked: a program without kernels need not load Pallas."""

    def supports(arrays: Inputs, options: Options) -> str | None:
        # On a GPU the size of a chunk is a part of the kernel.
        size = {"chunk_size": options["chunk_size"]} if platform == "cuda" else {}
        of_rule = (arrays[x] for x in ("q", "k", "v", "beta", "g"))
        return importlib.import_module(name).supports(*of_rule, **size)

    def call(
        arrays: Inputs, S: MatrixState, docs: Documents | None, *, chunk_size: int | None, options: Options, **how: Any
    ) -> tuple[Array, MatrixState]:
        q, k, v, beta, g = (arrays[x] for x in ("q", "k", "v", "beta", "g"))
        index = None
        if docs is not None:
            k, g = _scan.zero_at_padding(docs, k, g)
            index = docs.index
        how = {"scale": options["scale"], "chunk_size": chunk_size, **how}
        o, S = importlib.import_module(name).delta_rule(q, k, v, beta, g, S, index, **how)
        return o if docs is None else _scan.zero_at_padding(docs, o)[0], S

    return Kernel(platform, supports, call, automatic)


class DeltaSummary(NamedTuple):
    """What a span does to a state: multiply it by `through` [b, hv, k, k] from the left, then add `written`."""

    through: Array
    written: MatrixState


def _summarize(arrays: Inputs, docs: Documents | None, options: Options) -> DeltaSummary:
    """Columns of a state do not mix, so one run finds both: from 0 with the values, and from I with values of 0."""
    v, zero = arrays["v"], _initial_state(arrays, options)
    key_dim = zero.shape[2]
    identity = jnp.broadcast_to(jnp.eye(key_dim, dtype=zero.dtype), (*zero.shape[:3], key_dim))
    v = jnp.concatenate([v, jnp.zeros((*v.shape[:3], key_dim), v.dtype)], axis=-1)
    _, S = _chunked({**arrays, "v": v}, jnp.concatenate([zero, identity], axis=-1), docs, None, options)
    written, through = jnp.split(S, [zero.shape[3]], axis=-1)
    return DeltaSummary(through, written)


def _apply(summary: DeltaSummary, S: MatrixState, options: Options) -> MatrixState:
    return jnp.matmul(summary.through, S, precision="highest") + summary.written


def _combine(earlier: DeltaSummary, later: DeltaSummary, options: Options) -> DeltaSummary:
    through = jnp.matmul(later.through, earlier.through, precision="highest")
    return DeltaSummary(through, _apply(later, earlier.written, options))


def _examples(key: Array, batch: int, length: int) -> dict[str, Example]:
    keys = jax.random.split(key, 6)
    heads, key_dim, value_dim = 2, 4, 3
    q, k = (jax.random.normal(x, (batch, length, heads, key_dim)) for x in keys[:2])
    k = k * jax.lax.rsqrt(jnp.sum(k**2, axis=-1, keepdims=True))
    v = jax.random.normal(keys[2], (batch, length, heads, value_dim))
    beta = jax.nn.sigmoid(jax.random.normal(keys[3], (batch, length, heads)))
    scalar = -jax.nn.softplus(jax.random.normal(keys[4], (batch, length, heads)))
    channel = -jax.nn.softplus(2 * jax.random.normal(keys[5], (batch, length, heads, key_dim)))
    arrays = {"q": q, "k": k, "v": v, "beta": beta, "g": None}
    one_key = {**arrays, "k": jnp.broadcast_to(k[:, :1], k.shape), "beta": jnp.ones_like(beta)}
    return {
        "no decay, beta up to 2": Example({**arrays, "beta": 2 * beta}, {}),
        "scalar decay": Example({**arrays, "g": scalar}, {"scale": 1.0}),
        "decay per channel": Example({**arrays, "g": channel}, {}),
        "grouped heads": Example({**arrays, "q": q[:, :, :1], "k": k[:, :, :1], "g": channel}, {}),
        "one key, weak decay": Example({**one_key, "g": jnp.full_like(scalar, -1e-6)}, {}, extreme=True),
        "one key, strong decay": Example({**one_key, "g": jnp.full_like(channel, -50.0)}, {}, extreme=True),
    }


DELTA_RULE = SeqOp(
    name="delta_rule",
    call=delta_rule,
    time_args=("q", "k", "v", "beta", "g"),
    step=_step,
    initial_state=_initial_state,
    forms={"chunked": _chunked},
    kernels={
        "pallas_tpu": _kernel("tpu", "pallas_kernels.tpu.delta_rule"),
        "pallas_gpu": _kernel("cuda", "pallas_kernels.gpu.delta_rule", automatic=False),
    },
    summarize=_summarize,
    combine=_combine,
    apply=_apply,
    summary_kind="prefix",
    head_axes={"q": 2, "k": 2, "v": 2, "beta": 2, "g": 2},
    examples=_examples,
)
