"""What every layer and operator says of wrong heads, states and gates."""

import jax
import jax.numpy as jnp
import pytest

from seqmodels import registry
from seqmodels.errors import InputError
from seqmodels.layers import TitansMemory
from tests.conformance.cases import op_cases
from tests.conformance.compare import cast

WIDTH, LENGTH = 16, 6
X = jax.ShapeDtypeStruct((2, LENGTH, WIDTH), jnp.float32)
# Fields in which a number of heads, or of channels per head, may not suit the width.
WRONG_HEADS = {"mamba2": {"head_dim": 5}, "hgrn2": {"expand_ratio": 5}, "rwkv6": {"head_dim": 5}}


def states_of(layer, batch=2):
    return jax.eval_shape(lambda: layer.initial_state(batch, LENGTH))


@pytest.mark.parametrize("name", registry.MIXERS)
def test_heads_that_do_not_divide_the_width(name):
    layer = registry.mixer(name)
    fields = WRONG_HEADS.get(name, {"num_heads": 5})
    with pytest.raises(InputError, match=rf"^{layer.__name__}: .*(divisible|heads of)"):
        jax.eval_shape(layer(d_model=WIDTH, **fields).init, jax.random.key(0), X)


@pytest.mark.parametrize("name", registry.MIXERS)
def test_a_state_of_another_layer_or_batch(name):
    layer = registry.mixer(name)(d_model=WIDTH)
    variables = jax.eval_shape(layer.init, jax.random.key(0), X)
    other = TitansMemory(WIDTH, conv_size=3) if name != "titans_memory" else registry.mixer("rwkv6")(d_model=WIDTH)
    with pytest.raises(InputError, match=r"state (has|is)|initial_state|^state\["):
        jax.eval_shape(layer.apply, variables, X, states_of(other))
    with pytest.raises(InputError, match=rf"^{type(layer).__name__}: state has 3 rows; expected 2 as x has"):
        jax.eval_shape(layer.apply, variables, X, states_of(layer, batch=3))
    with pytest.raises(InputError, match=rf"^{type(layer).__name__}: x has shape \(2, 6, 15\); expected"):
        jax.eval_shape(layer.apply, variables, jax.ShapeDtypeStruct((2, LENGTH, WIDTH - 1), jnp.float32))


@pytest.mark.parametrize("name", registry.MIXERS)
def test_a_state_with_a_part_too_few(name):
    layer = registry.mixer(name)(d_model=WIDTH)
    variables, state = jax.eval_shape(layer.init, jax.random.key(0), X), states_of(layer)
    part = max(state, key=lambda name: name != "cursor")
    with pytest.raises(InputError, match=rf"^{type(layer).__name__}: state has \[.*\]; expected \[.*'{part}'"):
        jax.eval_shape(layer.apply, variables, X, {key: value for key, value in state.items() if key != part})


# The argument of each operator that keeps a state from growing: its name, and a value that is out of its range.
GATES = {
    "linear_attention": ("g", 0.5, "g has values from 0.5 to 0.5; expected natural logarithms of decays, <= 0"),
    "delta_rule": ("g", 0.5, "g has values from 0.5 to 0.5; expected natural logarithms of decays, <= 0"),
    "wkv6": ("g", jnp.nan, "g has values from nan to nan; expected natural logarithms of decays, <= 0"),
    "rglru": ("g", 0.5, "g has values from 0.5 to 0.5; expected natural logarithms of decays, <= 0"),
    "mlstm": ("g", 0.5, "g has values from 0.5 to 0.5; expected natural logarithms of decays, <= 0"),
    "ssd": ("A", 0.5, "A has values from 0.5 to 0.5; expected rates of decay, <= 0"),
    "neural_memory": ("alpha", 1.5, "alpha has values from 1.5 to 1.5; expected gates from 0 to 1"),
}


@pytest.mark.parametrize("name", GATES)
def test_gates_out_of_range_are_named_where_their_values_are_known(name):
    gate, value, message = GATES[name]
    op = registry.ops()[name]
    case = next(case for case in op_cases({name: op}) if case.arguments(4).arrays.get(gate) is not None)
    arrays = cast(case.arguments(4).arrays, jnp.dtype("float32"))
    arrays = {**arrays, gate: jnp.full_like(arrays[gate], value)}
    with pytest.raises(InputError, match=f"^{name}: {message}"):
        op.call(**arrays, **case.options)
    jax.eval_shape(lambda arrays: op.call(**arrays, **case.options), arrays)
