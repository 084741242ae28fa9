"""Mixers side by side in one block, against the mixers alone."""

import functools

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

WIDTH, LENGTH = 16, 12
TOKENS = jax.random.randint(jax.random.key(0), (2, LENGTH), 0, 11)
SEGMENT_IDS = jnp.array([[1] * 5 + [2] * 7, [0] * 2 + [3] * 8 + [0] * 2])
HEADS = ("softmax_attention", "lightning_attention")


def model_of(*pattern) -> LanguageModel:
    return LanguageModel(vocab_size=11, d_model=WIDTH, n_layers=1, pattern=pattern, mlp=None)


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


def test_an_encoder_sees_both_sides():
    x = jax.random.normal(jax.random.key(1), (1, LENGTH, WIDTH))
    block = Block(WIDTH, HEADS, causal=False)
    variables = jax.jit(block.init)(jax.random.key(0), x, None, 0, None)

    def first_output(x):
        return block.apply(variables, x, None, 0, None)[0][0, 0].sum()

    assert (np.abs(jax.jit(jax.grad(first_output))(x)[0]).max(axis=-1) > 0).all()


def test_several_of_one_name_are_numbered():
    variables = jax.eval_shape(model_of(("rglru", "rglru")).init, jax.random.key(0), TOKENS)
    mixers = variables["params"]["stack"]["rounds"]["block_0"]["mixer"]
    assert set(mixers) == {"rglru", "rglru_norm", "rglru_2", "rglru_2_norm"}


def test_constructors_of_one_name_are_numbered_too():
    few, many = (functools.partial(SoftmaxAttention, num_heads=heads) for heads in (2, 4))
    variables = jax.eval_shape(model_of((few, many)).init, jax.random.key(0), TOKENS)
    mixers = variables["params"]["stack"]["rounds"]["block_0"]["mixer"]
    assert set(mixers) == {"mixer", "mixer_norm", "mixer_2", "mixer_2_norm"}


def test_a_state_of_other_mixers_is_named():
    model, other = model_of(HEADS), model_of(("softmax_attention", "rglru"))
    variables = jax.eval_shape(model.init, jax.random.key(0), TOKENS)
    with pytest.raises(InputError, match=r"ParallelMixers: state is of \['rglru', 'softmax_attention'\]; expected"):
        jax.eval_shape(model.apply, variables, TOKENS, other.initial_state(2, LENGTH))
    with pytest.raises(InputError, match="pattern has an empty tuple"):
        model_of(()).init(jax.random.key(0), TOKENS)
