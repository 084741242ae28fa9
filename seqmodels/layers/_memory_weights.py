"""What the layers around `neural_memory` share: the learned weights that a memory starts each document from."""

from collections.abc import Sequence
from itertools import pairwise

import flax.linen as nn
import jax.numpy as jnp

from seqmodels.layers._mixer import FLOAT32
from seqmodels.ops._memory_network import Linear, Weights, matrix_size
from seqmodels.ops.neural_memory import NeuralMemoryState, fresh_state


def memory_weights(
    layer: nn.Module, heads: int, widths: Sequence[int], kernel_init: nn.initializers.Initializer, *, use_bias: bool
) -> Weights:
    """Parameters memory_kernel_1 [h, i, o], memory_bias_1 [h, o], memory_kernel_2, ... of `layer`.

    widths: channels of the keys, of each hidden layer, and of the values.
    """
    weights = []
    for place, (i, o) in enumerate(pairwise(widths), 1):
        A = layer.param(f"memory_kernel_{place}", kernel_init, (heads, i, o), layer.param_dtype)
        c = None
        if use_bias:
            c = layer.param(f"memory_bias_{place}", nn.initializers.zeros, (heads, o), layer.param_dtype)
        weights.append(Linear(A, c))
    return tuple(weights)


def empty_weights(heads: int, widths: Sequence[int], *, use_bias: bool) -> Weights:
    """Weights of the shape of theirs, all zero."""
    return tuple(
        Linear(jnp.zeros((heads, i, o)), jnp.zeros((heads, o)) if use_bias else None) for i, o in pairwise(widths)
    )


def empty_state(
    batch_size: int, heads: int, widths: Sequence[int], *, use_bias: bool, has_momentum: bool
) -> NeuralMemoryState:
    """A state of the shape of theirs, all zero: the layer puts its learned weights in at the first token."""
    return fresh_state(batch_size, empty_weights(heads, widths, use_bias=use_bias), None, has_momentum=has_momentum)


def weights_bytes(heads: int, widths: Sequence[int], *, use_bias: bool) -> int:
    """Bytes of one row's weights, in float32."""
    return FLOAT32 * heads * (matrix_size(widths) + (sum(widths[1:]) if use_bias else 0))


def memory_bytes(heads: int, widths: Sequence[int], *, use_bias: bool, has_momentum: bool) -> int:
    """Bytes of one row's state: the weights, those of the mini-batch's start, the momentum, the place in it."""
    return (2 + has_momentum) * weights_bytes(heads, widths, use_bias=use_bias) + 4
