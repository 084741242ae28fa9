"""Does a value fit a type annotation? What the type check of configs asks.

The rules are those of a person who reads a constructor's signature: an int is a float, a bool is not an int,
a string is not a sequence of strings, and a tuple is not a list. What an annotation says beyond Python's
classes and the containers of `typing` (a TypeVar, a NewType, an array's shape) is not judged: such a value
passes.
"""

import collections.abc
import re
import types
import typing
from typing import Any, Literal, NamedTuple, Union

import numpy as np

_LITERALS = (bool, int, float, str, tuple, list, dict, type(None))


class Produced(NamedTuple):
    """Stands for what a call will return: an instance of `type`, or of no known class when `type` is None."""

    type: type | None


def produced(hint: Any) -> Produced:
    """What is known of a value that is annotated with `hint`."""
    known = typing.get_origin(hint) or hint
    return Produced(known if isinstance(known, type) and known is not types.UnionType else None)


def accepts(hint: Any, value: Any) -> bool:
    """Whether `value` (or the promise of one, `Produced`) may be given where the annotation is `hint`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(accepts(choice, value) for choice in arguments)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)

    expected = type(None) if hint is None else origin or hint
    actual = value.type if isinstance(value, Produced) else type(value)
    if expected is Any or not isinstance(expected, type) or actual is None:
        return True
    if not _fits(expected, actual):
        # Scalar types such as jnp.bfloat16 stand for a dtype wherever one is asked for.
        return expected is np.dtype and hasattr(value, "dtype")
    if isinstance(value, Produced) or not arguments:
        return True
    if expected is type:
        return arguments[0] is Any or not isinstance(arguments[0], type) or issubclass(value, arguments[0])
    if expected is collections.abc.Callable:
        return not isinstance(value, type) or accepts(arguments[-1], Produced(value))
    if isinstance(value, tuple) and expected is tuple and arguments[-1] is not Ellipsis:
        return len(value) == len(arguments) and all(map(accepts, arguments, value))
    if isinstance(value, tuple | list):
        return all(accepts(arguments[0], element) for element in value)
    if isinstance(value, dict):
        return all(accepts(arguments[0], k) and accepts(arguments[-1], v) for k, v in value.items())
    return True


def describe(hint: Any) -> str:
    """The annotation as one would write it, without module names: `tuple[int, ...]`, `float | None`."""
    if isinstance(hint, type) and not typing.get_args(hint):
        return hint.__name__
    return re.sub(r"\b(?:[A-Za-z_]\w*\.)+(?=\w)", "", str(hint))


def _fits(expected: type, actual: type) -> bool:
    """Whether an instance of `actual` may be given for the class `expected`, whatever it contains."""
    if expected is float:
        return issubclass(actual, int | float) and actual is not bool
    if expected is int:
        return issubclass(actual, int) and actual is not bool
    if actual is str:
        return expected in (str, object)
    if expected is collections.abc.Callable:
        return any("__call__" in vars(base) for base in actual.__mro__)
    if getattr(expected, "_is_protocol", False):
        return actual not in _LITERALS
    return issubclass(actual, expected)
