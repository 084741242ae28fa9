"""The language model: its parameters, dtypes, cost, and what it refuses."""

import jax
import jax.numpy as jnp
import pytest

from seqmodels.errors import InputError
from seqmodels.layers import SGLU, GatedLinearAttention, LinearAttention
from seqmodels.models import LanguageModel
from seqmodels.models.accounting import flops_per_token, parameter_count
from tests.tolerances import TOLERANCES

TOKENS = jax.ShapeDtypeStruct((2, 16), jnp.int32)


def shapes(model: LanguageModel):
    return jax.eval_shape(model.init, jax.random.key(0), TOKENS)


def apply_shapes(model: LanguageModel):
    return jax.eval_shape(model.apply, shapes(model), TOKENS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": ("gated_linear_atention",)}, "did you mean 'gated_linear_attention'"),
        ({"pattern": ()}, "pattern is empty"),
        ({"mixer_scales": ((1.0, 1.0),) * 3}, "expected one, or one for each of the 1 places"),
        ({"remat": "ful"}, "did you mean 'full'"),
        ({"norm": "rms"}, "did you mean 'rmsnorm'"),
        ({"d_model": 30, "pattern": ("retention",)}, "not divisible by 8 heads"),
    ],
)
def test_wrong_fields_are_named(fields, message):
    with pytest.raises(InputError, match=message):
        shapes(LanguageModel(**{"vocab_size": 11, "d_model": 32, **fields}))


def test_parameters_are_float32_and_activations_are_not():
    model = LanguageModel(vocab_size=11, d_model=32, dtype=jnp.bfloat16)
    logits, state = apply_shapes(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes(model))} == {jnp.dtype("float32")}
    assert logits.dtype == jnp.float32
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert floats and all(leaf.dtype == jnp.float32 for leaf in floats)
    program = str(jax.make_jaxpr(lambda v, t: model.apply(v, t))(shapes(model), TOKENS))
    assert "bf16[2,16,32]" in program


def test_tied_embeddings_save_the_head():
    tied, untied = (
        parameter_count(shapes(LanguageModel(vocab_size=11, d_model=32, tie_embeddings=tie))) for tie in (True, False)
    )
    assert untied - tied == 11 * 32


def test_pattern_takes_names_and_constructors():
    def make(**fields):
        return GatedLinearAttention(num_heads=2, **fields)

    model = LanguageModel(vocab_size=11, d_model=32, n_layers=4, pattern=("softmax_attention", make), mlp=SGLU)
    rounds = shapes(model)["params"]["stack"]["rounds"]
    assert set(rounds) == {"block_0", "block_1"}
    assert rounds["block_1"]["mixer"]["gk_proj_1"]["kernel"].shape == (2, 16, 16)


def test_without_a_feed_forward_layer():
    assert "mlp" not in shapes(LanguageModel(vocab_size=11, mlp=None))["params"]["stack"]["rounds"]["block_0"]


def test_flops_are_two_per_weight_and_token_and_those_of_the_mixer():
    """Loops count as often as they run: here a scan over layers around a scan over time, which reads a k x v state."""
    d, heads, layers, vocabulary, hidden = 32, 4, 3, 11, 128

    def attention(**fields):
        return LinearAttention(num_heads=heads, normalize=False, form="recurrent", **fields)

    model = LanguageModel(vocab_size=vocabulary, d_model=d, n_layers=layers, pattern=(attention,))
    weights = 2 * (4 * d * d + 3 * d * hidden)
    read = 2 * heads * (d // heads) ** 2
    assert flops_per_token(model, 16) == layers * (weights + read) + 2 * d * vocabulary


def test_flops_agree_with_what_xla_counts():
    model = LanguageModel(vocab_size=64, d_model=64, n_layers=2, scan=False)
    length = 64
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = jax.jit(lambda v, t: model.apply(v, t)[0]).lower(shapes(model), tokens).compile()
    counted = compiled.cost_analysis()["flops"] / length
    # XLA also counts element-wise work, and the one chunk of this length is all there is in the loop.
    assert flops_per_token(model, length) < counted < 1.5 * flops_per_token(model, length)


def test_a_depth_that_the_pattern_does_not_divide():
    """Four layers in threes: a round and a block, scanned and unrolled alike, at once and token by token."""
    model = LanguageModel(
        vocab_size=11,
        d_model=16,
        n_layers=4,
        pattern=("linear_attention", "linear_attention", "retention"),
        mixer_scales=((1.5, 1.0), (1.0, 0.5), (1.0, 2.0)),
        normalized_residual=True,
        embedding_scale=3.0,
        logit_cap=2.0,
        norm="zero_centered_rmsnorm",
        mlp=None,
    )
    tokens = jnp.arange(12).reshape(2, 6) % 11
    variables = model.init(jax.random.key(0), tokens)
    stack = variables["params"]["stack"]
    assert set(stack) == {"rounds", "remainder"} and set(stack["remainder"]) == {"block_0"}
    logits, state = model.apply(variables, tokens)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, model.initial_state(2))
    assert float(jnp.abs(logits).max()) < 2.0

    rounds = {"round_0": jax.tree.map(lambda x: x[0], stack["rounds"]), "remainder": stack["remainder"]}
    unrolled, _ = model.clone(scan=False).apply({"params": {**variables["params"], "stack": rounds}}, tokens)
    assert jnp.abs(unrolled - logits).max() <= TOLERANCES["model"]

    first, state = model.apply(variables, tokens[:, :4], model.initial_state(2))
    last, _ = model.apply(variables, tokens[:, 4:], state)
    assert jnp.abs(jnp.concatenate([first, last], axis=1) - logits).max() <= TOLERANCES["model"]
