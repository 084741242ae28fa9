"""Mixers side by side in one block: against the mixers alone, and as part of a stack that trains, scans and decodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.layers import LightningAttention, SoftmaxAttention, make_norm
from seqmodels.models import LanguageModel
from seqmodels.models.block import Block
from tests.conformance.compare import assert_close
from tests.tolerances import TOLERANCES

WIDTH, LENGTH, PREFILL = 16, 12, 9
TOKENS = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, 11)
SEGMENT_IDS = jnp.array([[1] * 5 + [2] * 7, [0] * 2 + [3] * 8 + [0] * 2])
# The decay of lightning attention depends on the depth, which a scan over layers traces.
HEADS = ("softmax_attention", "lightning_attention")


def make(**fields) -> LanguageModel:
    pattern = (HEADS, "gated_linear_attention")
    return LanguageModel(**{"vocab_size": 11, "d_model": WIDTH, "n_layers": 4, "pattern": pattern, **fields})


@pytest.fixture(scope="module")
def variables():
    return jax.jit(make().init)(jax.random.key(0), TOKENS[:, :1])


def test_a_block_is_the_mean_of_its_normed_mixers():
    x = jax.random.normal(jax.random.key(1), (2, LENGTH, WIDTH))
    block = Block(WIDTH, HEADS, mlp=None, n_layers=3)
    variables = jax.jit(block.init)(jax.random.key(0), x, None, 2, SEGMENT_IDS)
    p = variables["params"]
    p["mixer"]["lightning_attention_norm"]["scale"] *= 3
    found, state = block.apply(variables, x, None, 2, SEGMENT_IDS)

    def norm(scale, x):
        return make_norm("rmsnorm").apply({"params": scale}, x)

    normed = norm(p["mixer_norm"], x)
    alone = {
        "softmax_attention": SoftmaxAttention(WIDTH),
        "lightning_attention": LightningAttention(WIDTH, layer_index=2, n_layers=3),
    }
    outputs = []
    for name, layer in alone.items():
        y, expected = layer.apply({"params": p["mixer"][name]}, normed, None, SEGMENT_IDS)
        assert_close(state[name], expected, TOLERANCES["model"], f"{name}: state")
        outputs.append(norm(p["mixer"][f"{name}_norm"], y))
    assert_close(found, x + sum(outputs) / 2, TOLERANCES["model"], "block")


def test_scan_and_recomputation_change_nothing(variables):
    def differentiated(model, variables):
        def loss(variables):
            logits, state = model.apply(variables, TOKENS, segment_ids=SEGMENT_IDS)
            return (logits * jnp.cos(jnp.arange(logits.size)).reshape(logits.shape)).sum(), (logits, state)

        (_, outcome), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)
        return outcome, gradient["params"]

    def unrolled(params):
        rounds = {f"round_{i}": jax.tree.map(lambda x, i=i: x[i], params["stack"]["rounds"]) for i in range(2)}
        return {**params, "stack": rounds}

    expected = differentiated(make(), variables)
    assert_close(differentiated(make(remat="full"), variables), expected, TOLERANCES["model"], "recomputed")
    found = differentiated(make(scan=False), {"params": unrolled(variables["params"])})
    assert_close(found, (expected[0], unrolled(expected[1])), TOLERANCES["model"], "unrolled")


def test_prefill_and_decode_equal_the_whole(variables):
    model = make()
    apply = jax.jit(model.apply)
    expected = apply(variables, TOKENS, model.initial_state(2, LENGTH), SEGMENT_IDS)
    state, logits = model.initial_state(2, LENGTH), []
    for start, end in [(0, PREFILL), *((t, t + 1) for t in range(PREFILL, LENGTH))]:
        o, state = apply(variables, TOKENS[:, start:end], state, SEGMENT_IDS[:, start:end])
        logits.append(o)
    assert_close((jnp.concatenate(logits, axis=1), state), expected, TOLERANCES["model"], "decoded")


def test_an_encoder_sees_both_sides():
    x = jax.random.normal(jax.random.key(1), (1, LENGTH, WIDTH))
    block = Block(WIDTH, HEADS, causal=False)
    variables = jax.jit(block.init)(jax.random.key(0), x, None, 0, None)

    def first_output(x):
        return block.apply(variables, x, None, 0, None)[0][0, 0].sum()

    assert (np.abs(jax.jit(jax.grad(first_output))(x)[0]).max(axis=-1) > 0).all()


def test_several_of_one_name_are_numbered():
    model = make(pattern=(("rglru", "rglru"),), n_layers=1, mlp=None)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]["stack"]["rounds"]["block_0"]["mixer"]
    assert set(params) == {"rglru", "rglru_norm", "rglru_2", "rglru_2_norm"}


def test_a_state_of_other_mixers_is_named(variables):
    other = make(pattern=(("softmax_attention", "rglru"), "gated_linear_attention"))
    with pytest.raises(InputError, match=r"ParallelMixers: state is of \['rglru', 'softmax_attention'\]; expected"):
        make().apply(variables, TOKENS, other.initial_state(2, LENGTH))
    with pytest.raises(InputError, match="pattern has an empty tuple"):
        make(pattern=((),)).init(jax.random.key(0), TOKENS)
