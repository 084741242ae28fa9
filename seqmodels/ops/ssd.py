"""State-space duality, the operator of Mamba-2, in its own vocabulary (Dao, Gu 2024, arXiv 2405.21060).

    S_t = exp(dt_t A) S_{t-1} + B_t^T (dt_t x_t)                                                                  (1)
    y_t = C_t S_t + D x_t                                                                                         (2)

    code    symbol   shape                 range, dtype
    x       X        [b, t, h, p]          any float
    dt      Delta    [b, t, h]             >= 0, float32: the step sizes, after bias and softplus
    A       A        [h]                   < 0, float32
    B, C    B, C     [b, t, groups, n]     any float; head j reads the group j // (h / groups)
    D       D        [h], [h, p] or None   any float
    S       h        [b, h, n, p]          float32; the authors' code keeps it as [h, p, n]

This is linear attention with a scalar decay, and runs on its forms:

    q = C,   k = B,   v = dt x,   g = dt A,   scale = 1;   then D x is added                                       (3)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from seqmodels.errors import InputError
from seqmodels.notation import Array, MatrixState, SegmentIds
from seqmodels.ops import _dispatch, _scan
from seqmodels.ops._arguments import check_values
from seqmodels.ops._heads import times_heads
from seqmodels.ops._op import Example, Inputs, Kernel, Options, SeqOp
from seqmodels.ops._scan import Documents
from seqmodels.ops.linear_attention import LINEAR_ATTENTION, LinearSummary, linear_attention_flops, zero_state


def ssd(
    x: Float[Array, "b t h p"],
    dt: Float[Array, "b t h"],
    A: Float[Array, " h"],
    B: Float[Array, "b t groups n"],
    C: Float[Array, "b t groups n"],
    D: Float[Array, " h"] | Float[Array, "h p"] | None = None,
    *,
    initial_state: MatrixState | None = None,
    segment_ids: SegmentIds | Documents | None = None,
    causal: bool = True,
    form: str = "chunked",
    chunk_size: int | None = None,
    backend: str = "auto",
    exchange: str = "auto",
) -> tuple[Float[Array, "b t h p"], MatrixState]:
    """The state-space operator of Mamba-2, equations (1) and (2).

    Returns y [b, t, h, p] in x's dtype and the final state S [b, h, n, p] float32.

    initial_state: a final state; it belongs to the document of the first real token.
    segment_ids: [b, t] document numbers; the state is forgotten where they change, 0 is padding.
    causal: False adds the outputs of the reversed span, each document reversed in its place. The state is ().
    form: "recurrent" (`lax.scan` of the definition), "chunked" (training), "parallel" (quadratic).
    chunk_size: positions per chunk; None is as in `linear_attention`.

    Raises InputError where shapes disagree, and outside of jit for dt below 0 or A above 0.
    """
    _check(x, dt, A, B, C, D)
    dt, A = (y.astype(_scan.state_dtype(y)) for y in (dt, A))
    return _dispatch.run(
        SSD,
        {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D},
        {},
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
        backend=backend,
        exchange=exchange,
        causal=causal,
    )


def ssd_flops(
    length: int,
    *,
    heads: int,
    groups: int,
    states: int,
    channels: int,
    chunk_size: int | None = None,
    decoding: bool = False,
) -> float:
    """FLOPs of matrix products for a token: those of linear attention, equation (3).

    states, channels: n and p above, rows and columns of a head's state.
    """
    sizes = {"heads": heads, "key_heads": groups, "key_dim": states, "value_dim": channels, "decays": 1}
    return linear_attention_flops(length, **sizes, chunk_size=chunk_size, decoding=decoding)


def _check(x: Array, dt: Array, A: Array, B: Array, C: Array, D: Array | None) -> None:
    if x.ndim != 4:
        raise InputError(f"ssd: x has shape {x.shape}; expected [batch, time, heads, channels]")
    heads = x.shape[2]
    if dt.shape != x.shape[:3]:
        raise InputError(f"ssd: dt has shape {dt.shape}; expected {x.shape[:3]}, a step for each head of x")
    if A.shape != (heads,):
        raise InputError(f"ssd: A has shape {A.shape}; expected {(heads,)}, one for each head of x")
    if B.ndim != 4 or B.shape[:2] != x.shape[:2] or B.shape[2] < 1 or heads % B.shape[2]:
        raise InputError(
            f"ssd: B has shape {B.shape}; expected [{x.shape[0]}, {x.shape[1]}, a divisor of {heads} heads, state size]"
        )
    if C.shape != B.shape:
        raise InputError(f"ssd: C has shape {C.shape}; expected {B.shape} as B has")
    if D is not None and D.shape not in ((heads,), (heads, x.shape[3])):
        raise InputError(f"ssd: D has shape {D.shape}; expected {(heads,)} or {(heads, x.shape[3])}")
    check_values("ssd", "dt", dt, "step sizes, >= 0", low=0)
    check_values("ssd", "A", A, "rates of decay, <= 0", high=0)


def _initial_state(arrays: Inputs, options: Options) -> Array:
    x, B = arrays["x"], arrays["B"]
    dtype = _scan.state_dtype(*arrays.values())
    return zero_state(x.shape[0], x.shape[-2], B.shape[-1], x.shape[-1]).astype(dtype)


def _step(S: Array, arrays: Inputs, options: Options) -> tuple[Array, Array]:
    x, dt, A, B, C = (arrays[name] for name in ("x", "dt", "A", "B", "C"))
    B, C = (jnp.repeat(y, x.shape[1] // y.shape[1], axis=1).astype(S.dtype) for y in (B, C))
    S = jnp.exp(dt * A)[..., None, None] * S + B[..., :, None] * (dt[..., None] * x)[..., None, :]
    y = jnp.einsum("bhn,bhnp->bhp", C, S)
    D = arrays["D"]
    return S, (y if D is None else y + D.reshape(D.shape[0], -1) * x).astype(x.dtype)


def _as_linear_attention(arrays: Inputs) -> Inputs:
    """Equation (3)."""
    x, dt, A, B, C = (arrays[name] for name in ("x", "dt", "A", "B", "C"))
    return {"q": C, "k": B, "v": times_heads(x, dt), "g": dt * A}


def _options(options: Options) -> Options:
    """Those of linear attention."""
    return {**options, "scale": 1.0, "normalize": False}


def _form(name: str) -> Callable[..., tuple[Array, Array]]:
    """A form of linear attention as one of this operator."""

    def form(
        arrays: Inputs, state: Array, docs: Documents | None, chunk_size: int | None, options: Options
    ) -> tuple[Array, Array]:
        run = LINEAR_ATTENTION.forms[name]
        o, state = run(_as_linear_attention(arrays), state, docs, chunk_size, _options(options))
        return _with_skip(o, arrays, docs), state

    return form


def _kernel(kernel: Kernel) -> Kernel:
    """A kernel of linear attention as one of this operator."""

    def supports(arrays: Inputs, options: Options) -> str | None:
        return kernel.supports(_as_linear_attention(arrays), _options(options))

    def call(
        arrays: Inputs, state: Array, docs: Documents | None, *, options: Options, **how: Any
    ) -> tuple[Array, Array]:
        o, state = kernel.call(_as_linear_attention(arrays), state, docs, options=_options(options), **how)
        return _with_skip(o, arrays, docs), state

    return Kernel(kernel.platform, supports, call)


def _with_skip(o: Array, arrays: Inputs, docs: Documents | None) -> Array:
    """Equation (2); zero at padding."""
    x, D = arrays["x"], arrays["D"]
    if D is None:
        return o
    # With heads and channels as one axis a TPU copies nothing: see `_heads`.
    D = jnp.broadcast_to(D.reshape(D.shape[0], -1), x.shape[2:]).reshape(-1)
    y = o.reshape(*x.shape[:2], -1) + D * x.reshape(*x.shape[:2], -1)
    if docs is not None:
        y = jnp.where(docs.real[..., None], y, 0)
    return y.reshape(x.shape).astype(x.dtype)


def _summarize(arrays: Inputs, docs: Documents | None, options: Options) -> LinearSummary:
    return LINEAR_ATTENTION.summarize(_as_linear_attention(arrays), docs, _options(options))


def _combine(earlier: LinearSummary, later: LinearSummary, options: Options) -> LinearSummary:
    return LINEAR_ATTENTION.combine(earlier, later, _options(options))


def _apply(summary: LinearSummary, state: Array, options: Options) -> Array:
    return LINEAR_ATTENTION.apply(summary, state, _options(options))


def _examples(key: Array, batch: int, length: int) -> dict[str, Example]:
    keys = jax.random.split(key, 5)
    heads, groups, channels, states = 4, 2, 3, 5
    x = jax.random.normal(keys[0], (batch, length, heads, channels))
    dt = jax.nn.softplus(jax.random.normal(keys[1], (batch, length, heads)) - 1)
    B, C = (jax.random.normal(k, (batch, length, groups, states)) for k in keys[2:4])
    A, D = -0.5 * jnp.arange(1.0, heads + 1), jax.random.normal(keys[4], (heads, channels))
    grouped = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": None}
    whole = {**grouped, "B": B[:, :, :1], "C": C[:, :, :1]}
    return {
        "one group, skip per head": Example({**whole, "D": D[:, 0]}, {}),
        "two groups, skip per channel": Example({**grouped, "D": D}, {}),
        "strong decay": Example({**grouped, "dt": jnp.full_like(dt, 50.0)}, {}, extreme=True),
        "weak decay": Example({**grouped, "dt": jnp.full_like(dt, 1e-6)}, {}, extreme=True),
    }


SSD = SeqOp(
    name="ssd",
    call=ssd,
    time_args=("x", "dt", "B", "C"),
    step=_step,
    initial_state=_initial_state,
    forms={name: _form(name) for name in LINEAR_ATTENTION.forms},
    kernels={name: _kernel(kernel) for name, kernel in LINEAR_ATTENTION.kernels.items()},
    summarize=_summarize,
    combine=_combine,
    apply=_apply,
    summary_kind="prefix",
    head_axes={"x": 2, "dt": 2, "A": 0, "B": 2, "C": 2, "D": 0},
    examples=_examples,
)
