"""Feature maps, and the layers that are known for one: against attention that is quadratic and in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.layers import Based, LinearAttention
from seqmodels.ops.feature_maps import FEATURE_MAPS, dpfp, elu_plus_one, hedgehog, taylor
from tests.by_hand import heads, merged, normalized_attention, random_variables
from tests.conformance.compare import assert_close
from tests.tolerances import TOLERANCES

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 21, 16)).astype(np.float32)
FEATURES = {"taylor": 1 + 5 + 15, "dpfp": 10, "dpfp2": 20, "dpfp3": 30, "hedgehog": 10}


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_number_of_features_and_dtype(name):
    for dtype in (jnp.float32, jnp.bfloat16):
        phi = FEATURE_MAPS[name](jnp.asarray(RANDOM.standard_normal((7, 5)), dtype))
        assert phi.shape == (7, FEATURES.get(name, 5)) and phi.dtype == dtype
        assert name in ("identity", "taylor") or (phi >= 0).all()


@pytest.mark.parametrize("d", [1, 2, 5])
def test_product_of_taylor_features(d):
    q, k = RANDOM.standard_normal((2, 9, d))
    s = (q * k).sum(axis=-1) / d**0.5
    with jax.enable_x64(True):
        found = (taylor(jnp.asarray(q)) * taylor(jnp.asarray(k))).sum(axis=-1)
    assert_close(found, 1 + s + s * s / 2, TOLERANCES["forms"], "phi(q) . phi(k)")


def test_hedgehog_does_not_overflow():
    phi = hedgehog(jnp.array([[1e4, -1e4, 0.0]]))
    np.testing.assert_array_equal(phi, [[1, 0, 0, 0, 1, 0]])


def test_maps_of_one_number():
    np.testing.assert_array_equal(elu_plus_one(jnp.array([2.0, 0.0])), [3, 1])
    np.testing.assert_array_equal(dpfp(jnp.array([2.0, -3.0])), [6, 0, 0, 0])
    # r = [2, 3, 5, 7, 0, 0, 0, 0], times r moved on by one, by two, by three.
    expected = [[0, 6, 15, 35, 0, 0, 0, 0], [0, 0, 10, 21, 0, 0, 0, 0], [0, 0, 0, 14, 0, 0, 0, 0]]
    np.testing.assert_array_equal(dpfp(jnp.array([2.0, 3.0, 5.0, 7.0]), nu=3).reshape(3, 8), expected)


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def test_hedgehog_layer():
    layer = LinearAttention(16, num_heads=2, feature_map="hedgehog")
    start = layer.init(jax.random.key(0), X)["params"]
    np.testing.assert_array_equal(start["feature_map_q"]["kernel"], [np.eye(8)] * 2)
    variables, p = random_variables(layer, X)
    q, k, v = (heads(X @ p[f"{name}_proj/kernel"], 2) for name in "qkv")
    q, k = (np.einsum("bthd,hdf->bthf", x, p[f"feature_map_{name}/kernel"]) for name, x in (("q", q), ("k", k)))
    q, k = (np.concatenate([softmax(x), softmax(-x)], axis=-1) for x in (q, k))
    o = normalized_attention(np.einsum("bihf,bjhf->bhij", q, k), v)
    assert_close(layer.apply(variables, X)[0], merged(o) @ p["o_proj/kernel"], TOLERANCES["layer"], "y")


def test_based_layer():
    layer = Based(16, num_heads=4, feature_dim=3)
    variables, p = random_variables(layer, X)
    q, k, v = (heads(X @ p[f"{name}_proj/kernel"], 4) for name in "qkv")
    s = np.einsum("bihd,bjhd->bhij", q, k) / 3**0.5
    o = normalized_attention(1 + s + s * s / 2, v)
    assert_close(layer.apply(variables, X)[0], merged(o) @ p["o_proj/kernel"], TOLERANCES["layer"], "y")
