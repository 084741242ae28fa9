"""The constructors that configs know, and what a call of one does: take its bindings, note what was used."""

import dataclasses
import functools
import inspect
import threading
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import gin
import jax
import jax.numpy as jnp

from seqmodels.config._reading import Reference, Statement
from seqmodels.errors import InputError, nearest

# What a config names as %name: values that have no literal.
CONSTANTS: Mapping[str, Any] = {
    "float32": jnp.float32,
    "float16": jnp.float16,
    "bfloat16": jnp.bfloat16,
    "gelu": jax.nn.gelu,
    "relu": jax.nn.relu,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "softplus": jax.nn.softplus,
    "tanh": jnp.tanh,
}

_LINEN_FIELDS = {"parent", "name"}  # set by flax, never by a person
_T = TypeVar("_T", bound=Callable)


@dataclasses.dataclass(frozen=True)
class Constant:
    """`%name` in a value, where `name` is one of CONSTANTS."""

    name: str


class Constructor(NamedTuple):
    selector: str  # module and name, as in `seqmodels.layers.retention.Retention`
    target: Callable  # what was registered
    configured: Callable  # the same class, or a function that calls the target
    parameters: dict[str, inspect.Parameter]  # those that a config may bind
    hints: dict[str, Any]


Group = tuple[str, str]  # a scope, and the selector of a constructor
constructors: dict[str, Constructor] = {}
bindings: dict[Group, dict[str, Statement]] = {}
used: dict[Group, dict[str, Any]] = {}
used_lock = threading.Lock()


def register(target: _T, name: str | None = None, module: str | None = None) -> _T:
    """Let configs set the parameters of a class or function, and return its configured form.

    A class is configured in place: every call of it anywhere in the process gets the bindings. A function
    cannot be: call what is returned. To register a thing again changes nothing and returns the same.

    Args:
        target: a class with an `__init__` (a dataclass, a linen module), or a function.
        name: what configs call it; by default its own name.
        module: tells equal names apart, as in `layers.Norm` and `models.Norm`; by default its own module.
    """
    selector = f"{module or target.__module__}.{name or target.__name__}"
    for known in constructors.values():
        if target is known.target or target is known.configured:
            return known.configured
        if selector == known.selector:
            raise ValueError(f"{selector} is registered already, as {known.target}")

    is_class = isinstance(target, type)
    if is_class and target.__init__ is object.__init__:
        raise TypeError(f"{selector} has no __init__ to configure; register a function that makes it")
    call = target.__init__ if is_class else target
    # A dataclass's own __init__ has its annotations as text that only the classes' modules can make sense of.
    is_dataclass = "__dataclass_fields__" in vars(target)
    hints = typing.get_type_hints(call if is_class and not is_dataclass else target)
    signature = inspect.signature(call).parameters
    positional = [name for name, p in signature.items() if p.kind <= p.POSITIONAL_OR_KEYWORD]
    parameters = {
        name: p
        for name, p in list(signature.items())[is_class:]
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    if parameters.keys() >= _LINEN_FIELDS:
        parameters = {name: p for name, p in parameters.items() if name not in _LINEN_FIELDS}

    @functools.wraps(call)
    def configured(*args, **kwargs):
        given = {*positional[: len(args)], *kwargs}
        return call(*args, **kwargs, **_supply(constructors[selector], given))

    if is_class:
        target.__init__ = configured
    constructor = Constructor(selector, target, target if is_class else configured, parameters, hints)
    constructors[selector] = constructor
    return constructor.configured


def _supply(constructor: Constructor, given: set[str]) -> dict[str, Any]:
    """The arguments that the config adds to those given by the caller."""
    scope = gin.current_scope()
    bound: dict[str, Any] = {}
    for outer in reversed(enclosing(scope)):
        group = bindings.get((outer, constructor.selector), {})
        bound |= {name: statement.value for name, statement in group.items() if name not in given}

    taken = dict(bound)
    for name, parameter in constructor.parameters.items():
        if name in given or name in bound:
            continue
        if parameter.default is parameter.empty:
            short = short_name(constructor.selector)
            raise InputError(f"{short} needs a value for {name!r}: set {short}.{name} in the config")
        taken[name] = parameter.default
    with used_lock:
        used.setdefault(("/".join(scope), constructor.selector), {}).update(taken)
    return {name: _build(value) for name, value in bound.items()}


def _build(value: Any) -> Any:
    """The object that a bound value stands for; `@Name()` is called anew each time."""
    if isinstance(value, Reference):
        target = _in_scope(value.selector, value.scope)
        return target() if value.called else target
    if isinstance(value, Constant):
        return CONSTANTS[value.name]
    return map_container(_build, value)


@functools.cache  # one object each, so that modules which hold it in a field stay equal
def _in_scope(selector: str, scope: str) -> Callable:
    configured = constructors[selector].configured
    if not scope:
        return configured

    def configured_in_scope(*args, **kwargs):
        with gin.config_scope(scope.split("/")):
            return configured(*args, **kwargs)

    return configured_in_scope


def map_container(function: Callable[[Any], Any], value: Any) -> Any:
    """The function of each element of a tuple, list or dict; any other value as it is."""
    if isinstance(value, tuple | list):
        return type(value)(function(element) for element in value)
    if isinstance(value, dict):
        return {function(key): function(element) for key, element in value.items()}
    return value


def enclosing(scope: Sequence[str]) -> list[str]:
    """`a/b`, `a` and the root for a, b: the scopes whose bindings hold there, the innermost first."""
    return ["/".join(scope[:depth]) for depth in range(len(scope), -1, -1)]


# A constructor answers to any ending of its selector that no other one shares.


def find(name: str, place: str) -> Constructor:
    found = _matches(name)
    if not found:
        raise InputError(f"{place}: nothing configurable is named {name!r}: {nearest(name, short_names())}")
    if len(found) > 1:
        raise InputError(f"{place}: {name!r} is ambiguous: write {' or '.join(map(short_name, found))}")
    return constructors[found[0]]


def short_name(selector: str) -> str:
    parts = selector.split(".")
    endings = (".".join(parts[start:]) for start in range(len(parts) - 1, -1, -1))
    return next(ending for ending in endings if _matches(ending) == [selector])


def short_names() -> dict[str, Constructor]:
    return {short_name(selector): constructor for selector, constructor in constructors.items()}


def _matches(name: str) -> list[str]:
    if name in constructors:
        return [name]
    return sorted(selector for selector in constructors if selector.endswith(f".{name}"))
