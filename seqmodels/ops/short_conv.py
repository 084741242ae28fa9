"""Short causal convolution, depthwise: each channel mixes its own last W inputs.

    y_t = act(bias + sum_{j=0}^{W-1} kernel[W-1-j] * x_{t-j})                                                    (1)

as placed before the mixers of H3 (Fu et al. 2022, arXiv 2212.14052), Mamba (Gu, Dao 2023, arXiv 2312.00752) and their
kin, with the activation that follows it there, or none.

    code     shape         dtype              meaning
    x        [b, t, d]     any float          inputs
    kernel   [W, d]        any float          kernel[W-1] multiplies the current input
    bias     [d] or None   any float
    state    [b, W-1, d]   float32            the last W-1 inputs, oldest first; zeros before the first token

No tap crosses the border of a document. With causal=False the convolution is centred, with the same taps on both
sides: y_t = act(bias + sum over |j| < W of kernel[W-1-|j|] * x_{t-j}).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from seqmodels.errors import InputError
from seqmodels.notation import Activations, Array, SegmentIds
from seqmodels.ops import _dispatch
from seqmodels.ops._op import Example, Inputs, Kernel, Options, SeqOp
from seqmodels.ops._scan import Documents, places, state_dtype

ACTIVATIONS = (None, "silu")


def short_conv(
    x: Activations,
    kernel: Float[Array, "w d"],
    bias: Float[Array, " d"] | None = None,
    *,
    activation: str | None = None,
    initial_state: Float[Array, "b w-1 d"] | None = None,
    segment_ids: SegmentIds | Documents | None = None,
    causal: bool = True,
    form: str = "chunked",
    chunk_size: int | None = None,
    backend: str = "auto",
    exchange: str = "auto",
) -> tuple[Activations, Float[Array, "b w-1 d"]]:
    """Causal depthwise convolution over time, and "silu" or no activation; equation (1).

    Returns the outputs [b, t, d] in x's dtype and the last W-1 inputs [b, W-1, d] in float32. `initial_state` is the
    same for the span before; it belongs to the document of the first real token. `segment_ids` [b, t]: documents,
    0 is padding, found only before the first and after the last document of a row or between documents.
    causal: False centres the convolution. The state is ().
    Forms: "recurrent", "chunked"; `chunk_size` has no effect (a convolution needs no chunks).

    Raises InputError where shapes disagree, or for another activation.
    """
    if activation not in ACTIVATIONS:
        raise InputError(f"short_conv: activation={activation!r}; expected one of {', '.join(map(repr, ACTIVATIONS))}")
    if x.ndim != 3:
        raise InputError(f"short_conv: x has shape {x.shape}; expected [batch, time, channels]")
    if kernel.ndim != 2 or kernel.shape[1] != x.shape[2] or kernel.shape[0] < 2:
        raise InputError(f"short_conv: kernel has shape {kernel.shape}; expected [width >= 2, {x.shape[2]}] for x")
    if bias is not None and bias.shape != (x.shape[2],):
        raise InputError(f"short_conv: bias has shape {bias.shape}; expected {(x.shape[2],)}")
    return _dispatch.run(
        SHORT_CONV,
        {"x": x, "kernel": kernel, "bias": bias},
        {"activation": activation},
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
        backend=backend,
        exchange=exchange,
        causal=causal,
    )


def zero_inputs(batch: int, width: int, channels: int) -> Float[Array, "b w-1 d"]:
    """The state before the first token, in float32."""
    return jnp.zeros((batch, width - 1, channels))


def _initial_state(arrays: Inputs, options: Options) -> Array:
    x, kernel = arrays["x"], arrays["kernel"]
    return zero_inputs(x.shape[0], kernel.shape[0], x.shape[-1]).astype(state_dtype(x))


def _step(state: Array, arrays: Inputs, options: Options) -> tuple[Array, Array]:
    x, kernel, bias = arrays["x"], arrays["kernel"], arrays["bias"]
    taps = jnp.concatenate([state, x[:, None].astype(state.dtype)], axis=1)
    y = jnp.sum(taps * kernel, axis=1)
    return taps[:, 1:], _activated(y if bias is None else y + bias, options).astype(x.dtype)


def _activated(y: Array, options: Options) -> Array:
    return y if options["activation"] is None else jax.nn.silu(y)


def _chunked(
    arrays: Inputs, state: Array, docs: Documents | None, chunk_size: int | None, options: Options
) -> tuple[Array, Array]:
    x, kernel, bias = arrays["x"], arrays["kernel"], arrays["bias"]
    width, length = kernel.shape[0], x.shape[1]
    history, index = _with_history(x, state, docs)
    y = jnp.zeros(x.shape, state.dtype) if bias is None else jnp.broadcast_to(bias, x.shape).astype(state.dtype)
    for j in range(width):
        tap = history[:, width - 1 - j : width - 1 - j + length]
        if docs is not None:
            same = index[:, width - 1 - j : width - 1 - j + length] == docs.index
            tap = jnp.where(same[..., None], tap, 0)
        y += kernel[width - 1 - j] * tap
    y = _activated(y, options)
    if docs is not None:
        y = jnp.where(docs.real[..., None], y, 0)
    return y.astype(x.dtype), _last_inputs(history, index, docs, width)


def _kernel_supports(arrays: Inputs, options: Options) -> str | None:
    # Here, so that a program without kernels need not load Pallas.
    from pallas_kernels.tpu import short_conv as kernel

    return kernel.supports(arrays["x"], arrays["kernel"], options["activation"])


def _kernel(
    arrays: Inputs, state: Array, docs: Documents | None, *, chunk_size: int | None, options: Options, **how: Any
) -> tuple[Array, Array]:
    from pallas_kernels.tpu import short_conv as kernel

    x, width = arrays["x"], arrays["kernel"].shape[0]
    history, index = _with_history(x, state, docs)
    reach = before = None
    if docs is not None:
        seen = jnp.full(x.shape[:1], 0 if options["fresh"] else width - 1)
        reach = jnp.where(docs.real, places(docs, seen), -1)
    if not options["fresh"]:
        before = history[:, : width - 1]
        # At the padding in front of the first token of a row are some of the inputs before it.
        x = x if docs is None else history[:, width - 1 :].astype(x.dtype)
    y = kernel.short_conv(x, arrays["kernel"], arrays["bias"], before, reach, activation=options["activation"], **how)
    return y, _last_inputs(history, index, docs, width)


def _whole(
    arrays: Inputs,
    docs: Documents | None,
    chunk_size: int | None,
    options: Options,
    both_ways: Callable[[Inputs, Options], Array],
) -> Array:
    """Both sides, of which each counts the current input."""
    x, kernel, bias = arrays["x"], arrays["kernel"], arrays["bias"]
    wide = x.astype(state_dtype(x))
    y = both_ways({"x": wide, "kernel": kernel, "bias": None}, {**options, "activation": None}) - kernel[-1] * wide
    y = _activated(y if bias is None else y + bias, options)
    return (y if docs is None else jnp.where(docs.real[..., None], y, 0)).astype(x.dtype)


def _with_history(x: Array, state: Array, docs: Documents | None) -> tuple[Array, Array | None]:
    """[b, W-1+t, d]: the state, placed right before the first real token, then the inputs; and whose they are."""
    history = jnp.concatenate([jnp.zeros_like(state), x.astype(state.dtype)], axis=1)
    if docs is None:
        return history.at[:, : state.shape[1]].set(state), None
    first_real = jnp.where(docs.real.any(axis=1), jnp.argmax(docs.real, axis=1), x.shape[1])
    place = jax.vmap(lambda row, taps, at: jax.lax.dynamic_update_slice_in_dim(row, taps, at, axis=0))
    index = jnp.pad(docs.index, ((0, 0), (state.shape[1], 0)))
    return place(history, state, first_real), index


def _last_inputs(history: Array, index: Array | None, docs: Documents | None, width: int) -> Array:
    """The W-1 inputs that end at the last real token, without those of earlier documents."""
    if docs is None:
        return history[:, -(width - 1) :]
    length = docs.real.shape[1]
    after_last = jnp.where(docs.real.any(axis=1), length - jnp.argmax(docs.real[:, ::-1], axis=1), length)
    cut = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, width - 1, axis=0))
    same = cut(index, after_last) == docs.index[:, -1:]
    return jnp.where(same[..., None], cut(history, after_last), 0)


class ConvSummary(NamedTuple):
    """What a span leaves behind: its last W-1 inputs, and how many of them (counted from the newest) it decides."""

    inputs: Array
    decided: Array


def _summarize(arrays: Inputs, docs: Documents | None, options: Options) -> ConvSummary:
    x, width = arrays["x"], arrays["kernel"].shape[0]
    _, inputs = _chunked(arrays, _initial_state(arrays, options), docs, None, options)
    count = jnp.full(x.shape[:1], x.shape[1]) if docs is None else docs.real.sum(axis=1)
    fresh = False if docs is None else docs.index[:, -1] > 0
    return ConvSummary(inputs, jnp.where(fresh, width - 1, jnp.minimum(count, width - 1)))


def _apply(summary: ConvSummary, state: Array, options: Options) -> Array:
    slots = state.shape[1]
    shifted = jax.vmap(lambda row, by: jnp.roll(row, -by, axis=0))(state, summary.decided)
    mine = jnp.arange(slots) >= slots - summary.decided[:, None]
    return jnp.where(mine[..., None], summary.inputs, shifted)


def _combine(earlier: ConvSummary, later: ConvSummary, options: Options) -> ConvSummary:
    decided = jnp.minimum(earlier.decided + later.decided, earlier.inputs.shape[1])
    return ConvSummary(_apply(later, earlier.inputs, options), decided)


def _examples(key: Array, batch: int, length: int) -> dict[str, Example]:
    keys = jax.random.split(key, 3)
    arrays = {
        "x": jax.random.normal(keys[0], (batch, length, 6)),
        "kernel": jax.random.normal(keys[1], (4, 6)),
        "bias": jax.random.normal(keys[2], (6,)),
    }
    return {
        "width 4, bias, silu": Example(arrays, {"activation": "silu"}),
        "width 2": Example({**arrays, "kernel": arrays["kernel"][:2], "bias": None}, {}),
    }


SHORT_CONV = SeqOp(
    name="short_conv",
    call=short_conv,
    time_args=("x",),
    step=_step,
    initial_state=_initial_state,
    forms={"chunked": _chunked},
    kernels={"pallas_tpu": Kernel("tpu", _kernel_supports, _kernel)},
    summarize=_summarize,
    combine=_combine,
    apply=_apply,
    summary_kind="halo",
    head_axes={"x": 2, "kernel": 1, "bias": 0},
    reach=lambda arrays, options: arrays["kernel"].shape[0] - 1,
    examples=_examples,
    whole=_whole,
)
