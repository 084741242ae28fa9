"""Every law can be broken: an operator with one defect fails it. `test_adding_a_mixer` has the sound one keep it."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from seqmodels.layers import Retention
from seqmodels.ops._op import SeqOp
from seqmodels.registry import MIXERS, Entry
from tests.conformance.cases import LayerCase, OpCase
from tests.conformance.laws import LAYER_LAWS, OP_LAWS
from tests.conformance.test_ops import check_known_gaps
from tests.conformance.toy.ops.moving_average import MOVING_AVERAGE

SOUND = MOVING_AVERAGE.forms["chunked"]
NORMAL, EXTREME = "slow and fast", "at the limits"


def with_form(chunked) -> SeqOp:
    return dataclasses.replace(MOVING_AVERAGE, forms={"chunked": chunked})


def altered_outcome(alter) -> SeqOp:
    """The sound form, and then `alter(o, state)` in place of what it returned."""

    def chunked(*args, **how):
        return alter(*SOUND(*args, **how))

    return with_form(chunked)


def altered_arguments(alter) -> SeqOp:
    """The sound form on `alter(arrays, state, docs)` in place of what it was given."""

    def chunked(arrays, state, docs, **how):
        return SOUND(*alter(arrays, state, docs), **how)

    return with_form(chunked)


def without_padding(arrays, state, docs):
    return arrays, state, docs and docs._replace(real=jnp.ones_like(docs.real))


def gradient_alone(x):
    """0, with the gradient of x."""
    return x - jax.lax.stop_gradient(x)


def off_from_none(arrays, state, docs, chunk_size, options):
    o, state = SOUND(arrays, state, docs, chunk_size, options)
    return o, state + 1e-9 * options["fresh"]


def in_bfloat16(arrays, state, docs, chunk_size, options):
    o, state = SOUND({k: x.astype(jnp.bfloat16) for k, x in arrays.items()}, state, docs, chunk_size, options)
    return o.astype(arrays["x"].dtype), state


def with_positive_exponents(arrays, state, docs, chunk_size, options):
    """exp(g t) sum_s exp(-g s) (1 - exp(g)) x_s: right on paper."""
    x, g = arrays["x"], arrays["g"]
    b = g * (1 + jnp.arange(x.shape[1]))[:, None]
    o = jnp.exp(b) * (state[:, None] + jnp.cumsum(jnp.exp(-b) * -jnp.expm1(g) * x, axis=1))
    return o.astype(x.dtype), o[:, -1].astype(state.dtype)


def other_when_traced(o, state):
    return (o * (1 + 1e-3) if isinstance(o, jax.core.Tracer) else o), state


def with_state_in_bfloat16() -> SeqOp:
    def rounded(state):
        return state.astype(jnp.bfloat16)

    def step(*args):
        state, o = MOVING_AVERAGE.step(*args)
        return rounded(state), o

    return dataclasses.replace(
        altered_outcome(lambda o, state: (o, rounded(state))),
        step=step,
        initial_state=lambda *args: rounded(MOVING_AVERAGE.initial_state(*args)),
    )


def with_summary(alter) -> SeqOp:
    return dataclasses.replace(MOVING_AVERAGE, summarize=lambda *args: alter(*MOVING_AVERAGE.summarize(*args)))


def state_of_all_outputs(o, state):
    return o, o


DEFECTS = {
    "outputs": ("forms", NORMAL, altered_outcome(lambda o, state: (o * (1 + 1e-9), state))),
    "final state": ("forms", NORMAL, altered_outcome(lambda o, state: (o, state * (1 + 1e-9)))),
    "not a number": ("forms", NORMAL, altered_outcome(lambda o, state: (o.at[0, 3].set(jnp.nan), state))),
    "gradient by an input": (
        "forms",
        NORMAL,
        altered_arguments(lambda arrays, *rest: (arrays | {"g": jax.lax.stop_gradient(arrays["g"])}, *rest)),
    ),
    "gradient by the initial state": (
        "forms",
        NORMAL,
        altered_arguments(lambda arrays, state, docs: (arrays, jax.lax.stop_gradient(state), docs)),
    ),
    "a start from None": ("forms", NORMAL, with_form(off_from_none)),
    "gradient through the final state": (
        "forms",
        NORMAL,
        altered_outcome(lambda o, state: (o, jax.lax.stop_gradient(state))),
    ),
    "the incoming state is not used": (
        "split",
        NORMAL,
        altered_arguments(lambda arrays, state, docs: (arrays, 0 * state, docs)),
    ),
    "combine in the wrong order": (
        "summary",
        NORMAL,
        dataclasses.replace(
            MOVING_AVERAGE, combine=lambda a, b, options: MOVING_AVERAGE.combine(b, a, options)
        ),
    ),
    "apply without the state": (
        "summary",
        NORMAL,
        dataclasses.replace(MOVING_AVERAGE, apply=lambda summary, state, options: summary[1]),
    ),
    "a later value": (
        "causality",
        NORMAL,
        altered_outcome(lambda o, state: (o + 1e-14 * jax.lax.stop_gradient(o[:, -1:]), state)),
    ),
    "a gradient by later inputs": (
        "causality",
        NORMAL,
        altered_outcome(lambda o, state: (o + gradient_alone(1e-14 * o[:, -1:]), state)),
    ),
    "documents run together": (
        "documents",
        NORMAL,
        altered_arguments(lambda arrays, state, docs: (arrays, state, None)),
    ),
    "padding is read": ("padding", NORMAL, altered_arguments(without_padding)),
    "state in bfloat16": ("state", NORMAL, with_state_in_bfloat16()),
    "a state that grows": ("state", NORMAL, altered_outcome(state_of_all_outputs)),
    "computed in bfloat16": ("precision", NORMAL, with_form(in_bfloat16)),
    "positive exponents": ("extremes", EXTREME, with_form(with_positive_exponents)),
    "a summary without what was written": ("devices", NORMAL, with_summary(lambda keep, add: (keep, 0 * add))),
    "a summary that forgets nothing": ("more meshes", NORMAL, with_summary(lambda keep, add: (1 + 0 * keep, add))),
    "another value when traced": ("jit", NORMAL, altered_outcome(other_when_traced)),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_breaks_its_law(defect):
    law, example, op = DEFECTS[defect]
    with pytest.raises(AssertionError, match="moving_average"):
        OP_LAWS[law](OpCase(op, example))


def test_every_law_has_a_defect():
    assert {law for law, _, _ in DEFECTS.values()} == set(OP_LAWS)


def test_known_gaps_must_be_gaps():
    broken = DEFECTS["outputs"][2]
    check_known_gaps(dataclasses.replace(broken, known_gaps={"forms": "a defect"}))
    with pytest.raises(AssertionError, match="remove the entry"):
        check_known_gaps(dataclasses.replace(MOVING_AVERAGE, known_gaps={"forms": "a defect"}))
    with pytest.raises(AssertionError, match="none of forms"):
        check_known_gaps(dataclasses.replace(MOVING_AVERAGE, known_gaps={"form": "a defect"}))


class WithoutCursor(Retention):
    """Forgets which document it is in."""

    def __call__(self, x, state=None, segment_ids=None):
        y, state = super().__call__(x, state, segment_ids)
        return y, state | {"cursor": jax.tree.map(jnp.zeros_like, state["cursor"])}


class AnotherStart(Retention):
    """Starts from another state than it says."""

    def initial_state(self, batch_size, capacity=None):
        state = super().initial_state(batch_size, capacity)
        return state | {"memory": state["memory"] + 1e-3}


@pytest.mark.parametrize(("law", "layer"), [("split", WithoutCursor), ("start", AnotherStart)])
def test_a_defect_of_a_layer_breaks_its_law(law, layer):
    case = LayerCase("retention", Entry(MIXERS["retention"].op, layer), {})
    with pytest.raises(AssertionError, match="retention"):
        LAYER_LAWS[law](case)
