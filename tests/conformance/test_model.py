"""A stack of any mixer: scan over layers equals unrolled, recomputation equals none, decoding equals the whole."""

import functools

import jax
import jax.numpy as jnp
import pytest

from seqmodels.models import LanguageModel
from seqmodels.models.block import REMAT_POLICIES, MixerName
from tests.conformance.compare import assert_close
from tests.mixers import every_mixer
from tests.tolerances import TOLERANCES

LENGTH, PREFILL = 12, 9
# Two mixers in one block. The decay of lightning attention depends on the depth, which a scan over layers traces.
SIDE_BY_SIDE = ("softmax_attention", "lightning_attention")
MIXERS = [
    *every_mixer("model"),
    pytest.param(SIDE_BY_SIDE, id="side by side", marks=pytest.mark.xdist_group("model side by side")),
]
TOKENS = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, 11)
SEGMENT_IDS = jnp.array([[1] * 5 + [2] * 7, [0] * 2 + [3] * 8 + [0] * 2])


def make(mixer: MixerName, **fields) -> LanguageModel:
    return LanguageModel(vocab_size=11, d_model=16, n_layers=2, pattern=(mixer,), mlp=None, **fields)


@functools.cache
def variables_of(mixer: MixerName):
    return jax.jit(make(mixer).init)(jax.random.key(0), TOKENS[:, :1])


def differentiated(model: LanguageModel, variables):
    """Logits, final state, and the gradient by the parameters."""

    def loss(variables):
        logits, state = model.apply(variables, TOKENS, segment_ids=SEGMENT_IDS)
        return (logits * jnp.cos(jnp.arange(logits.size)).reshape(logits.shape)).sum(), (logits, state)

    (_, outcome), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
    return {"outcome": outcome, "gradient": gradient}


def unrolled(variables):
    """Parameters stacked over the layers, numbered instead."""
    stack = variables["params"]["stack"]
    rounds = {f"round_{i}": jax.tree.map(lambda x, i=i: x[i], stack["rounds"]) for i in range(2)}
    return {"params": {**variables["params"], "stack": rounds}}


@pytest.mark.parametrize("mixer", MIXERS)
def test_scan_and_recomputation_change_nothing(mixer):
    variables = variables_of(mixer)
    expected = differentiated(make(mixer), variables)
    found = differentiated(make(mixer, remat="full"), variables)
    for part, value in expected.items():
        assert_close(found[part], value, TOLERANCES["model"], f"{mixer}, recomputed: {part}")
    found = differentiated(make(mixer, scan=False), unrolled(variables))
    expected["gradient"] = unrolled(expected["gradient"])
    for part, value in expected.items():
        assert_close(found[part], value, TOLERANCES["model"], f"{mixer}, unrolled: {part}")


@pytest.mark.parametrize("policy", sorted(set(REMAT_POLICIES) - {"full"}))
def test_no_policy_of_recomputation_changes_anything(policy):
    variables = variables_of("gated_linear_attention")
    expected = differentiated(make("gated_linear_attention"), variables)
    found = differentiated(make("gated_linear_attention", remat=policy), variables)
    for part, value in expected.items():
        assert_close(found[part], value, TOLERANCES["model"], f"{policy}: {part}")


@pytest.mark.parametrize("mixer", MIXERS)
def test_prefill_and_decode_equal_the_whole(mixer):
    model, variables = make(mixer), variables_of(mixer)
    apply = jax.jit(model.apply)
    expected = apply(variables, TOKENS, model.initial_state(2, LENGTH), SEGMENT_IDS)
    state, logits = model.initial_state(2, LENGTH), []
    for start, end in [(0, PREFILL), *((t, t + 1) for t in range(PREFILL, LENGTH))]:
        o, state = apply(variables, TOKENS[:, start:end], state, SEGMENT_IDS[:, start:end])
        logits.append(o)
    found = jnp.concatenate(logits, axis=1), state
    assert_close(found, expected, TOLERANCES["model"], f"{mixer}, decoded: ")
