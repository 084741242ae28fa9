"""A report as one page: pictures, tables and scripts are in it, so that it can be read anywhere, offline."""

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

from seqmodels.tools.report.tables import Table

_STYLE = """
:root { color-scheme: light; }
body { margin: 2rem auto; max-width: 78rem; padding: 0 1.5rem; background: #fff; color: #1a1a1a;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; margin-top: 2.4rem; border-bottom: 1px solid #d0d0d0; }
pre { background: #f5f5f5; padding: .8rem 1rem; overflow-x: auto; font-size: 13px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e2e2e2; text-align: right; white-space: nowrap; }
th.words, td.words { text-align: left; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid #0072b2; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tbody tr:hover { background: #f5f8fb; }
figure { margin: 1.6rem 0; overflow-x: auto; } figcaption { color: #444; max-width: 60rem; }
"""

# A click on a title sorts by the values behind the cells; what is not known stays at the end.
_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => title.firstChild.addEventListener("click", () => {
    const down = title.getAttribute("aria-sort") === "ascending";
    const value = row => row.cells[column].dataset.value;
    const rows = [...table.tBodies[0].rows];
    rows.sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const numbers = !isNaN(x) && !isNaN(y);
      return (down ? -1 : 1) * (numbers ? x - y : x.localeCompare(y));
    });
    titles.forEach(other => other.removeAttribute("aria-sort"));
    title.setAttribute("aria-sort", down ? "descending" : "ascending");
    table.tBodies[0].append(...rows);
  }));
}
"""


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document. parts: what stands below the title, as HTML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{chr(10).join(parts)}
<script>{_SCRIPT}</script>
</body>
</html>
"""


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def verbatim(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def bullets(lines: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"


def table(cells: Table, values: Table) -> str:
    """A table that its titles sort. values: what it is sorted by, a table with as many rows; a cell whose column has no
    values is sorted as it reads."""
    left = [not any(row[i][:1].isdigit() for row in cells.rows) for i in range(len(cells.columns))]
    by = [values.columns.index(column) if column in values.columns else None for column in cells.columns]
    words = [' class="words"' if on_left else "" for on_left in left]
    head = "".join(
        f'<th scope="col"{kind}><button type="button">{escape(column)}</button></th>'
        for kind, column in zip(words, cells.columns)
    )
    rows = []
    for shown, behind in zip(cells.rows, values.rows):
        line = "".join(
            f'<td{kind} data-value="{escape(_value(cell if i is None else behind[i]))}">{escape(cell)}</td>'
            for kind, cell, i in zip(words, shown, by)
        )
        rows.append(f"<tr>{line}</tr>")
    body = "\n".join(rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def _value(value: Any) -> str:
    return "" if value is None or value == "-" else str(value)


def picture(caption: str, png: bytes) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}" style="max-width: 100%">'
        f"<figcaption>{escape(caption[:1].upper() + caption[1:])}.</figcaption></figure>"
    )
