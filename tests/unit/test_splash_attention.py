"""Softmax attention by splash attention: the blockwise form is its oracle, with the kernel interpreted on the CPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.ops.softmax_attention import SOFTMAX_ATTENTION, empty_cache, softmax_attention
from seqmodels.parallel.mesh import make_mesh
from tests.conformance.cases import described_by
from tests.conformance.compare import assert_close, assert_equal
from tests.tolerances import TOLERANCES

LENGTH = 256
# Documents that end at a block's edge and inside a block, padding before, between and behind; and a full row.
SEGMENTS = np.array([[0] * 3 + [3] * 125 + [7] + [0] * 2 + [2] * 100 + [0] * 25, [1] * LENGTH])


def inputs(dtype=np.float32, length: int = LENGTH):
    rng = np.random.default_rng(0)
    shapes = {"q": (4, 64), "k": (2, 64), "v": (2, 32)}
    return {name: jnp.asarray(rng.normal(size=(2, length, *shape)), dtype) for name, shape in shapes.items()}


@pytest.fixture
def interpreted():
    kernel = SOFTMAX_ATTENTION.kernels["pallas_tpu"]
    kernel = dataclasses.replace(kernel, call=functools.partial(kernel.call, interpret=True))
    with described_by(dataclasses.replace(SOFTMAX_ATTENTION, kernels={"pallas_tpu": kernel})):
        yield


def values_and_gradients(arrays, **options):
    def loss(arrays):
        o, state = softmax_attention(**arrays, **options)
        return jnp.sum(jnp.sin(o)) + jnp.sum(jnp.cos(state.k)), (o, state)

    (_, outputs), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    return outputs, gradients


@pytest.mark.parametrize("segment_ids", [None, SEGMENTS], ids=["one document", "packed"])
@pytest.mark.parametrize("options", [{}, {"window": 40}, {"window": 1000}, {"scale": 0.3, "chunk_size": 128}], ids=str)
def test_equals_the_blockwise_form(interpreted, options, segment_ids):
    options = {**options, "segment_ids": segment_ids}
    expected = values_and_gradients(inputs(), **options, backend="xla")
    found = values_and_gradients(inputs(), **options, backend="pallas_tpu")
    assert_close(found, expected, TOLERANCES["kernel"], "splash attention")
    with pytest.raises(AssertionError, match="off by"):
        assert_close(values_and_gradients(inputs(), **{**options, "window": 39}), expected, TOLERANCES["kernel"], "")


@pytest.mark.parametrize(
    ("arrays", "options", "reason"),
    [
        (inputs(), {"initial_state": empty_cache(2, 512, 2, 64, 32)}, "a cache came in"),
        (inputs(), {"prefix_k": np.ones((3, 2, 64), "f"), "prefix_v": np.ones((3, 2, 32), "f")}, "prefix_k came in"),
        (inputs(), {"window": 8, "sinks": 2}, "sinks=2; expected 0"),
        (inputs(length=200), {}, "the length is 200; expected a multiple of 128"),
        (inputs(np.float16), {}, "q is float16; expected float32 or bfloat16"),
    ],
)
def test_what_it_cannot_do_is_said_and_auto_leaves_to_the_blockwise_form(arrays, options, reason):
    with pytest.raises(InputError, match=f"'pallas_tpu' cannot run this: {reason}"):
        softmax_attention(**arrays, **options, backend="pallas_tpu")
    blockwise = softmax_attention(**arrays, **options, backend="xla")
    assert_equal(softmax_attention(**arrays, **options), blockwise, "auto")


def lowered_for_tpu(**options) -> str:
    attention = jax.jit(functools.partial(softmax_attention, **options))
    return attention.trace(**inputs(jnp.bfloat16)).lower(lowering_platforms=("tpu",)).as_text()


def test_auto_takes_it_for_tpu_alone():
    assert "tpu_custom_call" in lowered_for_tpu()
    assert "tpu_custom_call" not in lowered_for_tpu(backend="xla")
    assert "tpu_custom_call" not in jax.jit(softmax_attention).trace(**inputs()).lower().as_text()


def test_on_a_mesh_every_device_runs_it_on_its_own_rows():
    """Inside `jax.shard_map`: the partitioner cannot look into a kernel."""
    with jax.set_mesh(make_mesh(data=2, devices=jax.devices()[:2])):
        text = lowered_for_tpu()
    assert "tpu_custom_call" in text and "manual_computation" in text
