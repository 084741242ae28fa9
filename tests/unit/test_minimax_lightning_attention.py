"""MiniMax-01's lightning attention against its equations."""

import numpy as np
import pytest

from seqmodels.layers import MiniMaxLightningAttention
from seqmodels.layers.minimax_lightning_attention import minimax_decay
from tests.by_hand import decayed_memory, heads, merged, random_variables, rmsnorm, sigmoid, silu
from tests.conformance.compare import assert_close
from tests.tolerances import TOLERANCES

X = np.random.default_rng(0).standard_normal((2, 21, 16)).astype(np.float32)


@pytest.mark.parametrize("layer_index", [0, 2])
def test_layer(layer_index):
    """Three heads, which is no power of two."""
    layer = MiniMaxLightningAttention(16, layer_index=layer_index, n_layers=4, num_heads=3, head_dim=4)
    variables, p = random_variables(layer, X)
    of_heads = heads(silu(X @ p["qkv_proj/kernel"]), 3)
    q, k, v = of_heads[..., :4], of_heads[..., 4:8], of_heads[..., 8:]
    slopes = 2.0 ** (-8 * np.arange(1, 4) / 3) * (1 - layer_index / (3 + 1e-5) + 1e-5)
    o = decayed_memory(q, k, v, np.broadcast_to(np.exp(-slopes)[:, None], (*q.shape[:3], 1)))
    o = rmsnorm(merged(o), 1e-6) * p["norm/scale"]
    y = (sigmoid(X @ p["output_gate/kernel"]) * o) @ p["out_proj/kernel"]
    assert_close(layer.apply(variables, X)[0], y, TOLERANCES["layer"], "y")


def test_the_last_layer_hardly_forgets():
    first, last = minimax_decay(8, 0, 80), minimax_decay(8, 79, 80)
    np.testing.assert_allclose(first, -(2.0 ** -np.arange(1, 9)) * (1 + 1e-5), TOLERANCES["jit"])
    assert (last < 0).all() and (last > -1e-5).all()
