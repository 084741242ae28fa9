"""Experts against a loop over tokens in NumPy."""

import jax
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.layers import MoE
from seqmodels.models import LanguageModel
from seqmodels.models.accounting import flops_per_token
from tests.tolerances import TOLERANCES


def silu(x):
    return x / (1 + np.exp(-x))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def by_hand(p, x, top_k, renormalize):
    """Each token on its own, in float64."""
    y = np.zeros_like(x)
    for at in np.ndindex(x.shape[:2]):
        logits = x[at] @ p["router"]
        share = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        chosen = np.argsort(-share)[:top_k]
        total = share[chosen].sum() if renormalize else 1.0
        for e in chosen:
            hidden = silu(x[at] @ p["gate_proj"][e]) * (x[at] @ p["up_proj"][e])
            y[at] += share[e] / total * (hidden @ p["down_proj"][e])
        if "shared_expert" in p:
            gate, up, down = (p["shared_expert"][f"{name}_proj"]["kernel"] for name in ("gate", "up", "down"))
            shared = (silu(x[at] @ gate) * (x[at] @ up)) @ down
            y[at] += sigmoid(x[at] @ p["shared_expert_gate"]["kernel"]) * shared
    return y


@pytest.mark.parametrize(
    "fields",
    [{"top_k": 2}, {"top_k": 1}, {"top_k": 5}, {"top_k": 3, "renormalize": False, "shared_dim": 7}],
)
def test_every_token_goes_through_its_experts(fields):
    layer = MoE(d_model=8, num_experts=5, hidden_dim=6, **fields)
    x = jax.random.normal(jax.random.key(0), (2, 7, 8))
    variables = layer.init(jax.random.key(1), x)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables["params"])
    expected = by_hand(wide, np.asarray(x, np.float64), fields["top_k"], fields.get("renormalize", True))
    error = np.abs(np.asarray(jax.jit(layer.apply)(variables, x)) - expected).max()
    assert error <= TOLERANCES["layer"] * np.abs(expected).max()


def test_an_expert_that_no_token_chose_has_no_gradient():
    layer = MoE(d_model=4, num_experts=6, top_k=1, hidden_dim=3)
    x = jax.random.normal(jax.random.key(0), (1, 2, 4))
    variables = layer.init(jax.random.key(1), x)
    gradient = jax.grad(lambda v: layer.apply(v, x).sum())(variables)["params"]["down_proj"]
    assert 1 <= (np.abs(gradient).sum(axis=(1, 2)) > 0).sum() <= 2


def test_more_experts_than_there_are():
    with pytest.raises(InputError, match="top_k = 3; expected 1 to num_experts = 2"):
        MoE(d_model=4, num_experts=2, top_k=3).init(jax.random.key(0), np.zeros((1, 1, 4)))


def test_the_cost_is_that_of_the_experts_a_token_goes_through():
    def cost(top_k):
        def mlp(**fields):
            return MoE(num_experts=5, top_k=top_k, hidden_dim=6, **fields)

        return flops_per_token(LanguageModel(vocab_size=11, d_model=16, n_layers=2, mlp=mlp), seq_len=4)

    # The matrices of a SwiGLU, and the sum over the experts, each a multiplication and an addition; in two layers.
    assert cost(3) - cost(2) == 2 * 2 * (3 * 16 * 6 + 16)
