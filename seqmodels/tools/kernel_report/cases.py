"""The operators whose kernels are reported: their arguments at a given size, and what they cannot do without.

A program's arguments are laid out as projections give them, [batch, time, heads * channels], and so is its result: a
model reshapes between the two, which then costs nothing, while arguments of four axes would be charged a copy.

`operations` of a case are those of matrix products for one token of one head, in chunks of C positions, with K and V
channels of keys and values. Work on elements, cumulative sums and triangular inverses are not in it.
"""

import contextlib
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tpu._generations import trying
from seqmodels.errors import InputError
from seqmodels.notation import Array
from seqmodels.tools.kernel_report.programs import DTYPES, Built, build

KERNEL, GPU_KERNEL, XLA = "pallas_tpu", "pallas_gpu", "xla"
BACKENDS = (KERNEL, XLA)
REPORTED = ("forward", "backward")
DIRECTIONS = (*REPORTED, "both")


class Size(NamedTuple):
    """Of a program's arguments. batch, heads: so that batch * heads * length are the tokens that were asked for."""

    batch: int
    length: int
    heads: int
    channels: int

    @property
    def token_heads(self) -> int:
        return self.batch * self.length * self.heads


def size(tokens: int, length: int, heads: int, channels: int) -> Size:
    """tokens: over all heads. A long sequence has fewer heads than were asked for, a short one is in a batch."""
    if tokens % length:
        raise InputError(f"--lengths has {length}, which does not divide the {tokens} of --tokens")
    heads = min(heads, tokens // length)
    if tokens % (length * heads):
        raise InputError(f"--tokens {tokens} are no whole number of sequences of {length} with {heads} heads")
    return Size(tokens // (length * heads), length, heads, channels)


class Case(NamedTuple):
    """An operator with arguments of one kind.

    operator     "module:NAME" of its `SeqOp`
    arguments    (size) -> the shapes of its array arguments by name, as the operator takes them
    call         (operator's function, arrays by name, backend) -> outputs
    operations   direction -> (channels) -> of one token of one head
    """

    operator: str
    arguments: Callable[[Size], dict[str, jax.ShapeDtypeStruct]]
    call: Callable[[Callable[..., Any], dict[str, Array], str], Array]
    operations: dict[str, Callable[[int], float]]


class Request(NamedTuple):
    """One program of a case, for a worker.

    dtype: of what projections give; gates and weights are float32. sizes: positions of a kernel's chunk and KiB of an
    operand that a step reads, to try in place of what is chosen for the generation.
    """

    case: str
    direction: str
    backend: str
    size: Size
    dtype: str = "bf16"
    sizes: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """The case, with the sizes that are tried."""
        tried = "" if self.sizes is None else f", chunks of {self.sizes[0]} in steps of {self.sizes[1]:,} KiB"
        return self.case + tried

    def trying(self) -> contextlib.AbstractContextManager:
        """Within, `build` and what traces its program take these sizes."""
        if self.sizes is None:
            return contextlib.nullcontext()
        return trying(self.sizes[0], self.sizes[1] << 10)

    def build(self) -> Built:
        case = CASES[self.case]
        module, _, name = case.operator.partition(":")
        op = getattr(importlib.import_module(module), name)
        if self.backend != XLA and self.backend not in op.kernels:
            raise InputError(f"{op.name} has no kernel for {'TPUs' if self.backend == KERNEL else 'GPUs'}")
        names = {
            name: jax.ShapeDtypeStruct(x.shape, DTYPES[self.dtype]) if x.dtype == jnp.bfloat16 else x
            for name, x in case.arguments(self.size).items()
        }

        def run(*arrays: Array) -> Array:
            inside = {name: x.reshape(names[name].shape) for name, x in zip(names, arrays)}
            return _projected(case.call(op.call, inside, self.backend))

        shapes = [jax.eval_shape(_projected, x) for x in names.values()]
        parts = ("forward", "backward") if self.direction == "both" else (self.direction,)
        needed = sum(case.operations[part](self.size.channels) for part in parts) * self.size.token_heads
        return build(run, shapes, self.direction)._replace(operations=needed)


def _projected(x: Array) -> Array:
    """As a projection gives it: heads and channels as one axis. Gates and weights have no such axis."""
    return x.reshape(*x.shape[:2], -1) if x.ndim == 4 else x


def _heads(names: str) -> Callable[[Size], dict[str, jax.ShapeDtypeStruct]]:
    return lambda s: {name: _shape(s, s.channels, jnp.bfloat16) for name in names}


def _shape(s: Size, channels: int | None, dtype: Any) -> jax.ShapeDtypeStruct:
    axes = (s.batch, s.length, s.heads) if channels is None else (s.batch, s.length, s.heads, channels)
    return jax.ShapeDtypeStruct(axes, dtype)


def _qkv(decay: str, *, beta: bool = False) -> Callable[[Size], dict[str, jax.ShapeDtypeStruct]]:
    """decay: "no", "scalar" or "channel"."""

    def shapes(s: Size) -> dict[str, jax.ShapeDtypeStruct]:
        found = _heads("qkv")(s)
        if beta:
            found["beta"] = _shape(s, None, jnp.float32)
        if decay != "no":
            found["g"] = _shape(s, s.channels if decay == "channel" else None, jnp.float32)
        return found

    return shapes


def _plain_call(function: Callable[..., Any], arrays: dict[str, Array], backend: str) -> Array:
    return function(**arrays, backend=backend)[0]


# Linear attention, as which ssd runs too: q k', A v, q S and k' v. Backward, in two passes over the sequence: q k' and
# k' v again, and the gradients, of which that of A is computed in both passes.
_C_LINEAR = 256
_LINEAR = {
    "forward": lambda d: 2 * _C_LINEAR * (d + d) + 4 * d * d,
    "backward": lambda d: 2 * _C_LINEAR * (3 * d + 3 * d) + 10 * d * d,
}
# The delta rule: k k', q k', and the inverse's product with keys and values, A u, w S, q S and k' u. Backward: those
# that do not give the output again, and two products for each.
_C_DELTA = 64
_DELTA = {
    "forward": lambda d: 2 * _C_DELTA * 5 * d + 6 * d * d,
    "backward": lambda d: 2 * _C_DELTA * 4 * d + 4 * d * d + 2 * (2 * _C_DELTA * 5 * d + 6 * d * d),
}
# Aaren: scores, and sums (5) of its operator token by token; its bound is its bytes.
_AAREN = {"forward": lambda d: 6 * d, "backward": lambda d: 18 * d}
# A memory of one matrix, mini-batches of C: k R, q k', its product with the errors, q W, and what is written to W and
# to the momentum. Backward as for the delta rule.
_C_MEMORY = 64
_MEMORY = {
    "forward": lambda d: 2 * _C_MEMORY * 2 * d + 8 * d * d,
    "backward": lambda d: 2 * _C_MEMORY * d + 6 * d * d + 2 * (2 * _C_MEMORY * 2 * d + 8 * d * d),
}
# A short convolution: a product and a sum for each tap. Backward three times that.
_WIDTH = 4
_CONV = {"forward": lambda d: 2 * _WIDTH * d, "backward": lambda d: 6 * _WIDTH * d}


def _aaren_arguments(s: Size) -> dict[str, jax.ShapeDtypeStruct]:
    return {**_heads("kv")(s), "query": jax.ShapeDtypeStruct((s.heads, s.channels), jnp.float32)}


def _conv_arguments(s: Size) -> dict[str, jax.ShapeDtypeStruct]:
    width, of = s.heads * s.channels, jax.ShapeDtypeStruct
    x = of((s.batch, s.length, width), jnp.bfloat16)
    return {"x": x, "kernel": of((_WIDTH, width), jnp.float32), "bias": of((width,), jnp.float32)}


def _conv_call(function: Callable[..., Any], arrays: dict[str, Array], backend: str) -> Array:
    return function(**arrays, activation="silu", backend=backend)[0]


def _memory_arguments(s: Size) -> dict[str, jax.ShapeDtypeStruct]:
    gates = {name: _shape(s, None, jnp.float32) for name in ("theta", "alpha", "eta")}
    weights = jax.ShapeDtypeStruct((s.heads, s.channels, s.channels), jnp.float32)
    return {**_heads("qkv")(s), **gates, "weights": weights}


def _memory_call(function: Callable[..., Any], arrays: dict[str, Array], backend: str) -> Array:
    from seqmodels.ops._memory_network import Linear

    weights = (Linear(arrays.pop("weights")),)
    return function(**arrays, weights=weights, mini_batch=_C_MEMORY, backend=backend)[0]


def _state_space_arguments(s: Size) -> dict[str, jax.ShapeDtypeStruct]:
    group = jax.ShapeDtypeStruct((s.batch, s.length, 1, s.channels), jnp.bfloat16)
    of_heads = jax.ShapeDtypeStruct((s.heads,), jnp.float32)
    x, dt = _shape(s, s.channels, jnp.bfloat16), _shape(s, None, jnp.float32)
    return {"x": x, "dt": dt, "A": of_heads, "B": group, "C": group, "D": of_heads}


_LINEAR_OP = "seqmodels.ops.linear_attention:LINEAR_ATTENTION"
_STATE_SPACE_OP = "seqmodels.ops.ssd:SSD"
_DELTA_OP = "seqmodels.ops.delta_rule:DELTA_RULE"
_AAREN_OP = "seqmodels.ops.aaren:AAREN"
_CONV_OP = "seqmodels.ops.short_conv:SHORT_CONV"
_MEMORY_OP = "seqmodels.ops.neural_memory:NEURAL_MEMORY"

CASES = {
    "linear_attention, no decay": Case(_LINEAR_OP, _qkv("no"), _plain_call, _LINEAR),
    "linear_attention, scalar decay": Case(_LINEAR_OP, _qkv("scalar"), _plain_call, _LINEAR),
    "linear_attention, decay per channel": Case(_LINEAR_OP, _qkv("channel"), _plain_call, _LINEAR),
    "ssd, one group": Case(_STATE_SPACE_OP, _state_space_arguments, _plain_call, _LINEAR),
    "delta_rule, no decay": Case(_DELTA_OP, _qkv("no", beta=True), _plain_call, _DELTA),
    "delta_rule, scalar decay": Case(_DELTA_OP, _qkv("scalar", beta=True), _plain_call, _DELTA),
    "delta_rule, decay per channel": Case(_DELTA_OP, _qkv("channel", beta=True), _plain_call, _DELTA),
    "aaren": Case(_AAREN_OP, _aaren_arguments, _plain_call, _AAREN),
    "short_conv, silu": Case(_CONV_OP, _conv_arguments, _conv_call, _CONV),
    "neural_memory, a matrix": Case(_MEMORY_OP, _memory_arguments, _memory_call, _MEMORY),
}
