"""The picture of an evaluation: lines over its x, bars where that is names, or maps over its x and y."""

import io
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from seqmodels.tools._pictures import COLOURS, MAP, MARKERS, is_wide, mark_bytes
from seqmodels.tools.evaluate.evaluation import Evaluation, Row
from seqmodels.tools.evaluate.results import titled


def draw(name: str, evaluation: Evaluation) -> bytes:
    """As a PNG file."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    measured = [column for column in evaluation.columns if column not in evaluation.keys]
    panels = [[column] for column in measured] if evaluation.y else _by_unit(evaluation, measured)
    panels = panels or [[]]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 4.2), layout="constrained", squeeze=False
    )
    for columns, ax in zip(panels, axes[0]):
        if evaluation.y is not None:
            _draw_map(figure, ax, evaluation, columns[0])
        elif all(isinstance(row[evaluation.x], int | float) for row in evaluation.rows):
            _draw_lines(ax, evaluation, columns)
        else:
            _draw_bars(ax, evaluation, columns)
    figure.suptitle(name.replace("_", " "))
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=130)
    pyplot.close(figure)
    return content.getvalue()


def _by_unit(evaluation: Evaluation, columns: Sequence[str]) -> list[list[str]]:
    """Columns that share a unit share a panel; those without one do where one's name begins with another's."""
    groups: dict[str, list[str]] = defaultdict(list)
    for column in columns:
        like = next((other for other in columns if column.startswith(other)), column)
        groups[evaluation.units.get(column) or like].append(column)
    return list(groups.values())


def _draw_lines(ax: Any, evaluation: Evaluation, columns: Sequence[str]) -> None:
    others = [key for key in evaluation.keys if key != evaluation.x]
    lines: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in evaluation.rows:
        for column in columns:
            if _is_number(row.get(column)):
                lines[_label(row, others, column, columns)].append((row[evaluation.x], row[column]))
    looks = itertools.cycle(zip(COLOURS, MARKERS))
    for (label, points), (colour, marker) in zip(lines.items(), looks):
        ax.plot(*zip(*sorted(points)), color=colour, marker=marker, markersize=5, label=label)
    _scale(ax, evaluation, columns)
    ax.set(xlabel=titled(evaluation, evaluation.x), ylabel=_shared_title(evaluation, columns))
    ax.grid(alpha=0.3)
    if len(lines) > 1:
        ax.legend(frameon=False, fontsize=9)


def _draw_bars(ax: Any, evaluation: Evaluation, columns: Sequence[str]) -> None:
    names = [", ".join(str(row.get(key, "")) for key in evaluation.keys) for row in evaluation.rows]
    for i, column in enumerate(columns):
        places = np.arange(len(names)) + (i - (len(columns) - 1) / 2) * 0.8 / len(columns)
        heights = [row[column] if _is_number(row.get(column)) else np.nan for row in evaluation.rows]
        bars = ax.bar(
            places, heights, 0.8 / len(columns), color=COLOURS[i % len(COLOURS)], label=column.replace("_", " ")
        )
        ax.bar_label(bars, fmt="%.3g", fontsize=8)
    ax.set_xticks(np.arange(len(names)), names, rotation=20 if len(names) > 3 else 0)
    ax.set(xlabel=", ".join(titled(evaluation, key) for key in evaluation.keys))
    ax.set(ylabel=_shared_title(evaluation, columns))
    if len(columns) > 1:
        ax.legend(frameon=False, fontsize=9)


def _draw_map(figure: Any, ax: Any, evaluation: Evaluation, column: str) -> None:
    xs, ys = (sorted({row[key] for row in evaluation.rows}) for key in (evaluation.x, evaluation.y))
    values = np.full((len(ys), len(xs)), np.nan)
    for row in evaluation.rows:
        values[ys.index(row[evaluation.y]), xs.index(row[evaluation.x])] = row.get(column, np.nan)
    # A percentage is of a hundred, so that the colours of two runs mean the same.
    limits = {"vmin": 0, "vmax": 100} if evaluation.units.get(column) == "%" else {}
    image = ax.imshow(values, cmap=MAP, aspect="auto", **limits)
    for (y, x), value in np.ndenumerate(values):
        dark = image.norm(value) < 0.5
        ax.text(x, y, f"{value:.3g}", ha="center", va="center", color="white" if dark else "black", fontsize=9)
    ax.set_xticks(range(len(xs)), [f"{x:,}" for x in xs])
    ax.set_yticks(range(len(ys)), [f"{y:,}" for y in ys])
    ax.set(xlabel=titled(evaluation, evaluation.x), ylabel=titled(evaluation, evaluation.y))
    figure.colorbar(image, ax=ax, label=titled(evaluation, column))


def _scale(ax: Any, evaluation: Evaluation, columns: Sequence[str]) -> None:
    """Logarithmic axes where numbers lie far apart, with ticks at the x there are."""
    xs = sorted({row[evaluation.x] for row in evaluation.rows})
    ys = [row[column] for row in evaluation.rows for column in columns if _is_number(row.get(column))]
    if all(column.endswith("accuracy") for column in columns):
        ax.set_ylim(-0.03, 1.03)
    elif ys and min(ys) > 0 and all(evaluation.units.get(column) == "bytes" for column in columns):
        ax.set_yscale("log", base=2)
        mark_bytes(ax.yaxis, ys)
    elif is_wide(ys):
        ax.set_yscale("log")
    if is_wide(xs):
        ax.set_xscale("log", base=2)
    if len(xs) <= 12:
        ax.set_xticks(xs, [f"{x:,}" for x in xs], rotation=45 if len(xs) > 6 else 0)
        ax.xaxis.minorticks_off()


def _label(row: Row, others: Sequence[str], column: str, columns: Sequence[str]) -> str:
    """What tells a line from the others of its panel."""
    parts = [f"{key.replace('_', ' ')} {row[key]}" for key in others]
    return ", ".join([*parts, *([column.replace("_", " ")] if len(columns) > 1 or not parts else [])])


def _shared_title(evaluation: Evaluation, columns: Sequence[str]) -> str:
    if len(columns) == 1:
        return titled(evaluation, columns[0])
    return evaluation.units.get(columns[0], columns[0].replace("_", " ")) if columns else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))
