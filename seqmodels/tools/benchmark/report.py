"""What was measured, as tables to read and as JSON to keep."""

import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from seqmodels.tools._documents import markdown_table
from seqmodels.tools.benchmark.compare import Row

START = "# Benchmarks on a CPU\n\nWritten by `python -m seqmodels.tools.benchmark`.\n"
PACKAGES = ("jax", "jaxlib", "numpy", "torch", "triton", "transformers", "flash-linear-attention", "mamba_ssm")


class Group(NamedTuple):
    """Rows that were measured beside each other. over_lengths: one program at several lengths, not several programs."""

    backward: bool
    over_lengths: bool
    rows: Sequence[Row]


def heading(environment: dict[str, Any]) -> str:
    """On what and when: processor, versions, source, load."""
    source = environment["source"]
    revision = "unknown" if source is None else str(source["revision"])[:12]
    changed = " with local changes" if source and source["changed"] else ""
    versions = {name: environment["packages"][name] for name in PACKAGES if name in environment["packages"]}
    return "\n".join(
        [
            f"{environment['processor']}, {environment['cores']} cores, load average {load()}, {environment['time']}",
            f"seqmodels {revision}{changed}, Python {environment['python']}, "
            + ", ".join(f"{name} {version}" for name, version in versions.items()),
        ]
    )


def load() -> str:
    """Load averages over 1, 5 and 15 minutes: processes that want a core."""
    return " ".join(f"{x:.1f}" for x in os.getloadavg())


def table(group: Group) -> str:
    """One group: what was run, a line for each row, and what the comparison says."""
    first = group.rows[0].workload
    sizes = f"heads {first.heads}, key {first.key_dim}, value {first.value_dim}, {first.dtype}"
    where = "" if group.over_lengths else f"batch {first.batch}, length {first.length}, "
    name = f" {group.rows[0].subject.name}" if group.over_lengths else ""
    what = f"{first.op}, {first.case}:{name} {'forward + backward' if group.backward else 'forward'}"
    threads = group.rows[0].threads
    clock = "CPU ms" if threads == 1 else "wall ms"
    titles = ("length x batch" if group.over_lengths else "program", clock, "noise", "ktok/s")
    titles += ("ratio", "peak MiB", "XLA MiB", "compile s", "difference")
    lines = [titles, *(_cells(row, group) for row in group.rows)]
    full = [line for line in lines if len(line) == len(titles)]
    widths = [max(len(line[i]) for line in full) for i in range(len(titles))]
    first_width = max(len(line[0]) for line in lines)
    text = [f"{what}; {where}{sizes}, {threads} thread{'s' if threads > 1 else ''}"]
    for line in lines:
        cells = line[1:] if line not in full else [f"{cell:>{width}}" for cell, width in zip(line[1:], widths[1:])]
        text.append("  ".join(["", f"{line[0]:<{first_width}}", *cells]))
    subjects = [row.subject for row in group.rows]
    notes = [f"{each.name} computes something else: {each.differs}" for each in subjects if each.differs]
    return "\n".join([*text, *(f"  {line}" for line in (*notes, *conclusion(group)))])


def _cells(row: Row, group: Group) -> tuple[str, ...]:
    """A row's cells, or its name and why it was skipped."""
    name = f"{row.workload.length} x {row.workload.batch}" if group.over_lengths else row.subject.name
    if row.skipped:
        return name, row.skipped
    return (
        name,
        f"{row.best * 1e3:.1f}",
        f"{row.noise:.0%}",
        f"{row.tokens_per_second / 1e3:.1f}",
        _number(ratio(row, group), ".2f"),
        _mebibytes(row.ready.peak_bytes),
        _mebibytes(row.ready.temporary_bytes),
        _number(row.ready.compile_seconds, ".1f"),
        _number(row.difference, ".0e") + ("" if row.agrees else " differs"),
    )


def ratio(row: Row, group: Group) -> float | None:
    """A row's time over the first row's, for as many tokens; None where one is missing or computes something else."""
    first = group.rows[0]
    if row.skipped or first.skipped or not row.agrees:
        return None
    return first.tokens_per_second / row.tokens_per_second


def fastest_other(group: Group) -> Row | None:
    """The fastest of the programs that are not the first with another chunk size; None where none was measured."""
    first = group.rows[0].subject._replace(chunk_size=None)
    others = [row for row in group.rows if row.subject._replace(chunk_size=None) != first]
    return max(
        (row for row in others if ratio(row, group) is not None), key=lambda row: row.tokens_per_second, default=None
    )


def conclusion(group: Group) -> list[str]:
    """The number that a reader looks for, in words."""
    first = group.rows[0]
    if group.over_lengths:
        speeds = [row.tokens_per_second for row in group.rows if not row.skipped]
        return [f"most over least tokens per second: {max(speeds) / min(speeds):.2f}"] if len(speeds) > 1 else []
    other = fastest_other(group)
    if other is None:
        return []
    times = f"{ratio(other, group):.2f} times as fast as {other.subject.name}"
    return [f"{first.subject.name} is {times}, the fastest of the others"]


def section(view: str, command: str, heading: str, groups: Sequence[Group]) -> list[str]:
    """The paragraphs of a view's part of a markdown file: a line for each table of programs, then the tables."""
    columns = ("", "length", "pass", "ktok/s", "fastest other", "its ktok/s", "times as fast")
    rows = [_summary(group) for group in groups if not group.over_lengths]
    return [
        f"## {view}",
        f"`{command}`:",
        f"```\n{heading}\n```",
        *([markdown_table(columns, rows)] if rows else []),
        *(f"```\n{table(group)}\n```" for group in groups),
    ]


def _summary(group: Group) -> tuple[str, ...]:
    first, other = group.rows[0], fastest_other(group)
    what = f"{first.workload.op}, {first.workload.case}"
    speed = f"{first.tokens_per_second / 1e3:.1f}"
    found = ("none", "-", "-")
    if other is not None:
        found = (other.subject.name, f"{other.tokens_per_second / 1e3:.1f}", f"{ratio(other, group):.2f}")
    return what, f"{first.workload.length:,}", "both" if group.backward else "forward", speed, *found


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.0f}"


def as_json(environment: dict[str, Any], groups: Sequence[Group], load_at_start: str) -> dict[str, Any]:
    """Everything that was measured: every run of every row."""
    return {
        "environment": environment,
        "load_average": {"start": load_at_start, "end": load()},
        "groups": [
            {
                "backward": group.backward,
                "over_lengths": group.over_lengths,
                "conclusion": conclusion(group),
                "rows": [_row(row, group) for row in group.rows],
            }
            for group in groups
        ],
    }


def _row(row: Row, group: Group) -> dict[str, Any]:
    ready = row.ready
    return {
        "program": row.subject.name,
        **row.workload._asdict(),
        "threads": row.threads,
        "skipped": row.skipped,
        "runs": [run._asdict() for run in row.runs],
        "tokens_per_second": row.tokens_per_second if row.runs else None,
        "ratio": ratio(row, group),
        "difference": row.difference,
        "compile_seconds": ready and ready.compile_seconds,
        "temporary_bytes": ready and ready.temporary_bytes,
        "peak_bytes": ready and ready.peak_bytes,
    }
