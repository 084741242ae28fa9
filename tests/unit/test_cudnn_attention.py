"""Softmax attention by cuDNN: what it is asked for, computed by XLA's form of the same function of jax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.ops import _cudnn_attention
from seqmodels.ops.softmax_attention import empty_cache, softmax_attention

LENGTH = 40


def inputs(dtype=jnp.bfloat16, key_dim: int = 16, value_dim: int = 16):
    rng = np.random.default_rng(0)
    shapes = {"q": (4, key_dim), "k": (2, key_dim), "v": (2, value_dim)}
    return {name: jnp.asarray(rng.normal(size=(2, LENGTH, *shape)), dtype) for name, shape in shapes.items()}


class Gpu:
    device_kind = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(_cudnn_attention, "IMPLEMENTATION", "xla")
    monkeypatch.setattr(_cudnn_attention.jax, "devices", lambda: [Gpu()])


def values_and_gradients(arrays, **options):
    def loss(arrays):
        o, state = softmax_attention(**arrays, **options)
        return jnp.sum(jnp.sin(o.astype(jnp.float32))), (o, state)

    (_, (o, state)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)
    found = {"o": o, **gradients, **dict(zip(("keys", "values", "positions"), state))}
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("options", [{}, {"window": 7}, {"window": 1000}, {"scale": 0.3}], ids=str)
def test_equals_the_blockwise_form(options):
    found = values_and_gradients(inputs(), **options, backend="cudnn")
    expected = values_and_gradients(inputs(), **options, backend="xla")
    other = values_and_gradients(inputs(), **{**options, "window": 6}, backend="xla")
    for name, x in expected.items():
        # Both round probabilities or outputs to bfloat16.
        assert np.linalg.norm(found[name] - x) <= 2**-6 * np.linalg.norm(x), name
    assert np.linalg.norm(found["o"] - other["o"]) > 2**-6 * np.linalg.norm(other["o"])


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    ("arrays", "options", "reason"),
    [
        (inputs(), {"initial_state": empty_cache(2, 64, 2, 16, 16)}, "a cache came in"),
        (inputs(), {"window": 8, "sinks": 2}, "sinks=2; expected 0"),
        (inputs(), {"segment_ids": np.ones((2, LENGTH), int)}, "segment_ids came in; expected rows of one document"),
        (inputs(np.float32), {}, "q, k, v are float32, float32, float32; expected all bfloat16 or all float16"),
        (inputs(value_dim=8), {}, "the heads of k and v have 16 and 8 channels; expected the same multiple of 8"),
        (inputs(key_dim=136, value_dim=136), {}, "at most 128"),
    ],
)
def test_what_it_cannot_do_is_said(arrays, options, reason):
    with pytest.raises(InputError, match=f"'cudnn' cannot run this: .*{reason}"):
        softmax_attention(**arrays, **options, backend="cudnn")


def test_it_needs_a_gpu():
    with pytest.raises(InputError, match="this process has no NVIDIA GPU, but cpu"):
        softmax_attention(**inputs(), backend="cudnn")
