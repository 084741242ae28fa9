"""What the run directories of a sweep's points say. Nothing else is read.

    DIR/NAME/point.json             what the point is: its sweep, its value on each axis
    DIR/NAME/metrics.jsonl          rows of training and of evaluations, "eval/..."
    DIR/NAME/DONE                   there once the run has finished
    DIR/NAME/FAILED                 why the sweep gave it up
    DIR/NAME/operative_config.gin   sizes of its batches
    DIR/NAME/costs.json             parameters, bytes of state, FLOPs
    DIR/NAME/environment.json       where and when it ran
    DIR/NAME/tensorboard/           how fast
    DIR/NAME/evaluations/*.json     what `seqmodels.tools.evaluate` found
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from seqmodels.errors import InputError, nearest
from seqmodels.files import list_folder, to_path, told
from seqmodels.tools.report.events import NO_TIMES, Times, read_times
from seqmodels.training import run_directory
from seqmodels.training.run_directory import POINT, read_metrics

if TYPE_CHECKING:
    from etils import epath

Label = str | int | float
EVALUATED = "eval/"
SEED = "seed"

FINISHED, FAILED, UNFINISHED, NOT_BEGUN = "finished", "failed", "unfinished", "not begun"

# The fields of a point.json, with their types.
FIELDS = {
    "name": str,
    "sweep": str,
    "question": list,
    "metric": str,
    "best_of": list,
    "axes": dict,
    "order": dict,
    "bindings": list,
}
# What all points of a sweep have in common.
COMMON = ("sweep", "metric", "best_of")


@dataclasses.dataclass(frozen=True)
class Point:
    """A point of a sweep, as far as it has come.

    axes         its label on each axis
    status       one of the four above; reason: what is known of it in words, also of a finished run whose evaluation
                 failed
    step, steps  the last one that is known of, and those of the whole run
    rows         of `metrics.jsonl`
    costs        what costs.json says; {} without one
    starts       the entries of environment.json
    evaluations  by suite
    """

    name: str
    axes: dict[str, Label]
    status: str = NOT_BEGUN
    reason: str = ""
    step: int = 0
    steps: int | None = None
    tokens_per_step: int | None = None
    rows: Sequence[dict[str, Any]] = ()
    costs: dict[str, Any] = dataclasses.field(default_factory=dict)
    starts: Sequence[dict[str, Any]] = ()
    times: Times = NO_TIMES
    evaluations: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def result(self, name: str) -> float | None:
        """Of the last evaluation that has it."""
        key = f"{EVALUATED}{name}"
        return next((row[key] for row in reversed(self.rows) if key in row), None)

    @property
    def results(self) -> list[str]:
        """Names of what was evaluated."""
        found = (key for row in self.rows for key in row if key.startswith(EVALUATED))
        return list(dict.fromkeys(key.removeprefix(EVALUATED) for key in found))

    @property
    def tokens(self) -> int | None:
        return None if self.tokens_per_step is None else self.step * self.tokens_per_step

    @property
    def training_flops(self) -> float | None:
        """Of all tokens so far."""
        each = self.training_flops_per_token
        return None if each is None or self.tokens is None else each * self.tokens

    @property
    def training_flops_per_token(self) -> float | None:
        """Forward and backward."""
        forward = self.costs.get("flops_per_token")
        return None if forward is None else 3 * forward

    def per_layer(self, name: str) -> float | None:
        """The mean over layers of a number of costs.json's mixers, of which a layer may have several."""
        mixers = self.costs.get("mixers")
        return sum(mixer[name] for mixer in mixers) / len({mixer["layer"] for mixer in mixers}) if mixers else None

    @property
    def state_grows(self) -> bool | None:
        mixers = self.costs.get("mixers")
        return any(mixer["state_grows"] for mixer in mixers) if mixers else None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """file: as given to the sweep. question: the lines of its header. metric: what is compared, a key of the
    evaluations. best_of: axes of which the best value is taken. order: the labels of each axis."""

    file: str
    question: Sequence[str]
    metric: str
    best_of: Sequence[str]
    order: dict[str, list[Label]]
    points: Sequence[Point]

    @property
    def name(self) -> str:
        return PurePath(self.file).stem

    @property
    def seed(self) -> str | None:
        """The axis whose spread is told."""
        return SEED if SEED in self.order and SEED not in self.best_of else None

    @property
    def axes(self) -> list[str]:
        """Those that are compared: neither the best of them is taken, nor the spread."""
        return [axis for axis in self.order if axis not in self.best_of and axis != self.seed]

    @property
    def results(self) -> list[str]:
        return list(dict.fromkeys(name for point in self.points for name in point.results))

    @property
    def seconds(self) -> float:
        return sum(point.times.seconds for point in self.points)


def read_sweep(folder: str | os.PathLike, metric: str | None = None) -> Sweep:
    """The sweep whose points' run directories are in a folder, here or in a bucket.

    metric: in place of the sweep's own.
    Raises `InputError`: no points there, points of different sweeps, a damaged file, a metric that no run has.
    """
    folder = to_path(folder)
    with told(f"cannot read {folder}", folder, expected="the --sweep_dir of seqmodels.tools.sweep"):
        folders = sorted(path for path in list_folder(folder) if (path / POINT).exists())
        within = not folders and (folder / POINT).exists()
    if within:
        raise InputError(f"{folder} is one point of a sweep; expected the folder above it, {folder.parent}")
    if not folders:
        raise InputError(
            f"{folder} has no points: no folder in it has a point.json; expected the --sweep_dir of "
            "seqmodels.tools.sweep"
        )
    with ThreadPoolExecutor() as pool:  # a bucket answers many at a time
        found = list(pool.map(_read_point, folders))
    descriptions, points = [d for d, _ in found], [point for _, point in found]
    _check_one_sweep(folder, descriptions, points)
    first = descriptions[0]
    order = _order(descriptions)
    points = _in_order(points, order, descriptions)
    sweep = Sweep(first["sweep"], first["question"], metric or first["metric"], first["best_of"], order, points)
    for axis in sweep.best_of:
        if axis not in order:
            raise InputError(f"{folders[0] / POINT}: best_of has {axis!r}; {nearest(axis, order)}")
    if sweep.results and sweep.metric not in sweep.results:
        raise InputError(f"no run in {folder} has the metric {sweep.metric!r}; {nearest(sweep.metric, sweep.results)}")
    return sweep


def _read_point(folder: "epath.Path") -> tuple[dict[str, Any], Point]:
    description = _read_json(folder / POINT, FIELDS)
    for axis, label in description["axes"].items():
        if not isinstance(label, Label):
            raise InputError(f"{folder / POINT}: axis {axis} is {label!r}; expected a string or a number")
    rows = read_metrics(folder / "metrics.jsonl")
    done = _read_json(folder / run_directory.DONE, {"step": int}, missing={})
    sizes = _sizes(folder / "operative_config.gin")
    step = done["step"] if done else max((row["step"] for row in rows), default=0)
    starts = _read_json(folder / "environment.json", list, missing=[])
    failure = _read_json(folder / run_directory.FAILED, {"reason": str}, missing={})
    status, reason = _status(done, failure, bool(starts), step, sizes.get("steps"))
    batch, length = sizes.get("batch_size"), sizes.get("seq_len")
    files = (path for path in list_folder(folder / run_directory.EVALUATIONS) if path.name.endswith(".json"))
    evaluations = sorted(path for path in files if path.name != run_directory.EVALUATED)
    return description, Point(
        name=folder.name,
        axes=description["axes"],
        status=status,
        reason=reason,
        step=step,
        steps=sizes.get("steps"),
        tokens_per_step=batch * length if batch and length else None,
        rows=rows,
        costs=_read_json(folder / "costs.json", {"mixers": list}, missing={}),
        starts=starts,
        times=read_times(folder / "tensorboard"),
        evaluations={path.name.removesuffix(".json"): _read_evaluation(path) for path in evaluations},
    )


def _status(
    done: dict[str, Any], failure: dict[str, Any], begun: bool, step: int, steps: int | None
) -> tuple[str, str]:
    where = f"step {step:,}" + (f" of {steps:,}" if steps else "")
    why = failure.get("reason", "")
    says = failure.get("says") or []
    # The first of what it has said is the error, where there was one.
    why += f": {says[0].strip()}" if says else ""
    if done:
        return FINISHED, why
    if failure:
        return FAILED, f"{where}: {why}"
    return (UNFINISHED, where) if begun else (NOT_BEGUN, "")


def _read_evaluation(path: "epath.Path") -> dict[str, Any]:
    found = _read_json(path, {"x": str, "rows": list})
    for row in found["rows"]:
        if not isinstance(row, dict) or found["x"] not in row:
            raise InputError(f"{path}: expected rows with {found['x']!r}, found {str(row)[:60]}")
    return found


def _read_json(path: "epath.Path", kind: type | dict[str, type], missing: Any = None) -> Any:
    """A file's value, of this type, or an object with these fields. missing: what stands for a file that is not
    there."""
    with told(f"cannot read {path}", path):
        try:
            text = path.read_text()
        except FileNotFoundError:
            if missing is None:
                raise
            return missing
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: expected JSON ({error.msg})") from error
    fields = kind if isinstance(kind, dict) else {}
    if not isinstance(found, dict if fields else kind):
        raise InputError(f"{path}, line 1: expected {'an object' if fields else 'a list'}, found {text[:60]!r}")
    for name, of in fields.items():
        if not isinstance(found.get(name), of):
            raise InputError(f"{path}: expected {name!r}, a {of.__name__}, found {found.get(name)!r}")
    return found


def _sizes(path: "epath.Path") -> dict[str, int]:
    """batch_size, seq_len and steps of `train`."""
    with told(f"cannot read {path}", path):
        text = path.read_text() if path.exists() else ""
    found = re.findall(r"^train\.(batch_size|seq_len|steps) = (\d+)$", text, re.MULTILINE)
    return {name: int(value) for name, value in found}


def _check_one_sweep(folder: "epath.Path", descriptions: Sequence[dict[str, Any]], points: Sequence[Point]) -> None:
    first, names = descriptions[0], [point.name for point in points]
    for name, other in zip(names, descriptions):
        for field in COMMON:
            if other[field] != first[field]:
                raise InputError(
                    f"{folder} has points of different sweeps: {field} is {first[field]!r} in {names[0]} and "
                    f"{other[field]!r} in {name}; expected one sweep"
                )
        if set(other["axes"]) != set(first["axes"]) or set(other["order"]) != set(other["axes"]):
            raise InputError(
                f"{folder} has points of different sweeps: the axes are {', '.join(first['axes'])} in {names[0]} and "
                f"{', '.join(other['axes'])} in {name}; expected one sweep"
            )
    seen: dict[tuple, str] = {}
    for point in points:
        at = tuple(point.axes[axis] for axis in first["axes"])
        if at in seen:
            raise InputError(f"{folder}: {seen[at]} and {point.name} are the same point; expected one folder for each")
        seen[at] = point.name


def _order(descriptions: Sequence[dict[str, Any]]) -> dict[str, list[Label]]:
    """The labels of every axis. A sweep that was extended has points that know fewer: the longest list comes first."""
    found = {}
    for axis in descriptions[0]["order"]:
        lists = sorted((d["order"][axis] for d in descriptions), key=len, reverse=True)
        labels = dict.fromkeys(itertools.chain(*lists, (d["axes"][axis] for d in descriptions)))
        found[axis] = list(labels)
    return found


def _in_order(
    points: Sequence[Point], order: dict[str, list[Label]], descriptions: Sequence[dict[str, Any]]
) -> list[Point]:
    """All points of the products of the axes, as each description has them; those without a folder are not begun."""
    there = {tuple(point.axes[axis] for axis in order): point for point in points}
    orders = {tuple(tuple(d["order"][axis]) for axis in order) for d in descriptions}
    expected = {labels for lists in orders for labels in itertools.product(*lists)} | there.keys()
    return [
        there.get(labels) or _not_begun(dict(zip(order, labels)))
        for labels in itertools.product(*order.values())
        if labels in expected
    ]


def _not_begun(axes: dict[str, Label]) -> Point:
    return Point(", ".join(f"{axis} {label}" for axis, label in axes.items()), axes)
