"""HGRN2 against the paper's equations, and its gates where they are nearly open or shut."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.layers import HGRN2
from seqmodels.layers.hgrn2 import forget_gate
from tests.by_hand import decayed_memory, heads, merged, random_variables, rmsnorm, sigmoid, silu
from tests.conformance.compare import assert_close
from tests.tolerances import TOLERANCES

X = np.random.default_rng(0).standard_normal((2, 21, 16)).astype(np.float32)


@pytest.mark.parametrize("layer_index", [0, 2])
def test_layer(layer_index):
    layer = HGRN2(16, layer_index=layer_index, n_layers=3, expand_ratio=8)
    variables, p = random_variables(layer, X)
    odds = layer_index / (3 - layer_index) * np.exp(p["lower_bound"])
    bound = odds / (1 + odds)
    f = bound + (1 - bound) * sigmoid(X @ p["f_proj/kernel"])
    q, f, v = (heads(y, 2) for y in (silu(X @ p["q_proj/kernel"]), f, X @ p["i_proj/kernel"]))
    o = decayed_memory(q / 8**0.5, 1 - f, v, f)
    o = rmsnorm(merged(o), 1e-5) * p["g_norm/scale"]
    assert_close(layer.apply(variables, X)[0], o @ p["o_proj/kernel"], TOLERANCES["layer"], "y")


@pytest.mark.parametrize("bound", [0.0, 1e-3, 0.5, 0.999])
def test_gates_lose_no_digits(bound):
    logits = np.array([-80.0, -20.0, -1.0, 0.0, 1.0, 12.0, 80.0])
    bound_logit = np.log(bound) - np.log1p(-bound) if bound else -np.inf
    g, k = forget_gate(jnp.float32(logits), jnp.float32(bound_logit))
    with jax.enable_x64(True):
        exact = forget_gate(jnp.float64(logits), jnp.float64(np.float32(bound_logit)))
    # Relative, element by element: float32 keeps its digits.
    np.testing.assert_allclose(g, exact[0], TOLERANCES["jit"])
    np.testing.assert_allclose(k, exact[1], TOLERANCES["jit"])
    def log_f(logits, bound_logit):
        return forget_gate(logits, bound_logit)[0].sum()

    gradient = jax.grad(log_f, argnums=(0, 1))(jnp.float32(logits), jnp.float32(bound_logit))
    assert all(np.isfinite(y).all() for y in gradient)
    # And they are f, in the range where NumPy can say so.
    mild = np.abs(logits) < 15
    f = bound + (1 - bound) * sigmoid(logits[mild])
    np.testing.assert_allclose(np.exp(exact[0])[mild], f, TOLERANCES["jit"])
    np.testing.assert_allclose(exact[1][mild], 1 - f, TOLERANCES["layer"])


def test_wrong_fields_are_named():
    with pytest.raises(InputError, match="HGRN2: d_model = 16 does not make heads of 6 channels"):
        HGRN2(16, expand_ratio=6).init(jax.random.key(0), X)
