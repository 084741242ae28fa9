"""Layers in an NNX model, through Flax's own bridge: the same outputs and state, nothing mutable, and it learns."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from seqmodels import registry
from seqmodels.layers import Mixer
from tests.conformance.compare import assert_equal
from tests.mixers import every_mixer

X = jax.random.normal(jax.random.key(0), (2, 10, 16))


def bridged(layer: Mixer) -> nnx.bridge.ToNNX:
    return nnx.jit(lambda: nnx.bridge.lazy_init(nnx.bridge.ToNNX(layer, rngs=nnx.Rngs(0)), X))()


@pytest.mark.parametrize("mixer", every_mixer("nnx"))
def test_same_outputs_and_state_as_linen(mixer):
    layer = registry.mixer(mixer)(d_model=16)
    model = bridged(layer)
    assert not jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))), (
        "a mutable collection"
    )
    variables = {"params": nnx.to_pure_dict(nnx.state(model, nnx.Param))}
    start = layer.initial_state(2, 10)
    apply, through = jax.jit(layer.apply), nnx.jit(lambda model, x, state: model(x, state))
    for span, state in ((X[:, :9], start), (X[:, 9:], apply(variables, X[:, :9], start)[1])):
        assert_equal(through(model, span, state), apply(variables, span, state), "through the bridge: ")


@pytest.mark.parametrize("mixer", every_mixer("nnx"))
def test_it_learns(mixer):
    model = bridged(registry.mixer(mixer)(d_model=16))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    target = jnp.roll(X, 1, axis=1)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(X)[0] - target) ** 2)

        value, gradient = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradient)
        return value

    losses = [float(step(model, optimizer)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
