"""From a sweep's file to its points: the axes that it binds, multiplied, each point with its own bindings."""

import argparse
import collections
import hashlib
import itertools
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seqmodels import config
from seqmodels.config import Bound, Text, value_text
from seqmodels.errors import InputError, nearest

Label = str | int | float
LONGEST_NAME = 120
# What a sweep's folder holds beside its points.
RESERVED = ("logs", "jobs", "report", "sweep.json")
_SETTINGS = ("list", "zip", "product")


class Axis(NamedTuple):
    """What is varied: statements by label, in order."""

    name: str
    options: dict[Label, tuple[Text, ...]]


class Point(NamedTuple):
    """One run. texts: what it says beyond the sweep's base; a later one beats an earlier one."""

    name: str
    axes: dict[str, Label]
    texts: tuple[Text, ...]

    @property
    def bindings(self) -> list[str]:
        return [text.text for text in self.texts]


class Sweep(NamedTuple):
    """A sweep's file. question: the lines of the comment on its top. overrides: of the command line, for every point.
    best_of: axes over which the report takes the best by `metric`. evaluate: arguments of tools.evaluate."""

    file: Path
    question: list[str]
    overrides: list[str]
    axes: list[Axis]
    points: list[Point]
    evaluate: list[str]
    evaluate_place: str
    metric: str
    metric_place: str
    best_of: list[str]

    @property
    def order(self) -> dict[str, list[Label]]:
        return {axis.name: list(axis.options) for axis in self.axes}


def sweep(
    *,
    list: Mapping[str, Mapping[str, Sequence[str]]] = {},
    zip: Mapping[str, Mapping[str, Sequence[Any]]] = {},
    product: Mapping[str, Sequence[Any]] = {},
    overrides: Sequence[tuple[Mapping[str, Any], Sequence[str]]] = (),
    evaluate: Sequence[str] = (),
    metric: str = "accuracy",
    best_of: Sequence[str] = (),
) -> None:
    """What a sweep's file may bind; never called.

    Args:
        list: axis -> name of an option -> gin statements, includes too.
        zip: axis -> bindings that go together -> their values, equally many. An option's label is the value of the
            first binding, or where that has a value twice, of all.
        product: binding -> its values; the axis has the parameter's name.
        overrides: pairs of a condition, {axis: label or a list of labels}, and statements for the points that match it;
            a later one beats an earlier one, and all of them beat the axes.
        evaluate: arguments of `seqmodels.tools.evaluate` behind --suite, for every finished point.
        metric: what is compared: a name among the numbers of the evaluation at a run's end.
        best_of: axes of which the report takes the best point.
    """


def read_sweep(file: Path, overrides: Sequence[str] = ()) -> Sweep:
    """The sweep in a file, its points' configs not yet looked at. Raises `InputError`."""
    config.register(sweep, name="sweep")
    bound = config.read_apart([file], "sweep", overrides)
    axes = _axes(bound, file)
    if not axes:
        raise InputError(f"{file} binds no axis: expected one of sweep.list, sweep.zip and sweep.product")
    best_of, metric = (
        bound.get(name, Bound(str(file), default)) for name, default in (("best_of", ()), ("metric", ""))
    )
    for axis in best_of.value:
        _check_axis(axis, axes, f"{best_of.place}: sweep.best_of")
    rest = [text for text in overrides if not text.startswith("sweep.")]
    return Sweep(
        file=file,
        question=_head(file),
        overrides=rest,
        axes=axes,
        points=_points(axes, _conditions(bound, axes, file), file),
        evaluate=_evaluations(bound),
        evaluate_place=bound["evaluate"].place if "evaluate" in bound else str(file),
        metric=metric.value or "accuracy",
        metric_place=metric.place,
        best_of=[*best_of.value],
    )


def _axes(bound: Mapping[str, Bound], file: Path) -> list[Axis]:
    """In the order of _SETTINGS, whatever stands first in the file."""
    axes = []
    for setting in _SETTINGS:
        place, values = bound.get(setting, Bound("", {}))
        names = _short_names(values) if setting == "product" else {name: name for name in values}
        for key, value in values.items():
            options = _OPTIONS[setting](f"{place}: sweep.{setting}[{key!r}]", key, value)
            if not options:
                raise InputError(f"{place}: sweep.{setting}[{key!r}] is empty: expected at least one value")
            texts = {
                label: tuple(Text(f"{place} (sweep.{setting}[{key!r}])", text, file) for text in statements)
                for label, statements in options.items()
            }
            if names[key] in [axis.name for axis in axes]:
                raise InputError(
                    f"{place}: sweep.{setting}: a second axis is named {names[key]!r}: give it another name"
                )
            axes.append(Axis(names[key], texts))
    return axes


def _short_names(bindings: Mapping[str, Any]) -> dict[str, str]:
    """Names of parameters, and of those that several constructors have, with the constructors'."""
    short = {binding: binding.rpartition(".")[2] for binding in bindings}
    count = collections.Counter(short.values())
    return {binding: name if count[name] == 1 else binding for binding, name in short.items()}


def _listed(place: str, axis: str, options: Mapping[str, Sequence[str]]) -> dict[Label, list[str]]:
    return {name: [*statements] for name, statements in options.items()}


def _zipped(place: str, axis: str, bindings: Mapping[str, Sequence[Any]]) -> dict[Label, list[str]]:
    lengths = {binding: len(values) for binding, values in bindings.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{length} of {binding}" for binding, length in lengths.items())
        raise InputError(f"{place}: expected equally many values of each binding, found {told}")
    rows = [*zip(*bindings.values())]
    labels = [_label(row[0]) for row in rows]
    if len(set(labels)) < len(labels):
        labels = [", ".join(str(_label(value)) for value in row) for row in rows]
    return _distinct(place, labels, [[*map(_statement, bindings, row)] for row in rows])


def _multiplied(place: str, binding: str, values: Sequence[Any]) -> dict[Label, list[str]]:
    return _distinct(place, [*map(_label, values)], [[_statement(binding, value)] for value in values])


_OPTIONS = {"list": _listed, "zip": _zipped, "product": _multiplied}


def _distinct(place: str, labels: list[Label], statements: list[list[str]]) -> dict[Label, list[str]]:
    twice = [label for label, count in collections.Counter(labels).items() if count > 1]
    if twice:
        raise InputError(f"{place} has {twice[0]} twice: expected each value once")
    return dict(zip(labels, statements))


def _label(value: Any) -> Label:
    """A number or a string as it is, anything else as it stands in a config."""
    return value if isinstance(value, str) or _is_number(value) else value_text(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _statement(binding: str, value: Any) -> str:
    return f"{binding} = {value_text(value)}"


def _conditions(bound: Mapping[str, Bound], axes: list[Axis], file: Path) -> list[tuple[dict[str, list], list[Text]]]:
    """Of sweep.overrides: labels by axis, with what holds for the points that have them."""
    place, pairs = bound.get("overrides", Bound("", ()))
    found = []
    for number, (condition, statements) in enumerate(pairs):
        wanted = {
            name: _check_condition(name, value, axes, f"{place}: sweep.overrides") for name, value in condition.items()
        }
        where = ", ".join(f"{name} = {value}" for name, value in condition.items()) or f"number {number + 1}"
        found.append((wanted, [Text(f"{place} (sweep.overrides, {where})", text, file) for text in statements]))
    return found


def _check_condition(name: str, value: Any, axes: list[Axis], place: str) -> list[Label]:
    """The labels that a condition allows on an axis."""
    labels = _check_axis(name, axes, place).options
    several = isinstance(value, list | tuple) and _label(value) not in labels
    allowed = [*map(_label, value)] if several else [_label(value)]
    for label in allowed:
        if label not in labels:
            valid = nearest(str(label), map(str, labels))
            raise InputError(
                f"{place}: no point has {name} = {label!r}, so that its statements would do nothing; {valid}"
            )
    return allowed


def _check_axis(name: str, axes: list[Axis], place: str) -> Axis:
    found = {axis.name: axis for axis in axes}
    if name not in found:
        raise InputError(f"{place}: the sweep has no axis {name!r}; {nearest(name, found)}")
    return found[name]


def _evaluations(bound: Mapping[str, Bound]) -> list[str]:
    place, evaluations = bound.get("evaluate", Bound("", ()))
    names = []
    for text in evaluations:
        try:
            names.append(result_of(text))
        except ValueError:
            wanted = "the name of a suite, and its options"
            raise InputError(f"{place}: sweep.evaluate has {text!r}: expected {wanted}") from None
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise InputError(f"{place}: sweep.evaluate has two results {twice[0]!r}: give one of them another, by --name")
    return [*evaluations]


def result_of(evaluation: str) -> str:
    """The name of the result that an evaluation of these arguments writes: its suite's, or what --name says."""
    suite, *options = shlex.split(evaluation)
    named = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    named.add_argument("--name", default=suite)
    return named.parse_known_args(options)[0].name


def _points(axes: list[Axis], conditions: Sequence[tuple[dict[str, list], list[Text]]], file: Path) -> list[Point]:
    points: dict[str, Point] = {}
    for labels in itertools.product(*(axis.options for axis in axes)):
        at = {axis.name: label for axis, label in zip(axes, labels)}
        texts = [text for axis in axes for text in axis.options[at[axis.name]]]
        for condition, more in conditions:
            if all(at[name] in allowed for name, allowed in condition.items()):
                texts += more
        point = Point(_file_name(labels), at, tuple(texts))
        other = points.setdefault(point.name.lower(), point)  # there are disks to which these are one name
        if other is not point:
            raise InputError(
                f"{file}: two points would be named {point.name!r}: {_place(other)} and {_place(point)}; "
                "give an option another name"
            )
        if point.name.lower() in RESERVED:
            raise InputError(f"{file}: a point would be named {point.name!r}, which its folder holds beside points")
    return [*points.values()]


def _place(point: Point) -> str:
    return ", ".join(f"{axis} = {label}" for axis, label in point.axes.items())


def _file_name(labels: Sequence[Label]) -> str:
    plain = [re.sub(r"""['"@%()\[\]{}]""", "", str(label)).replace(", ", ",").strip(" ,") for label in labels]
    text = re.sub(r"[^\w.+=,-]+", "_", "-".join(plain), flags=re.ASCII).lstrip("._") or "_"
    if len(text) <= LONGEST_NAME:
        return text
    return f"{text[: LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _head(file: Path) -> list[str]:
    """The lines of the comment that a file begins with."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return [line.removeprefix("#").removeprefix(" ").rstrip() for line in lines]
