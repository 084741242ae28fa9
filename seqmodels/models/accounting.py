"""Parameters and floating-point operations, counted from the program itself."""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from seqmodels.models.language_model import LanguageModel
from seqmodels.models.readouts import input_shape


def parameter_count(params: Any) -> int:
    """Number of scalars in a tree of arrays or of shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or of shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def flops_per_token(model: LanguageModel, seq_len: int) -> float:
    """Floating-point operations of one forward pass per token, at that sequence length; see `flops`. A training step
    costs three times as much."""
    tokens = input_shape(model, 1, seq_len)
    params = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return flops(lambda params, tokens: model.apply(params, tokens)[0], params, tokens) / seq_len


def flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of a call with arguments of these shapes.

    Counts matrix products and convolutions (a multiply and an add each) of the program as traced, loops included;
    element-wise work is left out, as is usual for utilisation figures.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> float:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn) -> float:
    name, params = equation.primitive.name, equation.params
    if name in ("dot_general", "ragged_dot_general"):
        if name == "dot_general":
            numbers = params["dimension_numbers"]
        else:  # each row of the left side meets one matrix of the right
            numbers = params["ragged_dot_dimension_numbers"].dot_dimension_numbers
        (contracted, _), _ = numbers
        left = equation.invars[0].aval.shape
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_channels = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / out_channels
    inner = [_count(body) for body in _bodies(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "cond":
        return max(inner, default=0.0)
    return sum(inner)


def _bodies(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The programs that an equation holds: loop bodies, branches, called functions."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                found.append(item.jaxpr)
            elif isinstance(item, core.Jaxpr):
                found.append(item)
    return found
