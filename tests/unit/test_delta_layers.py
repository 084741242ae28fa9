"""The blocks around the delta rule against their papers in NumPy; names, sizes and first values of parameters.

The names are those of flash-linear-attention's layers; Sequential's `f_proj.0` is `f_proj_0` here, a kernel is a weight
transposed, a scale is a norm's weight.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

from seqmodels.errors import InputError
from seqmodels.layers import DeltaNet, GatedDeltaNet, KimiDeltaAttention
from tests.tolerances import TOLERANCES

WIDTH, LENGTH = 24, 11
LAYERS = {
    "delta_net": DeltaNet(WIDTH, num_heads=2),
    "delta_net, gate, no convolution": DeltaNet(WIDTH, num_heads=2, use_gate=True, conv_size=None),
    "gated_delta_net": GatedDeltaNet(WIDTH, num_heads=2),
    "gated_delta_net, grouped, no gate": GatedDeltaNet(
        WIDTH, num_heads=2, num_v_heads=4, use_gate=False, allow_neg_eigval=True
    ),
    "kimi_delta_attention": KimiDeltaAttention(WIDTH, num_heads=2),
    "kimi_delta_attention, bounded": KimiDeltaAttention(
        WIDTH, num_heads=2, head_dim=6, expand_v=1.5, num_v_heads=4, lower_bound=-5.0, gate_bias=True
    ),
}


def random_parameters(layer):
    """Of the right shapes, with norms, rates and biases that matter."""
    shapes = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 1, WIDTH)))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 2, shapes)


def block(layer, p, x):
    """One row x [t, d] through the papers' equations, in float64, one token after the other."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), p["params"])
    heads, value_heads, key_dim = layer.num_heads, layer.value_heads, layer.key_dim

    def silu(y):
        return y * expit(y)

    def linear(name, y):
        return y @ p[name]["kernel"] + p[name].get("bias", 0)

    def short(name):
        y = linear(f"{name}_proj", x)
        if layer.conv_size:
            kernel = p[f"{name}_conv1d"]["kernel"]
            padded = np.concatenate([np.zeros((len(kernel) - 1, y.shape[1])), y])
            y = np.stack([(kernel * padded[t : t + len(kernel)]).sum(axis=0) for t in range(len(x))])
        return silu(y)

    def unit(y):
        return y / np.sqrt((y**2).sum(axis=-1, keepdims=True) + 1e-6)

    q, k = (np.repeat(unit(short(name).reshape(LENGTH, heads, -1)), value_heads // heads, axis=1) for name in "qk")
    v = short("v").reshape(LENGTH, value_heads, -1)
    beta = expit(linear("b_proj", x)) * (2 if layer.allow_neg_eigval else 1)
    g = np.zeros((LENGTH, value_heads, 1))
    if "a_proj" in p:
        g = (-np.exp(p["A_log"]) * np.logaddexp(0, linear("a_proj", x) + p["dt_bias"]))[..., None]
    if "f_proj_0" in p:
        f = (linear("f_proj_1", linear("f_proj_0", x)) + p["dt_bias"]).reshape(LENGTH, value_heads, key_dim)
        rate = np.exp(p["A_log"])[:, None]
        g = -rate * np.logaddexp(0, f) if layer.lower_bound is None else layer.lower_bound * expit(rate * f)
    S, o = np.zeros((value_heads, key_dim, v.shape[-1])), np.zeros(v.shape)
    for t in range(LENGTH):
        S = np.exp(g[t])[..., None] * S
        wrong = v[t] - np.einsum("hk,hkv->hv", k[t], S)
        S = S + np.einsum("hk,hv->hkv", k[t], beta[t][:, None] * wrong)
        o[t] = np.einsum("hk,hkv->hv", q[t], S) / np.sqrt(key_dim)
    o = o / np.sqrt((o**2).mean(axis=-1, keepdims=True) + layer.norm_eps) * p["o_norm"]["scale"]
    if "g_proj" in p:
        o = o * silu(linear("g_proj", x)).reshape(o.shape)
    if "g_proj_0" in p:
        o = o * expit(linear("g_proj_1", linear("g_proj_0", x))).reshape(o.shape)
    return linear("o_proj", o.reshape(LENGTH, -1))


@pytest.mark.parametrize("name", LAYERS)
def test_the_block_is_the_paper_s(name):
    layer = LAYERS[name]
    parameters = random_parameters(layer)
    x = np.random.default_rng(1).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
    y, _ = jax.jit(layer.apply)(parameters, x)
    expected = np.stack([block(layer, parameters, row.astype(np.float64)) for row in x])
    assert np.abs(y - expected).max() <= TOLERANCES["layer"] * np.abs(expected).max()


def shapes(layer) -> dict[str, tuple[int, ...]]:
    tree = jax.eval_shape(layer.init, jax.random.key(0), jnp.zeros((1, 1, layer.d_model)))["params"]
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(tree)
    }


PROJECTIONS = {
    "q_proj.kernel": (2048, 1536),
    "k_proj.kernel": (2048, 1536),
    "v_proj.kernel": (2048, 3072),
    "g_proj.kernel": (2048, 3072),
    "o_proj.kernel": (3072, 2048),
    "b_proj.kernel": (2048, 6),
    "a_proj.kernel": (2048, 6),
    "q_conv1d.kernel": (4, 1536),
    "k_conv1d.kernel": (4, 1536),
    "v_conv1d.kernel": (4, 3072),
    "o_norm.scale": (512,),
    "A_log": (6,),
    "dt_bias": (6,),
}


def test_parameters_have_the_names_and_sizes_of_the_public_layers():
    assert shapes(GatedDeltaNet(2048)) == PROJECTIONS
    kimi = shapes(KimiDeltaAttention(2304, num_heads=32, head_dim=128))
    assert kimi["f_proj_0.kernel"] == kimi["g_proj_0.kernel"] == (2304, 128)
    assert kimi["f_proj_1.kernel"] == kimi["g_proj_1.kernel"] == (128, 4096)
    assert (kimi["A_log"], kimi["dt_bias"], kimi["b_proj.kernel"]) == ((32,), (4096,), (2304, 32))
    own = {"a_proj.kernel", "g_proj.kernel", "A_log", "dt_bias"}
    assert set(shapes(DeltaNet(2048))) == set(PROJECTIONS) - own


@pytest.mark.parametrize(
    ("layer", "low", "high"),
    [
        (GatedDeltaNet(8, num_heads=400, head_dim=1), 0.01, 16.0),
        (KimiDeltaAttention(8, num_heads=400, head_dim=1), 1.0, 16.0),
    ],
)
def test_rates_and_time_steps_start_in_their_ranges(layer, low, high):
    parameters = layer.init(jax.random.key(0), jnp.zeros((1, 1, 8)))["params"]
    rates, steps = np.exp(parameters["A_log"]), np.logaddexp(0, parameters["dt_bias"])
    slack = 1 + TOLERANCES["layer"]
    for found, start, end in ((rates, low, high), (steps, 1e-3, 1e-1)):
        assert start / slack <= found.min() and found.max() <= end * slack
        assert found.max() - found.min() > 0.9 * (end - start), "hardly any of the range is used"


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (DeltaNet(24, num_heads=5), "DeltaNet: d_model = 24 is not divisible by 5 heads"),
        (GatedDeltaNet(24, num_heads=5), "GatedDeltaNet: 3/4 d_model = 18 is not divisible by 5 heads"),
        (GatedDeltaNet(24, num_v_heads=8), "GatedDeltaNet: num_v_heads = 8 is not divisible by 6 heads"),
        (DeltaNet(24, expand_v=0.7), r"DeltaNet: a value head has head_dim \* expand_v = 4.2 channels; expected"),
        (KimiDeltaAttention(24, lower_bound=5.0), "KimiDeltaAttention: lower_bound is 5; expected a log decay below 0"),
    ],
)
def test_wrong_fields_are_named(layer, message):
    with pytest.raises(InputError, match=f"^{message}"):
        shapes(layer)
