"""A report as text, as JSON, and as a section of a document."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from seqmodels.parallel.mesh import describe_mesh
from seqmodels.tools._documents import markdown_table
from seqmodels.tools.compile_check.check import Report, gib, merged

NOTES = """\
Memory is what the compiler gives a device of what it can have. Bounds are times of a step on one device, each as if
it were alone: the products that the model asks for at the chip's peak in bfloat16 ("model"), those that the program
computes, with what it computes again ("compute"), its traffic to memory at full bandwidth ("memory"), its collectives
on their links as published ("links"); the instructions one after the other, each at its own bound, collectives beside
what overlaps them ("schedule"); and the compiler's estimate of the instructions ("compiler"), which is known to take
element-wise work for three to four times too slow. None of them is a measurement."""

# What a document of reports begins with.
START = f"# What the TPU compiler says of the shipped configs\n\n{NOTES}\n"


def text(report: Report) -> str:
    """For a person."""
    lines = [
        f"{report.target}: {report.devices} x {report.device_kind}, mesh {describe_mesh(report.mesh)}",
        f"  model        {report.parameters:,} parameters, {report.batch_size} x {report.seq_len} tokens a step, "
        f"{report.model_operations:.3g} FLOPs",
        f"  compiled in  {report.compile_seconds:.0f} s, traced in {report.trace_seconds:.0f} s"
        + (f", with {', '.join(f'{k}={v}' for k, v in report.options.items())}" if report.options else ""),
    ]
    if report.error is not None:
        return "\n".join([*lines, f"  DOES NOT COMPILE: {report.error}"])
    memory, counts = report.memory, report.counts
    verdict = "fits" if report.fits else "DOES NOT FIT"
    kinds = ", ".join(f"{name} {gib(size)}" for name, size in dataclasses.asdict(memory).items())
    bounds = ", ".join(f"{name} {1e3 * seconds:.1f}" for name, seconds in report.bounds.items())
    lines += [
        f"  memory       {gib(memory.total)} of {gib(report.capacity)} GiB a device: {verdict}",
        f"               {kinds}",
        f"  kernels      {', '.join(f'{name} x {n}' for name, n in counts.kernels.items()) or 'none: XLA alone'}",
        f"  bounds       {bounds} ms a step",
    ]
    if counts.unknown_loops:
        lines.append(f"  loops        {counts.unknown_loops} of a length known only as they run, counted once")
    lines.append("  collectives  " + ("of a device in a step:" if counts.collectives else "none"))
    columns = "  {:<22} {:<10} {:<11} {:>7} {:>6} {:>10} {:>11} {:>10} {:>8} {:>9}"
    if counts.collectives:
        head = (
            "kind",
            "over",
            "by",
            "devices",
            "count",
            "overlapped",
            "largest MiB",
            "wire MiB",
            "link ms",
            "hidden ms",
        )
        lines.append(columns.format(*head))
    lines += [columns.format(*row) for row in _collectives(report)]
    return "\n".join(lines)


def _collectives(report: Report) -> list[tuple[str, ...]]:
    return [
        (
            f"{x.kind} {x.dtype}",
            "+".join(x.axes) or "-",
            x.by,
            str(x.devices),
            str(x.count),
            str(x.overlapped),
            f"{x.bytes / 2**20:.2f}",
            f"{x.wire_bytes / 2**20:.1f}",
            f"{1e3 * x.seconds:.2f}",
            f"{1e3 * x.hidden_seconds:.2f}",
        )
        for x in merged(report.counts.collectives)
    ]


def as_json(report: Report) -> dict[str, Any]:
    """All that is known, in plain values."""
    found = {**dataclasses.asdict(report), "fits": report.fits}
    if report.memory is not None:
        found["memory"]["total"] = report.memory.total
    return found


def section(reports: Sequence[Report]) -> list[str]:
    """Paragraphs of markdown: a table of the slices side by side, and every report in full."""
    measures = ("model ms", "compute", "memory", "links", "hidden", "schedule")
    columns = ("slice", "GiB", "of", "arguments", "temporaries", *measures)
    rows = []
    for x in reports:
        if x.memory is None:
            rows.append((x.target, "-", gib(x.capacity), *["-"] * (len(columns) - 3)))
            continue
        arguments = x.memory.total - x.memory.temporaries - x.memory.code
        bounds = [f"{1e3 * x.bounds[name]:.0f}" for name in ("model", "compute", "memory", "links")]
        times = (
            *bounds,
            f"{1e3 * sum(y.hidden_seconds for y in x.counts.collectives):.0f}",
            f"{1e3 * x.bounds['schedule']:.0f}",
        )
        sizes = (gib(x.memory.total), gib(x.capacity), gib(arguments), gib(x.memory.temporaries))
        rows.append((x.target, *sizes, *times))
    return [markdown_table(columns, rows), *(f"```\n{text(x)}\n```" for x in reports)]
