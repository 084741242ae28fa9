"""What was found, as text to read and as files to keep."""

import importlib.util
import json
import math
import os
from typing import TYPE_CHECKING, Any

from seqmodels.files import in_bucket, to_path, told, write_file
from seqmodels.tools._documents import markdown_table
from seqmodels.tools.evaluate.evaluation import Evaluation

if TYPE_CHECKING:
    from etils import epath


def as_markdown(evaluation: Evaluation) -> str:
    """A table, or for a map one of each thing that was measured, and the notes below."""
    columns = evaluation.columns
    if evaluation.y is not None:
        tables = [_map_table(evaluation, column) for column in columns if column not in evaluation.keys]
    else:
        rows = [[_cell(row.get(column, "")) for column in columns] for row in evaluation.rows]
        tables = [markdown_table([titled(evaluation, column) for column in columns], rows)]
    return "\n\n".join([*tables, *evaluation.notes])


def _map_table(evaluation: Evaluation, column: str) -> str:
    cells = {(row[evaluation.x], row[evaluation.y]): row.get(column, "") for row in evaluation.rows}
    xs, ys = (list(dict.fromkeys(row[key] for row in evaluation.rows)) for key in (evaluation.x, evaluation.y))
    head = f"{titled(evaluation, column)}: {evaluation.y}, by {titled(evaluation, evaluation.x)}"
    rows = [[_cell(y), *(_cell(cells.get((x, y), "")) for x in xs)] for y in ys]
    return markdown_table([head, *map(_cell, xs)], rows)


def titled(evaluation: Evaluation, column: str) -> str:
    """The column's name, with its unit."""
    unit = evaluation.units.get(column)
    return f"{column.replace('_', ' ')} ({unit})" if unit else column.replace("_", " ")


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.4g}"


def folder_of(run: str | os.PathLike) -> "epath.Path":
    """Where a run's evaluations are, made when missing: what cannot be written is said before anything is measured."""
    folder = to_path(run) / "evaluations"
    if not in_bucket(folder):
        with told(f"cannot write {folder}", folder):
            folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(folder: "epath.Path", name: str, step: int, arguments: dict[str, Any], evaluation: Evaluation) -> str:
    """Write NAME.json and, where matplotlib is there, NAME.png; returns a line that says so.

    The JSON file is {"suite": NAME, "step", "arguments", "x", "y": of a map or null, "units", "rows", "notes"}.
    """
    whole = {
        "suite": name,
        "step": step,
        "arguments": arguments,
        "x": evaluation.x,
        "y": evaluation.y,
        "units": {column: unit for column, unit in evaluation.units.items() if column in evaluation.columns},
        "rows": evaluation.rows,
        "notes": list(evaluation.notes),
    }
    file = folder / f"{name}.json"
    write_file(file, json.dumps(whole, indent=1) + "\n")
    if importlib.util.find_spec("matplotlib") is None:
        return f"{file}; no picture, which needs matplotlib: pip install 'seqmodels[plot]'"
    from seqmodels.tools.evaluate.pictures import draw

    picture = folder / f"{name}.png"
    write_file(picture, draw(name, evaluation))
    return f"{file}, {picture}"
