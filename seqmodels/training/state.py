"""Everything that a training step reads and writes, and that a checkpoint has to hold."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from seqmodels.models import input_shape
from seqmodels.parallel.mesh import replicated
from seqmodels.parallel.partition import PartitionRules, partition, partition_like


@flax.struct.dataclass
class TrainState:
    """A pytree; every leaf is a `jax.Array` on the mesh.

    step: int32 scalar, the number of updates done.
    params: float32 parameters of the model.
    opt_state: the optimizer's state.
    key: typed random key; step n uses `fold_in(key, n)`, so the key itself never changes.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState
    key: jax.Array


def parameter_shapes(model: nn.Module, seq_len: int) -> Any:
    """The model's parameters as `jax.ShapeDtypeStruct`s; nothing is computed or allocated."""
    return jax.eval_shape(lambda key: _init_parameters(model, key, seq_len), jax.random.key(0))


def create_state(
    model: nn.Module,
    transform: optax.GradientTransformation,
    *,
    seq_len: int,
    seed: int,
    mesh: Mesh,
    rules: PartitionRules = (),
    params: Any = None,
) -> TrainState:
    """A fresh state, made on the devices and already laid out on the mesh by `rules`; `params` instead of random
    ones."""
    shapes = state_shapes(model, transform, seq_len=seq_len, mesh=mesh, rules=rules)
    make = jax.jit(_state_maker(model, transform, seq_len), out_shardings=shardings_of(shapes))
    return make(jax.random.key(seed), params)


def state_shapes(
    model: nn.Module,
    transform: optax.GradientTransformation,
    *,
    seq_len: int,
    mesh: Mesh,
    rules: PartitionRules = (),
) -> TrainState:
    """What `create_state` would return, as `jax.ShapeDtypeStruct`s with shardings: the target of a
    restore."""
    shapes = jax.eval_shape(_state_maker(model, transform, seq_len), jax.random.key(0))
    of_params = partition(shapes.params, mesh, rules)
    everywhere = replicated(mesh)
    shardings = TrainState(
        everywhere, of_params, partition_like(shapes.opt_state, shapes.params, of_params, mesh), everywhere
    )
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, shardings)


def shardings_of(state: TrainState) -> TrainState:
    """Where the arrays of a state, or of its shapes, lie."""
    return jax.tree.map(lambda x: x.sharding, state)


def _state_maker(model, transform, seq_len):
    def make(key, params=None):
        init_key, step_key = jax.random.split(key)
        if params is None:
            params = _init_parameters(model, init_key, seq_len)
        return TrainState(jnp.zeros((), jnp.int32), params, transform.init(params), step_key)

    return make


def _init_parameters(model, key, seq_len):
    tokens = input_shape(model, 1, seq_len)
    return nn.meta.unbox(model.init(key, jnp.zeros(tokens.shape, tokens.dtype)))["params"]
