"""Which pictures a sweep has, and what is in them. How they look is `draw`'s.

The compared axes have roles. The first one with names for labels gives the lines (or, where all are numbers, the first
that is neither the width nor the length); `d_model` and `seq_len` are drawn along x; all others give panels.
"""

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from seqmodels.tools._pictures import is_wide
from seqmodels.tools.evaluate.evaluation import Evaluation
from seqmodels.tools.report.points import EVALUATED, Label, Point, Sweep
from seqmodels.tools.report.selection import Row, panels_of
from seqmodels.tools.report.tables import label

WIDTH, LENGTH = "d_model", "seq_len"
# More than these in a picture cannot be read: the picture goes on in another one.
MOST_PANELS, MOST_MAPS = 12, 24

UNITS = {
    "accuracy": "share of positions",
    "loss": "nats per position",
    "bits_per_byte": "bits",
    "tokens_per_second": "tokens/s",
}


class Line(NamedTuple):
    """of: the label it stands for. x, y: its points. low, high: from the least to the most over seeds, at each."""

    of: str
    x: Sequence[float | str]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Panel(NamedTuple):
    title: str
    lines: Sequence[Line]


class Picture(NamedTuple):
    """Panels with lines.

    name             of its file
    caption          what it shows, in a sentence
    x_label, y_label with their units
    x_scale          "linear", "bytes", "sizes" (whole numbers on a logarithmic axis) or "names"
    y_log            whether y is logarithmic
    lines            the labels of all lines of the sweep, in order: each has one look in all pictures
    dense            a line has many points, and gets a few markers
    """

    name: str
    caption: str
    x_label: str
    y_label: str
    x_scale: str
    y_log: bool
    lines: Sequence[str]
    panels: Sequence[Panel]
    dense: bool


class Map(NamedTuple):
    """values: by (y, x); None where there is none."""

    title: str
    x: Sequence[Label]
    y: Sequence[Label]
    values: Sequence[Sequence[float | None]]


class HeatMaps(NamedTuple):
    """Maps with one scale of colours."""

    name: str
    caption: str
    x_label: str
    y_label: str
    value_label: str
    maps: Sequence[Map]


def pictures(sweep: Sweep, rows: Sequence[Row]) -> list[Picture | HeatMaps]:
    """All that have something to show, in the order in which they are looked at."""
    with_values = [row for row in rows if row.points]
    if not with_values:
        return []
    view = _View(sweep, with_values)
    found = [*view.metric_by_state(), *view.metric_by_axis(WIDTH, "width, d_model (channels)")]
    found += [*view.metric_by_axis(LENGTH, "length, seq_len (tokens)"), *view.curves(), *view.evaluations()]
    return found


class _View:
    """The rows of a sweep, and the roles of its axes."""

    def __init__(self, sweep: Sweep, rows: Sequence[Row]):
        self.sweep, self.rows = sweep, rows
        names = [axis for axis in sweep.axes if any(isinstance(x, str) for x in sweep.order[axis])]
        numbers = [axis for axis in sweep.axes if axis not in (*names, WIDTH, LENGTH)]
        self.series = next(iter([*names, *numbers]), None)
        self.lines = [label(x) for x in sweep.order[self.series]] if self.series else [sweep.metric]

    def line_of(self, row: Row) -> str:
        return label(row.axes[self.series]) if self.series else self.lines[0]

    def title(self, axes: Sequence[str], labels: Sequence[Label]) -> str:
        return ", ".join(f"{axis} {label(x)}" for axis, x in zip(axes, labels))

    def others(self, *taken: str) -> list[str]:
        """The axes that give panels, in a picture where these have another role."""
        return [axis for axis in self.sweep.axes if axis not in (self.series, *taken)]

    @property
    def chosen(self) -> str:
        """How the points in a picture were chosen, behind a caption."""
        best = f", each at its best {' and '.join(self.sweep.best_of)}" if self.sweep.best_of else ""
        several = any(len(row.points) > 1 for row in self.rows)
        return best + (", mean over seeds and from the least to the most" if several else "")

    def title_of(self, name: str) -> str:
        """A quantity with its unit."""
        unit = UNITS.get(name, "")
        if name == "loss" and "accuracy" not in self.sweep.results:
            unit = "squared error"  # what has ids has an accuracy
        return f"{name.replace('_', ' ')}{f' ({unit})' * bool(unit)}"

    # Each picture of the metric at the runs' ends

    def metric_by_state(self) -> list[Picture]:
        def state(row: Row) -> float | None:
            return row.points[0].per_layer("state_bytes")

        grows = any(row.points[0].state_grows for row in self.rows)
        remark = "; of a state that grows, after the length of training" if grows else ""
        caption = f"{self.sweep.metric} against bytes of state per layer and sequence{self.chosen}{remark}"
        return self._at_end(
            "by_state_bytes", caption, "state per layer and sequence (bytes)", "bytes", state, self.others(WIDTH)
        )

    def metric_by_axis(self, axis: str, title: str) -> list[Picture]:
        if axis not in self.sweep.axes:
            return []
        caption = f"{self.sweep.metric} against {title.partition(',')[0]}{self.chosen}"
        name = f"by_{title.partition(',')[0]}"
        return self._at_end(name, caption, title, "sizes", lambda row: row.axes[axis], self.others(axis))

    def _at_end(
        self, name: str, caption: str, x_label: str, scale: str, x: Callable[[Row], Any], axes: Sequence[str]
    ) -> list[Picture]:
        rows = [row for row in self.rows if x(row)]
        panels = []
        for labels, within in panels_of(rows, axes).items():
            lines = []
            for of in self.lines:
                mine = sorted((row for row in within if self.line_of(row) == of), key=x)
                if mine:
                    ends = [[getattr(row, end) for row in mine] for end in ("mean", "least", "most")]
                    lines.append(Line(of, [x(row) for row in mine], *ends))
            panels.append(Panel(self.title(axes, labels), lines))
        y_label = f"{self.title_of(self.sweep.metric)}, held out"
        common = {"x_label": x_label, "y_label": y_label, "x_scale": scale, "caption": caption}
        return self._in_parts(f"{self.sweep.metric}_{name}", panels, **common)

    # The curves of training

    def curves(self) -> list[Picture]:
        found = []
        for name in dict.fromkeys((self.sweep.metric, "loss")):
            key = self._key(name)
            if key is None:
                continue
            how = "held out" if key.startswith(EVALUATED) else "training batches"
            for x_name, (x_label, x) in CLOCKS.items():
                panels = list(self._curve_panels(key, x))
                caption = f"{name} ({how}) against {CAPTIONS[x_name]}{self.chosen}"
                common = {"x_label": x_label, "y_label": f"{self.title_of(name)}, {how}", "x_scale": "linear"}
                found += self._in_parts(f"{name}_by_{x_name}", panels, caption=caption, dense=True, **common)
        return found

    def _key(self, name: str) -> str | None:
        """What rows call it: on held-out data where that was looked at on the way, else in training."""
        points = [point for row in self.rows for point in row.points]
        for key in (f"{EVALUATED}{name}", name):
            if any(sum(key in row for row in point.rows) > 1 for point in points):
                return key
        return None

    def _curve_panels(self, key: str, x: Callable[[Point, list[int]], list[float] | None]) -> Iterable[Panel]:
        axes = self.others()
        for labels, within in panels_of(self.rows, axes).items():
            lines = [line for row in within if (line := _curve(self.line_of(row), row.points, key, x))]
            yield Panel(self.title(axes, labels), lines)

    # What `seqmodels.tools.evaluate` found

    def evaluations(self) -> list[Picture | HeatMaps]:
        found = []
        suites = dict.fromkeys(suite for row in self.rows for point in row.points for suite in point.evaluations)
        for suite in suites:
            tables = [x for row in self.rows for point in row.points if (x := point.evaluations.get(suite))]
            if tables[0]["rows"]:
                found += self._evaluation(suite, tables)
        return found

    def _evaluation(self, suite: str, tables: Sequence[dict[str, Any]]) -> Iterator[Picture | HeatMaps]:
        """A picture of each measurement; of each of a key's values where that is neither x nor the map's y."""
        first = tables[0]
        notes = first.get("notes", []) if all(x.get("notes") == first.get("notes") for x in tables) else []
        table = Evaluation(first["x"], first.get("units", {}), first["rows"])
        keys = table.keys
        second = first["y"] if "y" in first else next((key for key in keys[1:] if _is_range(first, key)), None)
        rest = [key for key in keys if key not in (first["x"], second)]
        for column in (x for x in table.columns if x not in (*keys, second) and _has_numbers(first, x)):
            for chosen in _combinations(first, rest):
                name = "_".join(map(_file_name, dict.fromkeys([suite, column, *map(label, chosen.values())])))
                what = ", ".join([_words(column), *(f"{_words(key)} {label(x)}" for key, x in chosen.items())])
                asked = _Asked(suite, name, what, first["x"], second, column, chosen, table.units, notes)
                yield from self._maps(asked) if second else self._by_x(asked)

    def _by_x(self, asked: "_Asked") -> list[Picture]:
        axes, panels = self.others(), []
        for labels, within in panels_of(self.rows, axes).items():
            lines = []
            for row in within:
                values = _collect(row.points, asked, (asked.x,))
                if values:
                    ends = [[end(some) for some in values.values()] for end in (statistics.fmean, min, max)]
                    lines.append(Line(self.line_of(row), [at for (at,) in values], *ends))
            panels.append(Panel(self.title(axes, labels), lines))
        everything = [at for panel in panels for line in panel.lines for at in line.x]
        named = any(isinstance(at, str) for at in everything)
        log = not named and all(at > 0 for at in everything)
        return self._in_parts(
            asked.name,
            panels,
            caption=asked.caption(f"by {_words(asked.x)}{self.chosen}"),
            x_label=asked.with_unit(asked.x),
            y_label=asked.with_unit(asked.column),
            x_scale="names" if named else "sizes" if log else "linear",
        )

    def _maps(self, asked: "_Asked") -> list[HeatMaps]:
        maps = []
        axes = [axis for axis in self.sweep.axes if axis != self.series]
        for row in self.rows:
            values = _collect(row.points, asked, (asked.x, asked.y))
            if values:
                xs, ys = (list(dict.fromkeys(at[i] for at in values)) for i in (0, 1))
                grid = [[statistics.fmean(values[x, y]) if (x, y) in values else None for x in xs] for y in ys]
                rest = self.title(axes, [row.axes[axis] for axis in axes])
                maps.append(Map("\n".join(filter(None, [self.line_of(row), rest])), xs, ys, grid))
        labels = [asked.with_unit(column) for column in (asked.x, asked.y, asked.column)]
        chosen = self.chosen.partition(" and from")[0]
        caption = asked.caption(f"by {_words(asked.x)} and {_words(asked.y)}{chosen}")
        return [HeatMaps(part, caption, *labels, some) for part, some in _parts(asked.name, maps, MOST_MAPS)]

    def _in_parts(
        self,
        name: str,
        panels: Sequence[Panel],
        *,
        caption: str,
        x_label: str,
        y_label: str,
        x_scale: str,
        dense: bool = False,
    ) -> list[Picture]:
        panels = [panel for panel in panels if panel.lines]
        y_log = is_wide(y for panel in panels for line in panel.lines for y in line.y)
        return [
            Picture(part, caption, x_label, y_label, x_scale, y_log, self.lines, some, dense)
            for part, some in _parts(_file_name(name), panels, MOST_PANELS)
        ]


def _tokens(point: Point, steps: list[int]) -> list[float] | None:
    return [step * point.tokens_per_step for step in steps] if point.tokens_per_step else None


def _flops(point: Point, steps: list[int]) -> list[float] | None:
    tokens, each = _tokens(point, steps), point.training_flops_per_token
    return [each * x for x in tokens] if tokens and each else None


def _seconds(point: Point, steps: list[int]) -> list[float] | None:
    return point.times.clock(steps, point.tokens_per_step) if point.tokens_per_step else None


# What a curve is drawn against: the title of x, and x at these steps of a point.
CLOCKS = {
    "tokens": ("training tokens", _tokens),
    "flops": ("training compute (FLOPs)", _flops),
    "seconds": ("training time (seconds)", _seconds),
}
CAPTIONS = {
    "tokens": "tokens",
    "flops": "FLOPs of training, 3 times those of the forward pass",
    "seconds": "seconds of training, without compilation, evaluations and saves",
}


def _curve(
    of: str, points: Sequence[Point], key: str, x: Callable[[Point, list[int]], list[float] | None]
) -> Line | None:
    """Over the seeds' common steps; None where x is not known."""
    curves = [{row["step"]: row[key] for row in point.rows if key in row} for point in points]
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    at = [x(point, steps) for point in points]
    if not steps or None in at:
        return None
    values = [[curve[step] for curve in curves] for step in steps]
    ends = [[end(some) for some in values] for end in (statistics.fmean, min, max)]
    return Line(of, [statistics.fmean(some) for some in zip(*at)], *ends)


class _Asked(NamedTuple):
    """What one picture of an evaluation is of. y: of maps. chosen: the values that other keys have."""

    suite: str
    name: str
    what: str
    x: str
    y: str | None
    column: str
    chosen: dict[str, Label]
    units: dict[str, str]
    notes: Sequence[str]

    def caption(self, by: str) -> str:
        return ". ".join([f"{self.suite}: {self.what} {by}", *(note.rstrip(".") for note in self.notes)])

    def with_unit(self, column: str) -> str:
        unit = self.units.get(column, "")
        return f"{_words(column)}{f' ({unit})' * bool(unit)}"


def _is_range(evaluation: dict[str, Any], column: str) -> bool:
    """Whether a key is a number with so many values that it makes a map."""
    values = {row.get(column) for row in evaluation["rows"]}
    return len(values) > 2 and all(isinstance(value, int | float) for value in values)


def _has_numbers(evaluation: dict[str, Any], column: str) -> bool:
    return any(isinstance(row.get(column), int | float) for row in evaluation["rows"])


def _combinations(evaluation: dict[str, Any], keys: Sequence[str]) -> list[dict[str, Label]]:
    """The values of these columns that occur together."""
    found = dict.fromkeys(tuple(row.get(key) for key in keys) for row in evaluation["rows"])
    return [dict(zip(keys, values)) for values in found]


def _collect(points: Sequence[Point], asked: _Asked, keys: Sequence[str]) -> dict[tuple, list[float]]:
    """The numbers of a column by its keys, one for each seed, in the order of the rows."""
    found: dict[tuple, list[float]] = {}
    for point in points:
        for row in point.evaluations.get(asked.suite, {"rows": []})["rows"]:
            value = row.get(asked.column)
            if isinstance(value, int | float) and all(row.get(key) == x for key, x in asked.chosen.items()):
                found.setdefault(tuple(row[key] for key in keys), []).append(value)
    return found


def _parts(name: str, things: Sequence[Any], most: int) -> list[tuple[str, Sequence[Any]]]:
    """As few parts as there must be, with names."""
    if len(things) <= most:
        return [(name, things)] if things else []
    return [(f"{name}_{i // most + 1}", things[i : i + most]) for i in range(0, len(things), most)]


def _words(column: str) -> str:
    return column.replace("_", " ")


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in text)
