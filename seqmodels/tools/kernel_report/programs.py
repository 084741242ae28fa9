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
    """

    function: Callable[..., Any]
    arguments: Sequence[jax.ShapeDtypeStruct]
    operations: float | None = None


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
        return backward(function, shapes) if self.direction == "backward" else Built(function, shapes)


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


def backward(function: Callable[..., Any], arguments: Sequence[jax.ShapeDtypeStruct]) -> Built:
    """The program of `jax.vjp`: arguments and a cotangent for each output, to the gradients of arguments of floats."""
    outputs, tree = jax.tree.flatten(jax.eval_shape(function, *arguments))
    places = [i for i, x in enumerate(arguments) if jnp.issubdtype(x.dtype, jnp.floating)]

    def gradients(*values: Any) -> tuple:
        inputs, cotangents = list(values[: len(arguments)]), values[len(arguments) :]

        def of_floats(*floats: Any) -> Any:
            return function(*(floats[places.index(i)] if i in places else x for i, x in enumerate(inputs)))

        _, transposed = jax.vjp(of_floats, *(inputs[i] for i in places))
        return transposed(tree.unflatten(cotangents))

    return Built(gradients, [*arguments, *outputs])


def array_bytes(arrays: Sequence[Any]) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
