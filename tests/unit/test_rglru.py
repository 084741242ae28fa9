"""The gated linear recurrence against a loop in float64, the slope of its input factor, and Griffin's block."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.layers import RGLRU
from seqmodels.ops.rglru import rglru
from tests.operators import LENGTH, SEGMENTS, assert_close
from tests.tolerances import TOLERANCES

WIDTH = 6
FORMS = ("recurrent", "chunked")
run = jax.jit(rglru, static_argnames=("form", "chunk_size"))


pytestmark = pytest.mark.usefixtures("float64")


def inputs():
    random = np.random.default_rng(0)
    x, logits = random.normal(size=(2, 2, LENGTH, WIDTH))
    return x, np.where(logits > 1.5, -np.inf, -np.exp(logits))


def oracle(x, g, segment_ids):
    """Equation (1), one position at a time."""
    o, final = np.zeros(x.shape), np.zeros_like(x[:, 0])
    for b in range(len(x)):
        h, document = np.zeros_like(x[b, 0]), 0
        for t in np.flatnonzero(segment_ids[b]):
            if segment_ids[b, t] != document:
                h, document = np.zeros_like(x[b, 0]), segment_ids[b, t]
            a = np.exp(g[b, t])
            h = a * h + np.sqrt(1 - a**2) * x[b, t]
            o[b, t] = h
        final[b] = h
    return o, final


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_size", [1, 4, 7, 64])
def test_values_match_the_oracle(form, chunk_size):
    x, g = inputs()
    assert_close(run(x, g, segment_ids=SEGMENTS, form=form, chunk_size=chunk_size), oracle(x, g, SEGMENTS))


@pytest.mark.parametrize("form", FORMS)
def test_the_size_of_the_state_is_that_of_the_inputs_whatever_the_decay(form):
    """A long stream of normal inputs has states of variance one, from the first input that entered whole."""
    x = np.random.default_rng(0).normal(size=(4, 2048, 256))
    g = np.broadcast_to(-np.geomspace(1e-2, 10, 256), x.shape).copy()
    g[:, 0] = -np.inf
    o, _ = run(x, g, form=form)
    variance = np.asarray(o).var(axis=(0, 1))
    # 4 rows with a hundred independent stretches at the slowest decay: a deviation of a tenth; four of them.
    assert np.abs(variance - 1).max() < 4 * 0.1


@pytest.mark.parametrize("form", FORMS)
def test_gradients_stay_finite_and_bounded_without_decay(form):
    x, _ = inputs()
    g = jnp.zeros(x.shape, jnp.float32)
    dx, dg = jax.grad(lambda x, g: run(x, g, form=form)[0].sum(), argnums=(0, 1))(jnp.asarray(x, jnp.float32), g)
    assert np.all(dx == 0)
    # With a = 1 a step adds nothing, and the square root has a slope of 1000 by its argument, which has 2 by g.
    following = np.arange(LENGTH, 0, -1)[:, None]
    assert_close(dg, -2000 * x * following, "layer")


@pytest.mark.parametrize("form", FORMS)
def test_weak_decays_keep_their_digits(form):
    """1 - a^2 is not taken from 1 in float32: at g = -1e-6 that would leave two digits."""
    x, g = np.ones((1, 4, 1), np.float32), np.full((1, 4, 1), -1e-6, np.float32)
    o, _ = run(x, g, form=form)
    expected, _ = oracle(x.astype(np.float64), g.astype(np.float64), np.ones((1, 4)))
    assert np.abs(o - expected).max() <= TOLERANCES["jit"] * expected.max()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": np.zeros((3, 4))}, r"rglru: x has shape \(3, 4\); expected \[batch, time, channels\]"),
        ({"g": np.zeros((1, 3))}, r"rglru: g has shape \(1, 3\); expected \(1, 3, 4\)"),
        ({"form": "chunk"}, "did you mean 'chunked'"),
        ({"initial_state": np.zeros((1, 5))}, r"initial_state has shape \(1, 5\); expected \(1, 4\)"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(InputError, match=message):
        rglru(**{"x": np.zeros((1, 3, 4)), "g": np.zeros((1, 3, 4)), **changed})


def test_the_block_is_griffins():
    """The layer, from its parameters, written out: two documents, the first token of each let in whole."""
    layer = RGLRU(d_model=4, lru_width=6, num_heads=2)
    x = np.random.default_rng(0).normal(size=(1, 9, 4))
    ids = np.array([[1] * 5 + [2] * 4])
    variables = jax.jit(layer.init)(jax.random.key(0), jnp.asarray(x))
    p = jax.tree.map(lambda w: np.asarray(w, np.float64) + 0.1, variables)["params"]
    found, _ = jax.jit(layer.apply)({"params": p}, jnp.asarray(x), segment_ids=ids)

    def linear(x, name):
        return x @ p[name]["kernel"] + p[name]["bias"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def gate(u, name):
        weight, bias = p["rg_lru"][f"{name}_weight"], p["rg_lru"][f"{name}_bias"]
        return sigmoid(np.concatenate([u[3 * i : 3 * i + 3] @ weight[i] + bias[i] for i in range(2)]))

    expected = []
    for document in (x[0, :5], x[0, 5:]):
        branch, h = linear(document, "linear_x"), 0
        for t, token in enumerate(document):
            kernel = p["conv_1d"]["kernel"]
            u = p["conv_1d"]["bias"] + sum(kernel[3 - j] * branch[t - j] for j in range(min(t, 3) + 1))
            a = np.exp(-8 * np.logaddexp(0, p["rg_lru"]["recurrent_param"]) * gate(u, "recurrent_gate")) * (t > 0)
            h = a * h + np.sqrt(1 - a**2) * gate(u, "input_gate") * u
            z = linear(token, "linear_y")
            gelu = 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))
            expected.append(linear(h * gelu, "linear_out"))
    assert_close(found[0], np.array(expected), "layer")


def test_decays_start_between_slow_and_very_slow():
    params = jax.jit(RGLRU(d_model=64).init)(jax.random.key(0), jnp.zeros((1, 1, 64)))["params"]["rg_lru"]
    slowest = np.exp(-np.logaddexp(0, np.asarray(params["recurrent_param"], np.float64)))
    assert slowest.min() >= 0.9 - TOLERANCES["layer"] and slowest.max() <= 0.999 + TOLERANCES["layer"]


def test_blocks_of_an_ordinary_width_run_in_bfloat16():
    """Narrow blocks take another path of XLA's than those of 32 channels, which on CPUs refuses mixed products."""
    x = jnp.ones((1, 64, 128), jnp.bfloat16)
    layer = RGLRU(d_model=128, num_heads=4, dtype=jnp.bfloat16)
    y, _ = jax.jit(layer.apply)(jax.jit(layer.init)(jax.random.key(0), x), x)
    assert y.dtype == jnp.bfloat16 and jnp.isfinite(y).all()
