"""RWKV-6 against the paper's equations, and what the operator and the layer refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.layers import RWKV6
from seqmodels.ops.wkv6 import wkv6
from tests.by_hand import decayed_memory, heads, merged, random_variables, shifted, silu
from tests.conformance.compare import assert_close
from tests.tolerances import TOLERANCES

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((2, 21, 16)).astype(np.float32)


def arguments() -> dict[str, np.ndarray]:
    q, k, w = RANDOM.standard_normal((3, 2, 21, 2, 4))
    v, u = RANDOM.standard_normal((2, 21, 2, 3)), RANDOM.standard_normal((2, 4))
    return {"q": q, "k": k, "v": v, "g": -np.exp(w), "u": u}


@pytest.mark.parametrize("form", ["recurrent", "chunked", "parallel"])
def test_operator(form):
    arrays = arguments()
    with jax.enable_x64(True):
        o, _ = wkv6(**arrays, form=form, chunk_size=8)
    q, k, v, g, u = arrays.values()
    assert_close(o, decayed_memory(q / 2, k, v, np.exp(g), u), TOLERANCES["forms"], "o")


def test_layer():
    layer = RWKV6(16, head_dim=8, proj_low_rank_dim=3, gate_low_rank_dim=5)
    variables, p = random_variables(layer, X)
    d = shifted(X) - X
    a = heads(np.tanh((X + d * p["mu"]) @ p["x_proj_0/kernel"]), 5)
    r, w, k, v, g = (X + d * (p["x_bias"][i] + a[:, :, i] @ p["x_proj_2"][i]) for i in range(5))
    decay = np.exp(-np.exp(np.tanh(w @ p["w_proj_0/kernel"]) @ p["w_proj_2/kernel"] + p["w_proj_2/bias"]))
    r, k, v = (heads(y @ p[f"{name}_proj/kernel"], 2) for name, y in (("r", r), ("k", k), ("v", v)))
    o = decayed_memory(r, k, v, heads(decay, 2), p["bonus"])
    o = (o - o.mean(axis=-1, keepdims=True)) / np.sqrt(o.var(axis=-1, keepdims=True) + 64e-5)
    o = (merged(o) * p["g_norm/scale"] + p["g_norm/bias"]) * silu(g @ p["g_proj/kernel"])
    assert_close(layer.apply(variables, X)[0], o @ p["o_proj/kernel"], TOLERANCES["layer"], "y")


def test_parameters_start_as_in_the_authors_code():
    d, layers = 8, 4
    for layer_index in range(layers):
        layer = RWKV6(d, layer_index=layer_index, n_layers=layers, head_dim=4)
        params = layer.init(jax.random.key(0), jnp.zeros((1, 1, d)))["params"]
        depth, channel = layer_index / (layers - 1), np.arange(d)
        mixing, steep = (1 - (channel / d) ** (power * (1 - layer_index / layers)) for power in (1, 0.5))
        expected = {
            "mu": mixing,
            "x_bias": [steep, mixing, mixing, mixing - 0.3 * depth, steep],
            "decay": -6 + 5 * (channel / (d - 1)) ** (0.7 + 1.3 * depth),
            "bonus": (depth * (1 - channel / (d - 1)) + 0.1 * ((channel + 1) % 3 - 1)).reshape(2, 4),
        }
        found = {**params, "decay": params["w_proj_2"]["bias"]}
        for name, value in expected.items():
            assert_close(found[name], np.array(value), TOLERANCES["layer"], f"layer {layer_index}, {name}")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": np.ones((2, 21, 8))}, r"wkv6: q has shape \(2, 21, 8\); expected \[batch"),
        ({"k": np.ones((2, 21, 2, 5))}, r"wkv6: k has shape \(2, 21, 2, 5\); expected \(2, 21, 2, 4\) as q has"),
        ({"g": np.ones((2, 21, 2))}, r"wkv6: g has shape \(2, 21, 2\); expected \(2, 21, 2, 4\) as q has"),
        ({"v": np.ones((2, 21, 4, 3))}, r"wkv6: v has 4 heads; expected 2 as q has"),
        ({"u": np.ones((4,))}, r"wkv6: u has shape \(4,\); expected \(2, 4\)"),
    ],
)
def test_wrong_arguments_are_named(changed, message):
    with pytest.raises(InputError, match=message):
        wkv6(**{**arguments(), **changed})


def test_wrong_fields_are_named():
    with pytest.raises(InputError, match="RWKV6: d_model = 16 does not make heads of 6 channels"):
        RWKV6(16, head_dim=6).init(jax.random.key(0), X)
