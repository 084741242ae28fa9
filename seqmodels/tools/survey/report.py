"""What a survey found, as text to read and as markdown to keep."""

import datetime
import platform
from collections.abc import Sequence

from seqmodels.tools._documents import markdown_table
from seqmodels.tools.survey.views import Table

START = "# Survey of the mixers\n\nWritten by `python -m seqmodels.tools.survey`.\n"


def as_text(table: Table) -> str:
    lines = [table.columns, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.columns))]
    text = [
        "  ".join(["", f"{line[0]:<{widths[0]}}", *(f"{cell:>{w}}" for cell, w in zip(line[1:], widths[1:]))]).rstrip()
        for line in lines
    ]
    return "\n".join([table.title, *text])


def as_markdown(table: Table) -> str:
    rows = [(f"`{row[0]}`", *row[1:]) for row in table.rows]
    return f"**{table.title}**\n\n{markdown_table(table.columns, rows)}"


def section(
    view: str, command: str, heading: str, description: str, tables: Sequence[Table], wrong: Sequence[str], plot: str
) -> list[str]:
    """The paragraphs of a view's part of a markdown file. plot: "" for none."""
    return [
        f"## {view}",
        f"`{command}`, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {platform.system()}:",
        f"```\n{heading}\n```",
        f"```\n{description}\n```",
        *map(as_markdown, tables),
        *(["\n".join(f"- **FAILED** {line}" for line in wrong)] if wrong else []),
        *([f"![{view}]({plot})"] if plot else []),
    ]
