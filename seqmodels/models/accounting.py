"""What models cost: parameters and floating-point operations, counted from the program itself, and what their mixers
declare of state and operations."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.extend import core
from jax.interpreters import partial_eval

from seqmodels.layers import Mixer
from seqmodels.models.block import Block, ParallelMixers, Stack, mixer_names
from seqmodels.models.readouts import input_shape


def parameter_count(params: Any) -> int:
    """Number of scalars in a tree of arrays or of shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def tree_bytes(tree: Any) -> int:
    """Bytes of a tree of arrays or of shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def model_costs(model: nn.Module, seq_len: int) -> dict[str, Any]:
    """What a model costs at that sequence length, as a run keeps it in costs.json.

    parameters        scalars
    seq_len           as given
    flops_per_token   of a forward pass of the whole model, see `flops_per_token`
    mixers            one entry for each mixer of each layer: `layer`, from 0; `mixer`, its name; `state_bytes` of one
                      sequence after seq_len tokens; `state_grows`, whether the bytes depend on their number;
                      `training_flops_per_token`, forward in the form that trains, and `decoding_flops_per_token`, of
                      the step that reads the last of them, both as declared, see `Mixer.flops_per_token`
    """
    variables = jax.eval_shape(model.init, jax.random.key(0), input_shape(model, 1, seq_len))
    return {
        "parameters": parameter_count(variables["params"]),
        "seq_len": seq_len,
        "flops_per_token": flops_per_token(model, seq_len),
        "mixers": [
            {
                "layer": layer,
                "mixer": name,
                "state_bytes": mixer.state_bytes(seq_len),
                "state_grows": mixer.state_bytes(2 * seq_len) != mixer.state_bytes(seq_len),
                "training_flops_per_token": float(mixer.flops_per_token(seq_len)),
                "decoding_flops_per_token": float(mixer.flops_per_token(seq_len, decoding=True)),
            }
            for layer, name, mixer in mixers_of(model)
        ],
    }


def mixers_of(model: nn.Module) -> Iterator[tuple[int, str, Mixer]]:
    """The place of its layer, its name and the layer itself, for each mixer of a model, or of a model's `body`. A model
    that is not made of a `Stack` has none."""
    body = getattr(model, "body", model)
    if not hasattr(type(body), "stack_fields"):
        return
    stack = Stack(**body.stack_fields(), parent=None)
    blocks = stack.blocks()
    for layer in range(stack.n_layers):
        block = Block(**blocks[layer % len(blocks)], parent=None)
        mixer = block.make_mixer(layer, parent=None)
        if isinstance(mixer, ParallelMixers):
            yield from ((layer, name, beside) for name, beside in mixer.mixers.items())
        else:
            (name,) = mixer_names([block.mixer])
            yield layer, name, mixer


def flops_per_token(model: nn.Module, seq_len: int) -> float:
    """Floating-point operations of one forward pass per token, at that sequence length. A training step costs three
    times as much.

    Those that `flops` counts, and where mixers have loops that turn as often as is known at run time alone, what these
    declare in place of what was counted of them.
    """
    tokens = input_shape(model, 1, seq_len)
    variables = jax.eval_shape(model.init, jax.random.key(0), tokens)
    program = _needed(lambda variables, tokens: model.apply(variables, tokens)[0], variables, tokens)
    total = _count(program) / seq_len
    if _has_open_loop(program):
        total += sum(_missed(mixer, seq_len) for _, _, mixer in mixers_of(model))
    return total


def _missed(mixer: Mixer, seq_len: int) -> float:
    """FLOPs per token of a mixer that it declares and `flops` does not see."""
    x = jax.ShapeDtypeStruct((1, seq_len, mixer.d_model), mixer.dtype)
    variables = jax.eval_shape(mixer.init, jax.random.key(0), x)
    program = _needed(mixer.apply, variables, x)
    if not _has_open_loop(program):
        return 0.0
    return mixer.flops_per_token(seq_len) - _count(program) / seq_len


def flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Floating-point operations of a call with arguments of these shapes.

    Counts matrix products and convolutions (a multiply and an add each) of the program as traced, loops included, but
    for those that turn as often as is known at run time alone: they count as one turn. Element-wise work is left out,
    as is usual for utilisation figures, and so is what no result depends on, which XLA removes.
    """
    return _count(_needed(function, *arguments))


def _needed(function: Callable[..., Any], *arguments: Any) -> core.Jaxpr:
    """The program, without what no result depends on."""
    program = jax.make_jaxpr(function)(*arguments).jaxpr
    needed, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    return needed


def _has_open_loop(program: core.Jaxpr) -> bool:
    """Whether products are in a loop whose number of turns is not in the program."""
    return any(
        (equation.primitive.name == "while" and _count_equation(equation) > 0)
        or any(_has_open_loop(body) for body in _bodies(equation.params))
        for equation in program.eqns
    )


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
