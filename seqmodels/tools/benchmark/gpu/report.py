"""What was measured on a GPU, as tables to read and as JSON to keep."""

from collections.abc import Sequence
from typing import Any

from seqmodels.tools._documents import markdown_table
from seqmodels.tools.benchmark.cases import Workload
from seqmodels.tools.benchmark.gpu.suite import AGREEMENT, Cell, Row, names

START = "# Benchmarks on a GPU\n\nWritten by `python -m seqmodels.tools.benchmark --suite gpu`.\n"
LEGEND = f"""\
Milliseconds of a call (medians), then the error: the largest of max |a - b| / max |b|, and of which gradient. b is from
the last sequence alone in float32 at the highest precision, in the form that is named. Caches are not emptied between
calls. ours / peer: time of our fastest over that of the fastest peer; below 1 ours is faster.
  *  starting a call took the host about as long as the call: the device may have waited
  !  the error is over {AGREEMENT:g}; not compared
  ~  computes something else, as a line below says; its error is not taken"""
_NARROW = 18  # of a cell: a time, an error and the name of its gradient


class Table:
    """The rows of one operator's case, each as a line once it is known."""

    def __init__(self, workload: Workload):
        self._programs = names(workload.op, workload.case)
        self._reasons: list[str] = []
        self.title = f"{workload.op}, {workload.case}; {workload.heads} heads, {workload.dtype}"
        self.columns = ("pass", "length x batch", "D", *self._programs, "ours / peer", "reference")
        self._widths = [7, 14, 4, *(max(len(name), _NARROW) for name in self._programs), 11, 9]

    @property
    def head(self) -> str:
        return f"{self.title}\n{self._line(self.columns)}"

    def line(self, row: Row) -> str:
        return self._line(self.cells(row))

    def cells(self, row: Row) -> tuple[str, ...]:
        work = row.workload
        return (
            "both" if row.backward else "forward",
            f"{work.length} x {work.batch}",
            str(work.key_dim),
            *(self._cell(cell) for cell in row.cells),
            "-" if row.ratio is None else f"{row.ratio:.2f}",
            row.reference or f"- [{self._reason('reference', row.no_reference)}]",
        )

    @property
    def notes(self) -> str:
        """What the marks of the lines so far stand for."""
        return "\n".join(f"  [{i + 1}] {reason}" for i, reason in enumerate(self._reasons))

    def _line(self, cells: Sequence[str]) -> str:
        text = (f"{cell:>{width}}" for cell, width in zip(cells, self._widths))
        return "  " + "  ".join(text)

    def _cell(self, cell: Cell) -> str:
        if cell.measured is None:
            return f"- [{self._reason(cell.name, cell.skipped)}]"
        text = f"{cell.milliseconds:.3g}" if cell.milliseconds < 100 else f"{cell.milliseconds:.0f}"
        text += "*" if cell.host_bound else ""
        if cell.differs:
            return f"{text} ~ [{self._reason(cell.name, f'computes something else: {cell.differs}')}]"
        if not cell.errors:
            return text
        name, worst = _worst(cell)
        return f"{text} ({worst:.0e}{'' if name == 'o' else f' {name}'}){'' if cell.agrees else '!'}"

    def _reason(self, name: str, reason: str) -> int:
        note = f"{name}: {reason}"
        if note not in self._reasons:
            self._reasons.append(note)
        return self._reasons.index(note) + 1


def _worst(cell: Cell) -> tuple[str, float]:
    """The greatest error, a NaN above all, and whose it is."""
    return max(cell.errors.items(), key=lambda item: (item[1] != item[1], item[1]))


def tables(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by operator and case."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.workload.op, row.workload.case), []).append(row)
    return found


def section(command: str, heading: str, rows: Sequence[Row]) -> list[str]:
    """The paragraphs of the suite's part of a markdown file."""
    parts = ["## gpu", f"`{command}`:", f"```\n{heading}\n\n{LEGEND}\n```"]
    for group in tables(rows).values():
        table = Table(group[0].workload)
        parts += [f"### {table.title}", markdown_table(table.columns, [table.cells(row) for row in group])]
        parts += [f"```\n{table.notes}\n```"] if table.notes else []
    return parts


def as_json(environment: dict[str, Any], device: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that was measured."""
    return {"environment": environment, "device": device, "rows": [_row(row) for row in rows]}


def _row(row: Row) -> dict[str, Any]:
    ours, peer = row.fastest(True), row.fastest(False)
    return {
        **row.workload._asdict(),
        "backward": row.backward,
        "reference": row.reference,
        "no_reference": row.no_reference,
        "ours": ours and ours.name,
        "peer": peer and peer.name,
        "ratio": row.ratio,
        "programs": [_program(cell) for cell in row.cells],
    }


def _program(cell: Cell) -> dict[str, Any]:
    measured = cell.measured
    return {
        "program": cell.name,
        "milliseconds": None if measured is None else cell.milliseconds,
        "errors": dict(cell.errors),
        "agrees": None if measured is None or not cell.errors else cell.agrees,
        "differs": cell.differs,
        "skipped": cell.skipped,
        "traceback": cell.traceback,
        "seconds": measured and measured.seconds,
        "calls": measured and measured.calls,
        "host_seconds": measured and measured.host,
        "host_bound": None if measured is None else cell.host_bound,
        "prepare_seconds": measured and measured.prepare_seconds,
        "temporary_bytes": measured and measured.temporary_bytes,
    }
