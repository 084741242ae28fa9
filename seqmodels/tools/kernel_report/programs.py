"""Programs to compile: any function that is named on the command line, forward or backward."""

import ast
import contextlib
import functools
import importlib
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from seqmodels.errors import InputError, nearest

DTYPES = {
    "bf16": jnp.bfloat16,
    "f16": jnp.float16,
    "f32": jnp.float32,
    "s8": jnp.int8,
    "s32": jnp.int32,
    "u8": jnp.uint8,
    "u32": jnp.uint32,
    "pred": jnp.bool_,
}
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


class Built(NamedTuple):
    """A program: a function, and the shapes that it is compiled for.

    operations: of matrix products that the algorithm needs; None to take those of the traced program.
    bytes: of arguments and results that the algorithm needs; None to take those of the program.
    """

    function: Callable[..., Any]
    arguments: Sequence[jax.ShapeDtypeStruct]
    operations: float | None = None
    bytes: int | None = None


class FunctionRequest(NamedTuple):
    """A function by its place, for a worker. keywords: its keyword arguments, as Python literals."""

    function: str
    arguments: str
    keywords: dict[str, str]
    direction: str = "forward"

    def trying(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()

    def build(self) -> Built:
        function, shapes = find_function(self.function), array_shapes(self.arguments)
        if self.keywords:
            literals = {name: _literal(name, text) for name, text in self.keywords.items()}
            function = functools.partial(function, **literals)
        return build(function, shapes, self.direction)


def _literal(name: str, text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError) as error:
        raise InputError(f"--set {name}={text}: expected a Python literal, as 64, 1.5, None or 'text'") from error


def array_shapes(text: str) -> list[jax.ShapeDtypeStruct]:
    """Of 'bf16[1,8192,2048] f32[16]'."""
    found = []
    for word in text.split():
        array = _ARRAY.fullmatch(word)
        if array is None:
            raise InputError(f"--arguments has {word!r}; expected a type and sizes, as bf16[1,8192,2048]")
        if array[1] not in DTYPES:
            raise InputError(f"--arguments has {word!r}, of no known type; {nearest(array[1], DTYPES)}")
        sizes = tuple(int(size) for size in array[2].split(",") if size)
        found.append(jax.ShapeDtypeStruct(sizes, DTYPES[array[1]]))
    return found


def find_function(place: str) -> Callable[..., Any]:
    """Of 'package.module:function' or 'file.py:function', where the program was started."""
    module_name, _, name = place.partition(":")
    if not module_name or not name:
        raise InputError(f"--function {place!r}: expected MODULE:FUNCTION or FILE.py:FUNCTION")
    folder = Path.cwd()
    if module_name.endswith(".py"):
        file = Path(module_name)
        if not file.is_file():
            raise InputError(f"--function {place!r}: there is no file {file}")
        folder, module_name = file.resolve().parent, file.stem
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # a module that it imports
        raise InputError(f"--function {place!r}: there is no module {module_name!r} here") from error
    if not hasattr(module, name):
        functions = [each for each, value in vars(module).items() if callable(value)]
        raise InputError(f"--function {place!r}: {module_name} has no {name!r}; {nearest(name, functions)}")
    return getattr(module, name)


def build(function: Callable[..., Any], arguments: Sequence[jax.ShapeDtypeStruct], direction: str) -> Built:
    """The program of `function` in one of these directions:

    forward    arguments to outputs
    backward   from what the forward pass kept, and a cotangent for each output, to the gradients of arguments of floats
    both       arguments and cotangents to outputs and gradients
    """
    if direction == "forward":
        return Built(function, arguments)
    floats = [i for i, x in enumerate(arguments) if jnp.issubdtype(x.dtype, jnp.floating)]

    def forward(*values: Any) -> tuple[Any, Callable]:
        def of_floats(*some: Any) -> Any:
            return function(*(some[floats.index(i)] if i in floats else x for i, x in enumerate(values)))

        return jax.vjp(of_floats, *(values[i] for i in floats))

    outputs, pullback = jax.eval_shape(forward, *arguments)
    cotangents, tree = jax.tree.flatten(outputs)
    if direction == "both":

        def outputs_and_gradients(*values: Any) -> tuple:
            outputs, pullback = forward(*values[: len(arguments)])
            return outputs, pullback(tree.unflatten(values[len(arguments) :]))

        return Built(outputs_and_gradients, [*arguments, *cotangents])
    kept, tree_of_kept = jax.tree.flatten(pullback)

    def gradients(*values: Any) -> tuple:
        return tree_of_kept.unflatten(values[: len(kept)])(tree.unflatten(values[len(kept) :]))

    moved = array_bytes([*arguments, *cotangents, *(arguments[i] for i in floats)])
    return Built(gradients, [*kept, *cotangents], bytes=moved)


def array_bytes(arrays: Sequence[Any]) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
