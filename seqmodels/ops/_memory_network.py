"""The network whose weights are a neural memory, and the loss that writes to it.

    X_1 = x        Z_l = X_l A_l + c_l        X_{l+1} = activation(Z_l)                                           (1)
    M(x) = [x +] [norm] Z_L                   norm(z) = scale * (z - mean(z)) / sqrt(var(z) + epsilon) + bias      (2)
    loss = loss_scale |M(k) - v|^2                                                                                (3)

with L linear layers; what is in brackets is optional. A and c are what the memory learns as it reads; scale and bias
of the norm stay as they are.

Functions here are of one head: x is [k] or [c, k]. How a linear layer acts on its input is the caller's matter, so that
one definition serves plain weights and weights that change from row to row and are never built.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmodels.notation import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "silu": jax.nn.silu,
}


class Linear(NamedTuple):
    """One linear layer of a memory: A [..., i, o] and c [..., o], which may be None."""

    A: Array
    c: Array | None = None


Weights = tuple[Linear, ...]


class Norm(NamedTuple):
    """Scale and bias of (2), [..., v] each."""

    scale: Array
    bias: Array


def matrix_size(widths: Sequence[int]) -> int:
    """Entries of the matrices of a network with these widths: keys, hidden layers, values."""
    return sum(i * o for i, o in pairwise(widths))


def linear(layer: Linear, x: Array) -> Array:
    """x A + c."""
    z = x @ layer.A
    return z if layer.c is None else z + layer.c


def network(
    x: Array, layers: Sequence[Callable[[Array], Array]], norm: Norm | None, options: Mapping[str, Any]
) -> Array:
    """M(x) of equations (1) and (2), from what each linear layer does to its input."""
    z = layers[0](x)
    for layer in layers[1:]:
        z = layer(ACTIVATIONS[options["activation"]](z))
    if norm is not None:
        z = z - jnp.mean(z, axis=-1, keepdims=True)
        variance = jnp.mean(z * z, axis=-1, keepdims=True)
        z = norm.scale * z * jax.lax.rsqrt(variance + options["epsilon"]) + norm.bias
    return x + z if options["residual"] else z


def read(weights: Weights, x: Array, norm: Norm | None, options: Mapping[str, Any]) -> Array:
    """M(x) with these weights."""
    layers = [lambda x, layer=layer: linear(layer, x) for layer in weights]
    return network(x, layers, norm, options)


def loss(out: Array, v: Array, options: Mapping[str, Any]) -> Array:
    """Equation (3), summed over whatever rows there are, from out = M(k)."""
    return options["loss_scale"] * jnp.sum((out - v) ** 2)
