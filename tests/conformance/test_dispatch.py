"""Choice of form and backend: what is unknown is named, what is named runs or raises."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.ops._op import Kernel
from seqmodels.ops.linear_attention import linear_attention
from tests.conformance.cases import described_by
from tests.conformance.toy.ops.moving_average import MOVING_AVERAGE, moving_average

X, G = jnp.ones((2, 5, 3)), jnp.full(3, -1.0)
ONES = jnp.ones((2, 5), int)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "chunkd"}, "form='chunkd' .* did you mean 'chunked'"),
        ({"form": "parallel"}, "form='parallel' .* valid: chunked, recurrent"),
        ({"backend": "xls"}, "backend='xls' .* did you mean 'xla'"),
        ({"chunk_size": 0}, "chunk_size=0; expected a positive number"),
        ({"segment_ids": ONES[:, :4]}, r"segment_ids has shape \(2, 4\); expected \(2, 5\)"),
        ({"segment_ids": ONES[:1]}, r"segment_ids has shape \(1, 5\); expected \(2, 5\)"),
        ({"initial_state": jnp.zeros((2, 4))}, r"initial_state has shape \(2, 4\); expected \(2, 3\)"),
        ({"initial_state": (jnp.zeros((2, 3)),)}, "initial_state has the structure"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(InputError, match=f"^moving_average: {message}") as error:
        moving_average(X, G, **options)
    assert "\n" not in str(error.value)


def test_a_span_without_positions_is_refused():
    with pytest.raises(InputError, match="no positions"):
        moving_average(X[:, :0], G)


def form_that_must_not_run(*args, **kwargs):
    raise AssertionError("this form was not asked for")


def test_one_token_is_one_step():
    with described_by(dataclasses.replace(MOVING_AVERAGE, forms={"chunked": form_that_must_not_run})):
        o, state = moving_average(X[:, :1], G)
        program = jax.make_jaxpr(moving_average)(X[:, :1], G)
        with pytest.raises(AssertionError, match="not asked for"):
            moving_average(X[:, :2], G)
    expected_state, expected = MOVING_AVERAGE.step(jnp.zeros((2, 3)), {"x": X[:, 0], "g": G}, {})
    np.testing.assert_array_equal(o[:, 0], expected)
    np.testing.assert_array_equal(state, expected_state)
    assert "scan" not in str(program)


def kernel(platform: str, reason: str | None) -> Kernel:
    """A kernel whose output is 7 everywhere."""

    def call(arrays, state, docs, *, chunk_size, options):
        return jnp.full_like(arrays["x"], 7), state

    return Kernel(platform, lambda arrays, options: reason, call)


def described_with(**kernels: Kernel):
    return described_by(dataclasses.replace(MOVING_AVERAGE, kernels=kernels))


def test_a_named_backend_runs_or_raises():
    with described_with(pallas_tpu=kernel("tpu", None)):
        assert (moving_average(X, G, backend="pallas_tpu")[0] == 7).all()
        assert (moving_average(X, G, backend="xla")[0] < 7).all()
    with (
        described_with(pallas_tpu=kernel("tpu", "3 channels; expected a multiple of 128")),
        pytest.raises(
            InputError, match="'pallas_tpu' cannot run this: 3 channels; expected a multiple of 128"
        ),
    ):
        moving_average(X, G, backend="pallas_tpu")


def test_auto_takes_the_first_kernel_that_can_for_the_platform():
    kernels = {
        "first": kernel("cpu", "too small"),
        "second": kernel("cpu", None),
        "other": kernel("tpu", None),
    }
    with described_with(**kernels):
        assert (moving_average(X, G)[0] == 7).all()
    with described_with(first=kernels["first"], other=kernels["other"]):
        assert (moving_average(X, G)[0] < 7).all()


@pytest.mark.parametrize("automatic", [False, lambda arrays: "x" not in arrays])
def test_auto_leaves_a_kernel_alone_that_is_taken_only_by_name(automatic):
    with described_with(unmeasured=dataclasses.replace(kernel("cpu", None), automatic=automatic)):
        assert (moving_average(X, G)[0] < 7).all()
        assert (moving_average(X, G, backend="unmeasured")[0] == 7).all()


def test_decay_per_channel_on_a_gpu_is_taken_only_by_name():
    row = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.bfloat16)
    g = jax.ShapeDtypeStruct((1, 64, 2, 64), jnp.float32)

    def has_kernel(g: jax.ShapeDtypeStruct, backend: str) -> bool:
        run = jax.jit(functools.partial(linear_attention, backend=backend))
        return "mosaic_gpu" in run.trace(row, row, row, g).lower(lowering_platforms=("cuda",)).as_text()

    assert has_kernel(g, "pallas_gpu")
    assert not has_kernel(g, "auto")
    assert has_kernel(jax.ShapeDtypeStruct(g.shape[:3], g.dtype), "auto")
