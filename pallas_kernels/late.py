"""Kernels that are traced where a program is lowered for their platform, and not before.

`jax.lax.platform_dependent` traces its branch for every platform. A kernel has thousands of operations; a program that
runs on a CPU should not spend most of its start on tracing two that it never runs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr, Primitive
from jax.interpreters import batching, mlir

kernel_p = Primitive("kernel")
kernel_p.multiple_results = True


def late(function: Callable[..., Sequence[jax.Array]], outputs: Sequence[jax.ShapeDtypeStruct]) -> Callable[..., list]:
    """`function`, of arrays to arrays of these shapes. It has no derivatives: give it those of a custom_vjp."""

    def call(*arrays: jax.Array) -> list[jax.Array]:
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)
        return kernel_p.bind(*arrays, kernel=Kernel(function, shapes, tuple(outputs)))

    return call


class Kernel:
    """What an equation of a late kernel holds.

    jaxpr: the kernel's program, traced when it is asked for.
    """

    def __init__(self, function: Callable, inputs: tuple, outputs: tuple[jax.ShapeDtypeStruct, ...]) -> None:
        self.function, self.inputs, self.outputs = function, inputs, outputs

    @functools.cached_property
    def jaxpr(self) -> Jaxpr:
        return jax.make_jaxpr(self.function)(*self.inputs).jaxpr


@kernel_p.def_abstract_eval
def _outputs(*arrays: Any, kernel: Kernel) -> list[jax.core.ShapedArray]:
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in kernel.outputs]


@kernel_p.def_impl
def _run(*arrays: jax.Array, kernel: Kernel) -> Sequence[jax.Array]:
    return jax.jit(kernel.function)(*arrays)


def _traced(*arrays: jax.Array, kernel: Kernel) -> Sequence[jax.Array]:
    return kernel.function(*arrays)


def _batched(arrays: Sequence[jax.Array], axes: Sequence[Any], *, kernel: Kernel) -> tuple[Sequence[jax.Array], list]:
    return jax.vmap(kernel.function, in_axes=tuple(axes))(*arrays), [0] * len(kernel.outputs)


mlir.register_lowering(kernel_p, mlir.lower_fun(_traced, multiple_results=True))
batching.primitive_batchers[kernel_p] = _batched
