"""Configs: gin files that compose, checked against the constructors whose parameters they set.

    include 'configs/sizes/tiny.gin'                 # then only what this experiment changes
    DIM = 128                                        # a macro, used as %DIM
    LanguageModel.d_model = %DIM
    LanguageModel.dtype = %bfloat16                  # a constant: see CONSTANTS
    LanguageModel.mixer = @GatedLinearAttention      # a constructor, for the model to call
    train.data = @TextData()                         # what TextData returns, made when `train` is called
    eval/TextData.batch_size = 8                     # holds for @eval/TextData() only

The last binding of a parameter wins: a later line beats an earlier one and all that was included above it,
a later file an earlier file, and `--gin.X.y=v` on the command line beats them all. A binding fills in an
argument that the caller leaves out; the caller has the final say. Bindings reach every call of a registered
class, but not its subclasses. `nn.scan`, `nn.remat` and the like make subclasses: give them a class of your
own, in which the registered one is called. A scope is open while a constructor runs, not later when a linen
module makes its submodules.

A job goes through these calls:

    train = register(seqmodels.training.train)       # and the others that configs may set
    rest, overrides = split_overrides(argv)
    parse(files, overrides)                          # InputError: all that can be known before the job runs
    ...                                              # construct everything
    check_all_used()                                 # InputError: bindings that changed nothing
    operative_config()                               # what was used, defaults included, as a gin file

gin-config gives the language: its syntax and its scopes. What becomes of a binding that has been read is
done here, because gin forgets where it stood, checks neither types nor use, and rewrites every exception that
passes through a configured function.
"""

import argparse
import collections
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seqmodels.config._constructors import (
    CONSTANTS,
    Constant,
    Constructor,
    Group,
    bindings,
    constructors,
    enclosing,
    find,
    map_container,
    register,
    short_name,
    short_names,
    used,
    used_lock,
)
from seqmodels.config._reading import (
    COMMAND_LINE,
    Macro,
    Names,
    Reference,
    Statement,
    Text,
    read_file,
    read_override,
    read_text,
)
from seqmodels.config._text import groups_text, scoped, value_text
from seqmodels.config._types import accepts, describe, produced
from seqmodels.errors import InputError, nearest

__all__ = [
    "CONSTANTS",
    "Bound",
    "Text",
    "add_arguments",
    "check_all_used",
    "clear",
    "config_text",
    "diff",
    "fields_text",
    "operative_config",
    "parse",
    "read_apart",
    "register",
    "split_overrides",
    "value_text",
]

# What a config file may bind and train.py has no use for: name -> what to do with such a file.
_PROGRAMS = {"sweep": "the file is a sweep of many runs, which `python -m seqmodels.tools.sweep FILE` runs"}


class Bound(NamedTuple):
    """What a config binds to a parameter, nothing of it called. `place` is where it stands: `configs/x.gin:12`."""

    place: str
    value: Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--config FILE`, and a word on `--gin.X.y=v` (which `split_overrides` takes out) to the help."""
    group = parser.add_argument_group(
        "config",
        "What is built, and how. --gin.NAME.PARAMETER=VALUE sets one value and beats every file, as in\n"
        "--gin.train.steps=100; --gin.MACRO=VALUE sets a macro. Values are written as in gin files, so a\n"
        "string keeps its quotes: --gin.TextData.paths=\"'corpus'\".",
    )
    group.add_argument(
        "--config",
        metavar="FILE",
        action="append",
        required=True,
        help="a gin file; may be given several times, a later one beats an earlier one",
    )


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take `--gin.X.y=v` out of a command line.

    Returns:
        The other arguments, and the overrides without their `--gin.`, both in order.
    """
    rest, overrides = [], []
    for argument in argv:
        if re.match(r"--?gin\b", argument) is None:
            rest.append(argument)
        elif re.match(r"--gin\.[\w./]+=.", argument):
            overrides.append(argument.removeprefix("--gin."))
        else:
            raise InputError(
                f"{COMMAND_LINE}: {argument!r} is not an override; write --gin.NAME.PARAMETER=VALUE or "
                "--gin.MACRO=VALUE, in one piece"
            )
    return rest, overrides


def parse(
    files: Iterable[str | Path],
    overrides: Iterable[str] = (),
    *,
    texts: Iterable[Text] = (),
    apart: str | None = None,
) -> None:
    """Read a config. It replaces the one read before, which stays when this one is wrong.

    Args:
        files: gin files; a later one beats an earlier one.
        overrides: bindings such as `train.steps=100`, from `split_overrides`; they beat the files and texts.
        texts: statements that come behind the files, and beat them.
        apart: a registered name whose bindings are left out, because `read_apart` reads them.

    Raises:
        InputError: one line, with file and line number: a missing file, a syntax error, a name that does
            not exist or is ambiguous, a value that does not fit the constructor's annotation, a macro that
            nothing refers to.
    """
    names = Names()
    statements = _read(files, overrides, names, texts)
    left_out = find(apart, "parse").selector if apart else None

    macros = _macros(statements)
    groups: dict[Group, dict[str, Statement]] = collections.defaultdict(dict)
    for statement in statements:
        if statement.parameter:
            if apart is None and statement.selector in _PROGRAMS:
                raise InputError(f"{statement.place}: {_PROGRAMS[statement.selector]}")
            selector = _find_parameter(statement).selector
            if selector == left_out:
                continue
            groups[statement.scope, selector][statement.parameter] = statement._replace(selector=selector)
    for name, macro in macros.items():
        _check_macro(name, macro.place, names.macros)

    for group in groups.values():
        for parameter, statement in group.items():
            value = _resolve(statement.value, statement.place, macros)
            _check_type(statement, value)
            group[parameter] = statement._replace(value=value)
    clear()
    bindings.update(groups)


def read_apart(files: Iterable[str | Path], name: str, overrides: Iterable[str] = ()) -> dict[str, Bound]:
    """What a config binds to the parameters of one constructor, with macros replaced by their values and types checked;
    `value_text` writes a part of it as gin text. The rest of the config is read, and not looked at.

    Raises:
        InputError: as `parse` does.
    """
    statements = _read(files, overrides, Names())
    macros, wanted = _macros(statements), find(name, "read_apart").selector
    found = {}
    for statement in statements:
        if not statement.parameter or statement.selector not in (name, wanted):
            continue
        statement = statement._replace(selector=_find_parameter(statement).selector)
        value = _resolve(statement.value, statement.place, macros)
        _check_type(statement, value)
        found[statement.parameter] = Bound(statement.place, value)
    return found


def clear() -> None:
    """Forget the config and what was used of it. What is registered stays registered."""
    bindings.clear()
    used.clear()


def check_all_used() -> None:
    """A binding that no call has taken is an InputError. For when the job has constructed everything."""
    taken = set()
    for (scope, selector), parameters in used.items():
        for parameter in parameters:
            holders = [(outer, selector) for outer in _enclosing(scope)]
            holder = next((h for h in holders if parameter in bindings.get(h, {})), None)
            taken.add((holder, parameter))
    unused = [
        statement
        for group, statements in bindings.items()
        for parameter, statement in statements.items()
        if (group, parameter) not in taken
    ]
    if unused:
        first, *others = unused
        others = [f"{_name(statement)} ({statement.place})" for statement in others]
        nor = f"; nor have {', '.join(others)}" if others else ""
        raise InputError(f"{first.place}: {_name(first)} has no effect: {_why_unused(first)}{nor}")


def config_text() -> str:
    """The bindings as given, with macros replaced by their values: a gin file with one binding a line. It is
    the same for the same config, however that is composed of files, macros, comments and overrides."""
    return groups_text(
        {key: {name: statement.value for name, statement in group.items()} for key, group in bindings.items()}
    )


def operative_config() -> str:
    """What was used so far, in the form of `config_text`: the bindings that a call has taken, and the
    defaults where it took these. Defaults that a gin file cannot express are left out."""
    with used_lock:
        return groups_text(used)


def fields_text(fields: Mapping[str, Mapping[str, Any]]) -> str:
    """A gin file of values by constructor and parameter; a registered class among the values is named by `@`."""
    return groups_text({("", find(name, "fields_text").selector): values for name, values in fields.items()})


def diff(old: str, new: str) -> str:
    """From one `config_text` to another: lines `- Name.parameter = old` and `+ Name.parameter = new`."""
    before, after = (set(filter(None, text.splitlines())) for text in (old, new))
    changes = [(line, "-") for line in before - after] + [(line, "+") for line in after - before]
    changes.sort(key=lambda change: (change[0].partition(" = ")[0], change[1] == "+"))
    return "\n".join(f"{sign} {line}" for line, sign in changes)


def _read(
    files: Iterable[str | Path], overrides: Iterable[str], names: Names, texts: Iterable[Text] = ()
) -> list[Statement]:
    statements = [statement for file in files for statement in read_file(Path(file), names)]
    statements += [statement for text in texts for statement in read_text(text, names)]
    return statements + [read_override(text, names) for text in overrides]


def _macros(statements: Iterable[Statement]) -> dict[str, Statement]:
    return {scoped(x.scope, x.selector): x for x in statements if not x.parameter}


def _find_parameter(statement: Statement) -> Constructor:
    constructor = find(statement.selector, statement.place)
    if statement.parameter not in constructor.parameters:
        raise InputError(
            f"{statement.place}: {statement.selector} has no parameter {statement.parameter!r}: "
            f"{nearest(statement.parameter, constructor.parameters)}"
        )
    return constructor


def _check_macro(name: str, place: str, mentioned: set[str]) -> None:
    if name in CONSTANTS:
        raise InputError(f"{place}: %{name} is a constant; give the macro another name")
    if name not in mentioned:
        parameters = sorted(f"{short}.{name}" for short, c in short_names().items() if name in c.parameters)
        macros = mentioned - CONSTANTS.keys()
        hint = f": to set a parameter, write {' or '.join(parameters)}" if parameters else ""
        if macros and not parameters:
            hint = f": {nearest(name, macros)}"
        raise InputError(f"{place}: nothing refers to the macro {name!r}{hint}")


def _resolve(value: Any, place: str, macros: Mapping[str, Statement], within: tuple[str, ...] = ()) -> Any:
    """The value with its macros replaced by their values, and the names in it by complete ones."""
    if isinstance(value, Macro):
        if value.name in CONSTANTS:
            return Constant(value.name)
        if value.name not in macros:
            valid = {*macros, *CONSTANTS}
            raise InputError(
                f"{place}: no macro or constant is named {value.name!r}: {nearest(value.name, valid)}"
            )
        if value.name in within:
            raise InputError(f"{place}: the macro {value.name!r} is defined by itself")
        macro = macros[value.name]
        return _resolve(macro.value, macro.place, macros, (*within, value.name))
    if isinstance(value, Reference):
        return dataclasses.replace(value, selector=find(value.selector, place).selector)
    return map_container(lambda element: _resolve(element, place, macros, within), value)


def _check_type(statement: Statement, value: Any) -> None:
    constructor = constructors[statement.selector]
    hint = constructor.hints.get(statement.parameter, Any)
    none_by_default = value is None and constructor.parameters[statement.parameter].default is None
    known = _known(value)
    if none_by_default or accepts(hint, known):
        return
    given, resolved = value_text(statement.value), value_text(value)
    shown = given if given == resolved or not given.startswith("%") else f"{given} ({resolved})"
    got = "None" if value is None else type(value).__name__
    if isinstance(value, Reference):
        got = known.type.__name__ if value.called else "a constructor"
    elif isinstance(value, Constant):
        got = "a constant"
    raise InputError(f"{statement.place}: {_name(statement)} = {shown}: expected {describe(hint)}, got {got}")


def _known(value: Any) -> Any:
    """The value as far as it is known before anything has been called."""
    if isinstance(value, Constant):
        return CONSTANTS[value.name]
    if not isinstance(value, Reference):
        return map_container(_known, value)
    constructor = constructors[value.selector]
    if not value.called:
        return constructor.configured
    return produced(
        constructor.target if isinstance(constructor.target, type) else constructor.hints.get("return")
    )


def _why_unused(statement: Statement) -> str:
    name = short_name(statement.selector)
    scopes = {scope for scope, selector in used if selector == statement.selector}
    if not scopes:
        called = {short_name(selector) for _, selector in used}
        return (
            f"this job never calls {name}; {nearest(name, called) if called else 'it calls nothing at all'}"
        )
    if not any(statement.scope in _enclosing(scope) for scope in scopes):
        inner = sorted(filter(None, scopes))
        hint = f"; {nearest(statement.scope, inner)}" if inner else ""
        return f"{name} is never called in scope {statement.scope!r}{hint}"
    return "each call passes its own value, or has another one bound in an inner scope"


def _name(statement: Statement) -> str:
    return f"{scoped(statement.scope, short_name(statement.selector))}.{statement.parameter}"


def _enclosing(scope: str) -> list[str]:
    return enclosing(scope.split("/") if scope else [])
