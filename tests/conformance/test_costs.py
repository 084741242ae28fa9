"""What a layer declares of its costs is so: bytes are those of its state, FLOPs those of its products."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from seqmodels import registry
from seqmodels.errors import InputError
from seqmodels.layers import Mixer
from seqmodels.models.accounting import flops
from tests.conformance.cases import EncoderCase, LayerCase, layer_cases
from tests.mixers import every_mixer
from tests.tolerances import ELEMENTWISE_OF_STATE, ELEMENTWISE_SHARE, TOLERANCES

CASES = [case for case in layer_cases(registry.MIXERS) if not isinstance(case, EncoderCase)]
WIDTH = 64

# Whole chunks and mini-batches, and parts of them; attention has one block in both, whose visits the program tells.
LENGTH, UNEVEN = 64, 100

# One chunk, mini-batch and segment: XLA counts a loop once, however often it turns.
WIDE, ONE_CHUNK = 512, 64
ONE_OF_EACH = {"chunk_size": ONE_CHUNK, "mini_batch": ONE_CHUNK, "segment": ONE_CHUNK, "persistent": 1}


def tree_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def call(layer: Mixer, length: int, state_length: int | None = None) -> tuple:
    """`apply` and the shapes of its arguments; state_length: go on from a state made for so many tokens."""
    one, x = (jax.ShapeDtypeStruct((1, n, layer.d_model), layer.dtype) for n in (1, length))
    variables = jax.eval_shape(layer.init, jax.random.key(0), one)
    state = None if state_length is None else jax.eval_shape(lambda: layer.initial_state(1, state_length))
    return layer.apply, variables, x, state


@pytest.mark.parametrize("case", CASES, ids=str)
def test_declared_bytes_are_those_of_the_state(case: LayerCase):
    sizes = set()
    for dtype in (jnp.float32, jnp.bfloat16):
        layer = case.constructor(d_model=WIDTH, dtype=dtype, **case.fields)
        for length in (LENGTH, 2 * LENGTH):
            declared = layer.state_bytes(length)
            assert declared == tree_bytes(jax.eval_shape(lambda: layer.initial_state(1, length)))  # noqa: B023
            sizes.add((dtype, declared))
    assert len(sizes) == 2 or case.op.state_grows
    apply, *arguments = call(layer, 1, LENGTH)
    assert layer.state_bytes(LENGTH) == tree_bytes(jax.eval_shape(apply, *arguments)[1]), "after a call"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_declared_flops_are_those_of_the_program(case: LayerCase):
    layer = case.constructor(d_model=WIDTH, **case.fields)
    for length in (LENGTH, UNEVEN):
        declared, counted = length * layer.flops_per_token(length), flops(*call(layer, length))
        assert declared == pytest.approx(counted, rel=TOLERANCES["flops"]), f"training on {length} tokens"
    declared, counted = layer.flops_per_token(LENGTH, decoding=True), flops(*call(layer, 1, LENGTH))
    assert declared == pytest.approx(counted, rel=TOLERANCES["flops"]), "decoding"


@pytest.mark.parametrize("mixer", every_mixer("costs"))
def test_declared_flops_are_what_xla_counts_but_for_element_wise_work(mixer: str):
    constructor = registry.MIXERS[mixer].layer
    fields = {name: value for name, value in ONE_OF_EACH.items() if name in constructor.__dataclass_fields__}
    layer = constructor(d_model=WIDE, **fields)
    declared = {
        "training": ONE_CHUNK * layer.flops_per_token(ONE_CHUNK),
        "decoding": layer.flops_per_token(ONE_CHUNK, decoding=True),
    }
    calls = {"training": call(layer, ONE_CHUNK), "decoding": call(layer, 1, ONE_CHUNK)}
    elements = {"training": 0, "decoding": layer.state_bytes(ONE_CHUNK) / 4}
    for what, (apply, *arguments) in calls.items():
        counted = jax.jit(apply).lower(*arguments).compile().cost_analysis()["flops"]
        most = declared[what] * (1 + ELEMENTWISE_SHARE) + ELEMENTWISE_OF_STATE * elements[what]
        share = f"{what}: XLA counts {counted / declared[what]:.3f} of what is declared"
        assert declared[what] <= counted <= most, share


def test_a_layer_that_declares_nothing_says_so():
    layer = Mixer(d_model=8)
    with pytest.raises(InputError, match="Mixer: state_bytes is not declared; expected a method"):
        layer.state_bytes()
    with pytest.raises(InputError, match="Mixer: flops_per_token is not declared; expected a method"):
        layer.flops_per_token(8)
