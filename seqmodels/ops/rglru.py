"""The real-gated linear recurrent unit of Griffin: a decay per channel and step, and inputs scaled to match it.

    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) x_t,   a_t = exp(g_t)                                                      (1)

(De et al. 2024, arXiv 2402.19427.) The factor of x keeps the variance of h at that of x, whatever the decay: the gates
say how long to remember, not how loud.

    code    symbol      shape       range, dtype
    x       i_t x_t     [b, t, d]   any float; the paper's input times its input gate
    g       log a_t     [b, t, d]   <= 0, natural log, float32; -inf forgets what was before and lets x in whole
    h       h           [b, d]      float32, the state; the output is the state

The factor's slope by g, -a^2 / sqrt(1 - a^2), has no bound as g nears 0; its divisor is kept above 1/2000, which bounds
the derivative of the square root by 1000, as in the authors' code (google-deepmind/recurrentgemma).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from seqmodels.errors import InputError
from seqmodels.notation import Activations, Array, SegmentIds
from seqmodels.ops import _dispatch, _scan
from seqmodels.ops._arguments import check_log_decay
from seqmodels.ops._op import Example, Inputs, Options, SeqOp
from seqmodels.ops._rglru_chunked import chunked, input_factor
from seqmodels.ops._scan import Documents


def rglru(
    x: Activations,
    g: Float[Array, "b t d"],
    *,
    initial_state: Float[Array, "b d"] | None = None,
    segment_ids: SegmentIds | Documents | None = None,
    causal: bool = True,
    form: str = "chunked",
    chunk_size: int | None = None,
    backend: str = "auto",
    exchange: str = "auto",
) -> tuple[Activations, Float[Array, "b d"]]:
    """The gated linear recurrence of Griffin, equation (1).

    Returns h [b, t, d] in x's dtype and the last h [b, d] in float32.

    x: inputs, already multiplied by their gate. g: log decay of each channel, <= 0.
    initial_state: a final state; it belongs to the document of the first real token.
    segment_ids: [b, t] document numbers; the state is forgotten where they change, 0 is padding.
    causal: False adds the outputs of the reversed span, each document reversed in its place. The state is ().
    form: "recurrent" (`lax.scan` of the definition), "chunked" (training).
    chunk_size: positions per chunk; None is 64.

    Raises InputError where shapes disagree, and outside of jit for decays above 0.
    """
    if x.ndim != 3:
        raise InputError(f"rglru: x has shape {x.shape}; expected [batch, time, channels]")
    if g.shape != x.shape:
        raise InputError(f"rglru: g has shape {g.shape}; expected {x.shape} as x has")
    check_log_decay("rglru", g)
    return _dispatch.run(
        RGLRU,
        {"x": x, "g": g.astype(_scan.state_dtype(g))},
        {},
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
        backend=backend,
        exchange=exchange,
        causal=causal,
    )


def zero_state(batch: int, channels: int) -> Float[Array, "b d"]:
    """The state before the first token, in float32."""
    return jnp.zeros((batch, channels))


def _initial_state(arrays: Inputs, options: Options) -> Array:
    x = arrays["x"]
    return zero_state(x.shape[0], x.shape[-1]).astype(_scan.state_dtype(x, arrays["g"]))


def _step(h: Array, arrays: Inputs, options: Options) -> tuple[Array, Array]:
    x, g = arrays["x"], arrays["g"]
    h = jnp.exp(g) * h + input_factor(g) * x
    return h, h.astype(x.dtype)


def _chunked(
    arrays: Inputs, state: Array, docs: Documents | None, chunk_size: int | None, options: Options
) -> tuple[Array, Array]:
    return chunked(arrays["x"], arrays["g"], state, docs, chunk_size=chunk_size)


class RGLRUSummary(NamedTuple):
    """What a span does to a state: multiply it by `through`, then add `written`; both [b, d].

    through is kept in linear space, so that a reset is a 0 and two of them still combine.
    """

    through: Array
    written: Array


def _summarize(arrays: Inputs, docs: Documents | None, options: Options) -> RGLRUSummary:
    _, written = _chunked(arrays, _initial_state(arrays, options), docs, None, options)
    g = arrays["g"]
    if docs is None:
        return RGLRUSummary(jnp.exp(g.sum(axis=1)), written)
    through = jnp.exp(jnp.where(docs.real[..., None], g, 0).sum(axis=1))
    return RGLRUSummary(through * (docs.index[:, -1:] == 0), written)


def _apply(summary: RGLRUSummary, state: Array, options: Options) -> Array:
    return summary.through * state + summary.written


def _combine(earlier: RGLRUSummary, later: RGLRUSummary, options: Options) -> RGLRUSummary:
    return RGLRUSummary(earlier.through * later.through, _apply(later, earlier.written, options))


def _examples(key: Array, batch: int, length: int) -> dict[str, Example]:
    keys = jax.random.split(key, 2)
    x, logits = (jax.random.normal(key, (batch, length, 6)) for key in keys)
    forgetting = jnp.where(logits > 1, -jnp.inf, -jax.nn.softplus(2 * logits))
    limits = jnp.broadcast_to(jnp.array([-50.0, -1e-6, 0.0] * 2), x.shape)
    return {
        "gates from the input": Example({"x": x, "g": forgetting}, {}),
        "at the limits": Example({"x": x, "g": limits}, {}, extreme=True),
    }


RGLRU = SeqOp(
    name="rglru",
    call=rglru,
    time_args=("x", "g"),
    step=_step,
    initial_state=_initial_state,
    forms={"chunked": _chunked},
    summarize=_summarize,
    combine=_combine,
    apply=_apply,
    summary_kind="prefix",
    head_axes={"x": 2, "g": 2},
    examples=_examples,
)
