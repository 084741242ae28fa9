"""What a survey found, as text to read and as markdown to keep."""

import datetime
import platform
import re
from collections.abc import Sequence
from pathlib import Path

from seqmodels.errors import InputError
from seqmodels.tools.survey.views import Table


def as_text(table: Table) -> str:
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    text = [
        "  ".join(["", f"{line[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(line[1:], widths[1:]))]).rstrip()
        for line in lines
    ]
    return "\n".join([table.title, *text])


def as_markdown(table: Table) -> str:
    head = [f"| {' | '.join(table.columns)} |", "|---" + "|---:" * (len(table.columns) - 1) + "|"]
    rows = [f"| `{row[0]}` | {' | '.join(row[1:])} |" for row in table.rows]
    return "\n".join([f"**{table.title}**", "", *head, *rows])


def section(
    view: str, command: str, heading: str, description: str, tables: Sequence[Table], wrong: Sequence[str], plot: str
) -> str:
    """A view's part of a markdown file, between marks by which the next run finds it. plot: "" for none."""
    parts = [
        _mark(view, "begin"),
        f"## {view}",
        f"`{command}`, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {platform.system()}:",
        f"```\n{heading}\n```",
        f"```\n{description}\n```",
        *map(as_markdown, tables),
        *(["\n".join(f"- **FAILED** {line}" for line in wrong)] if wrong else []),
        *([f"![{view}]({plot})"] if plot else []),
        _mark(view, "end"),
    ]
    return "\n\n".join(parts) + "\n"


def put_section(file: Path, view: str, text: str) -> None:
    """Write it into the file: in the place of the same view's, or at the end."""
    old = file.read_text() if file.exists() else ""
    if not old.strip():
        old = "# Survey of the mixers\n\nWritten by `python -m seqmodels.tools.survey`.\n"
    pattern = re.escape(_mark(view, "begin")) + ".*?" + re.escape(_mark(view, "end")) + "\n"
    new, count = re.subn(pattern, lambda _: text, old, flags=re.DOTALL)
    file.write_text(new if count else f"{old.rstrip()}\n\n{text}")


def _mark(view: str, where: str) -> str:
    return f"<!-- {view}: {where} -->"


def check_writable(option: str, path: Path | None) -> None:
    """Before minutes of measuring, not after."""
    if path is None:
        return
    existed = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise InputError(f"--{option} {path} cannot be written: {error.strerror}") from error
    if not existed:
        path.unlink()
