"""A sweep as tables: every point, and the summary. Values for CSV, cells for a person.

A CSV has its numbers in full, so that they read back as they are; what is not known is an empty field. The columns of
`TIMES` differ from one time to the next that the same sweep is run; nothing else does.
"""

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from seqmodels.tools._documents import markdown_table
from seqmodels.tools.report.points import FINISHED, Label, Point, Sweep
from seqmodels.tools.report.selection import Row


class Table(NamedTuple):
    """columns: titles. rows: a value for each column; None for what is not known."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


Values = dict[str, Callable[[Point], Any]]

COSTS: Values = {
    "parameters": lambda point: point.costs.get("parameters"),
    "state_bytes_per_layer": lambda point: point.per_layer("state_bytes"),
    "state_grows": lambda point: point.state_grows,
    "forward_flops_per_token": lambda point: point.costs.get("flops_per_token"),
    "mixer_training_flops_per_token": lambda point: point.per_layer("training_flops_per_token"),
    "mixer_decoding_flops_per_token": lambda point: point.per_layer("decoding_flops_per_token"),
}
PROGRESS: Values = {
    "step": lambda point: point.step,
    "tokens": lambda point: point.tokens,
    "training_flops": lambda point: point.training_flops,
}
TIMES: Values = {
    "seconds": lambda point: point.times.seconds or None,
    "tokens_per_second": lambda point: point.times.tokens_per_second,
}
STATUS: Values = {"status": lambda point: point.status, "reason": lambda point: point.reason or None}

# What a person reads in place of a column's name.
TITLES = {
    "state_bytes_per_layer": "state bytes per layer",
    "state_grows": "grows",
    "forward_flops_per_token": "FLOPs per token, forward",
    "mixer_training_flops_per_token": "FLOPs per token, a mixer's training",
    "mixer_decoding_flops_per_token": "FLOPs per token, a mixer's decoding",
    "training_flops": "training FLOPs",
    "tokens_per_second": "tokens/s",
}


def points(sweep: Sweep, *, times: bool) -> Table:
    """Every point: its axes, what was evaluated (the metric and the loss first), what it costs, how far it has come."""
    names = [name for name in (sweep.metric, "loss") if name in sweep.results]
    names = list(dict.fromkeys([*names, *sweep.results]))
    values: Values = {"point": lambda point: point.name}
    values |= {axis: lambda point, axis=axis: point.axes[axis] for axis in sweep.order}
    measured = {name: lambda point, name=name: point.result(name) for name in names}
    measured |= COSTS | PROGRESS | (TIMES if times else {}) | STATUS
    values |= {f"{name} (run)" if name in values else name: value for name, value in measured.items()}
    return Table(list(values), [[value(point) for value in values.values()] for point in sweep.points])


def summary(sweep: Sweep, rows: Sequence[Row]) -> Table:
    """A row for each combination of the compared axes. At an edge: names of the axes whose best value is the least or
    the largest one."""
    metric = sweep.metric
    columns = [*sweep.axes, *(f"best {axis}" for axis in sweep.best_of), *(["at an edge"] if sweep.best_of else [])]
    spread = ["seeds", f"{metric} min", f"{metric} max", f"{metric} standard deviation"] if sweep.seed else []
    loss = [] if metric == "loss" else ["loss"]
    table = []
    for row in rows:
        cells = [*row.axes.values(), *(row.best.get(axis) for axis in sweep.best_of)]
        cells += [" ".join(row.edges)] if sweep.best_of else []
        cells += [row.mean]
        cells += [len(row.values), row.least, row.most, row.deviation] if sweep.seed else []
        cells += [row.mean_of(name) for name in loss]
        cells += [value(row.points[0]) if row.points else None for value in COSTS.values()]
        table.append([*cells, row.finished, row.of])
    return Table([*columns, metric, *spread, *loss, *COSTS, "finished", "points"], table)


def as_csv(table: Table) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(table.columns)
    writer.writerows([["" if value is None else _exact(value) for value in row] for row in table.rows])
    return file.getvalue()


def _exact(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)


def summary_cells(sweep: Sweep, rows: Sequence[Row]) -> Table:
    """The summary for a person: an edge beside its value, the spread beside the mean, and no column that is empty."""
    metric = sweep.metric
    spread = f"{metric}, mean (min to max)" if sweep.seed else metric
    columns = [*sweep.axes, *(f"best {axis}" for axis in sweep.best_of), spread]
    shown = [name for name in ("parameters", "state_bytes_per_layer", "forward_flops_per_token")]
    columns += [*([] if metric == "loss" else ["loss"]), *(TITLES.get(name, name) for name in shown), "finished"]
    table = []
    for row in rows:
        cells = [label(value) for value in row.axes.values()]
        cells += [_best(axis, row) for axis in sweep.best_of]
        cells += [_spread(row) if sweep.seed else text(row.mean)]
        cells += [] if metric == "loss" else [text(row.mean_of("loss"))]
        first = row.points[0] if row.points else None
        for name in shown:
            grows = first is not None and name == "state_bytes_per_layer" and first.state_grows
            cells.append("-" if first is None else text(COSTS[name](first)) + (" (grows)" if grows else ""))
        table.append([*cells, f"{row.finished} of {row.of}"])
    return _without_empty(Table(columns, table), keep=len(sweep.axes))


def _best(axis: str, row: Row) -> str:
    return label(row.best[axis]) + (" (edge)" if axis in row.edges else "") if row.best else "-"


def _spread(row: Row) -> str:
    if row.mean is None:
        return "-"
    seeds = "" if len(row.values) == row.seeds else f", {len(row.values)} of {row.seeds} seeds"
    if len(row.values) == 1:
        return f"{text(row.mean)}{' (' + seeds[2:] + ')' if seeds else ''}"
    return f"{text(row.mean)} ({text(row.least)} to {text(row.most)}{seeds})"


def points_cells(sweep: Sweep) -> Table:
    """All points for a person, no column that is empty."""
    table = points(sweep, times=True)
    columns = [TITLES.get(column, column) for column in table.columns]
    rows = [[text(value) for value in row] for row in table.rows]
    return _without_empty(Table(columns, rows), keep=1)


def _without_empty(table: Table, keep: int) -> Table:
    full = [i for i in range(len(table.columns)) if i < keep or any(row[i] not in ("-", "") for row in table.rows)]
    return Table([table.columns[i] for i in full], [[row[i] for i in full] for row in table.rows])


def not_finished(sweep: Sweep) -> list[str]:
    """A line for each such point, and for each with an evaluation that failed."""
    return [
        f"{point.name}: {point.status}{', ' * bool(point.reason)}{point.reason}"
        for point in sweep.points
        if point.status != FINISHED or point.reason
    ]


def text(value: Any) -> str:
    """A number for a person: four digits, or all of a whole number."""
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer() and 1e3 <= abs(value) < 1e9):
        return f"{value:,.0f}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def label(value: Label) -> str:
    """A label of an axis, as in a title or a legend."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def as_markdown(table: Table) -> str:
    rows = [[cell.replace("|", "\\|") for cell in row] for row in table.rows]
    return markdown_table([column.replace("|", "\\|") for column in table.columns], rows)


def as_text(table: Table) -> str:
    """For a terminal: words on the left, numbers on the right."""
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    left = [all(not row[i][:1].isdigit() for row in table.rows) for i in range(len(table.columns))]
    cells = (
        [f"{cell:<{width}}" if on_left else f"{cell:>{width}}" for cell, width, on_left in zip(line, widths, left)]
        for line in lines
    )
    return "\n".join("  ".join(line).rstrip() for line in cells)
