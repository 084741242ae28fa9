"""Exponential moving average with one decay per channel.

S_t = exp(g) S_{t-1} + (1 - exp(g)) x_t;   o_t = S_t                                                          (1)

code    shape       range, dtype
x       [b, t, d]   any float
g       [d]         <= 0, natural log, float32
state   [b, d]      float32, S
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from seqmodels.notation import Activations, Array, SegmentIds
from seqmodels.ops import _dispatch
from seqmodels.ops._op import Example, Inputs, Options, SeqOp
from seqmodels.ops._scan import Documents, state_dtype


def moving_average(
    x: Activations,
    g: Float[Array, " d"],
    *,
    initial_state: Float[Array, "b d"] | None = None,
    segment_ids: SegmentIds | None = None,
    form: str = "chunked",
    chunk_size: int | None = None,
    backend: str = "auto",
    exchange: str = "auto",
) -> tuple[Activations, Float[Array, "b d"]]:
    """Equation (1). Returns the averages [b, t, d] in x's dtype and the last one, float32. Chunks have no effect."""
    return _dispatch.run(
        MOVING_AVERAGE,
        {"x": x, "g": g},
        {},
        initial_state=initial_state,
        segment_ids=segment_ids,
        form=form,
        chunk_size=chunk_size,
        backend=backend,
        exchange=exchange,
    )


def _initial_state(arrays: Inputs, options: Options) -> Array:
    x = arrays["x"]
    return jnp.zeros((x.shape[0], x.shape[-1]), state_dtype(x, arrays["g"]))


def _step(S: Array, arrays: Inputs, options: Options) -> tuple[Array, Array]:
    x, g = arrays["x"], arrays["g"]
    S = jnp.exp(g) * S - jnp.expm1(g) * x
    return S, S.astype(x.dtype)


def _spans(arrays: Inputs, docs: Documents | None) -> tuple[Array, Array]:
    """[b, t, d] each: the span up to t multiplies the incoming state by the first and adds the second."""
    x, g = arrays["x"], arrays["g"]
    keep = jnp.broadcast_to(jnp.exp(g), x.shape)
    add = -jnp.expm1(g) * x.astype(keep.dtype)
    if docs is not None:
        real = docs.real[..., None]
        keep = jnp.where(docs.starts[..., None], 0, jnp.where(real, keep, 1))
        add = jnp.where(real, add, 0)

    def follow(earlier: tuple, later: tuple) -> tuple:
        return earlier[0] * later[0], later[0] * earlier[1] + later[1]

    return jax.lax.associative_scan(follow, (keep, add), axis=1)


def _chunked(
    arrays: Inputs, state: Array, docs: Documents | None, chunk_size: int | None, options: Options
) -> tuple[Array, Array]:
    keep, add = _spans(arrays, docs)
    S = keep * state[:, None] + add
    o = S if docs is None else jnp.where(docs.real[..., None], S, 0)
    return o.astype(arrays["x"].dtype), S[:, -1]


def _summarize(arrays: Inputs, docs: Documents | None, options: Options) -> tuple[Array, Array]:
    keep, add = _spans(arrays, docs)
    return keep[:, -1], add[:, -1]


def _apply(summary: tuple[Array, Array], state: Array, options: Options) -> Array:
    keep, add = summary
    return keep * state + add


def _combine(earlier: tuple, later: tuple, options: Options) -> tuple[Array, Array]:
    return earlier[0] * later[0], _apply(later, earlier[1], options)


def _examples(key: Array, batch: int, length: int) -> dict[str, Example]:
    x = jax.random.normal(key, (batch, length, 3))
    return {
        "slow and fast": Example({"x": x, "g": jnp.array([-0.01, -0.5, -3.0])}, {}),
        "at the limits": Example({"x": x, "g": jnp.array([-1e-6, -50.0, -1.0])}, {}, extreme=True),
    }


MOVING_AVERAGE = SeqOp(
    name="moving_average",
    call=moving_average,
    time_args=("x",),
    step=_step,
    initial_state=_initial_state,
    forms={"chunked": _chunked},
    summarize=_summarize,
    combine=_combine,
    apply=_apply,
    summary_kind="prefix",
    examples=_examples,
)
