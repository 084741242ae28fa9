"""What was found, as text, as tables of a document, and as a picture."""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seqmodels.tools._documents import markdown_table
from seqmodels.tools.survey.report import as_text
from seqmodels.tools.survey.views import Table

NOTES = """\
Nothing here was measured: figures are those of the TPU compiler's schedules. A time is that of a whole program on one
device, the operator with what stands around its kernels; "bound" is the larger of the operations that the algorithm
needs at the chip's peak and of its arguments and results, once, at the bandwidth of its memory; "XLA" is the same
operator without kernels, its instructions one after the other. "backward" starts from what the forward pass kept. A
step is a step of a kernel's grid: cycles of its schedule, conditions by how often they hold, and vector registers that
it spills and fills. "limit" is what a kernel's time comes from: its schedule, the latency of its copies, or the
memory's bandwidth."""

HOPPER_NOTES = """\
Kernels for Hopper GPUs, as the compiler makes them for an H100: registers of a thread, of which there are at most 255;
bytes that a thread writes to memory and reads back for want of registers, in all its code; shared memory and threads of
a block, and how many blocks a multiprocessor holds at a time. There are no times in it."""

START = f"# What the TPU compiler says of our kernels\n\n{NOTES}\n"

Result = dict[str, Any]


class Row(NamedTuple):
    """A case at a length on a generation. kernel, xla: results of its two programs, see `worker`; None where it was
    not asked for."""

    case: str
    direction: str
    length: int
    generation: str
    kernel: Result
    xla: Result | None

    @property
    def name(self) -> str:
        return f"{self.case}, {self.direction}"

    def seconds(self, backend: str) -> float | None:
        """"kernel" or "xla"; None where the program was not compiled."""
        result = getattr(self, backend)
        return result["program"]["seconds"] if result and "program" in result else None

    @property
    def bound(self) -> float | None:
        """Seconds."""
        results = [x for x in (self.kernel, self.xla) if x and "bound" in x]
        return results[0]["bound"]["seconds"] if results else None


def program_text(generation: str, title: str, result: Result, *, kernels_only: bool = False, most: int = 8) -> str:
    """Of one program: a line for it, some for each of its kernels, and its longest instructions.

    kernels_only: a line for each kernel and nothing else. most: instructions to show, of those that take half a percent
    of the time.
    """
    if "error" in result:
        return f"{generation}  {title}: NOT COMPILED\n{_indented(result['message'])}"
    program, bound = result["program"], result["bound"]
    if kernels_only:
        return "\n".join(_kernel_line(generation, k) for k in program["kernels"]) or f"{generation}  no kernels"
    share = bound["seconds"] / program["seconds"] if program["seconds"] else 0.0
    lines = [
        f"{generation}  {title}: {_us(program['seconds'])} us; bound {_us(bound['seconds'])} us by {bound['limit']} "
        f"({share:.0%} of the time); compiled in {result['compile_seconds']:.1f} s",
        *(line for k in program["kernels"] for line in _kernel_lines(k)),
    ]
    shown = [x for x in program["parts"] if x["seconds"] >= 0.005 * program["seconds"]][:most]
    if any(x["limit"] != "kernel" for x in shown):
        lines.append("  the longest instructions:")
        lines += [
            f"    {_us(x['seconds']):>9} us x {x['times']:<5} {x['limit']:<9} {x['name'][:40]:<40}  {x['source'][-46:]}"
            for x in shown
        ]
    if program["unknown_loops"]:
        lines.append(f"  {program['unknown_loops']} loops of unknown length count once")
    return "\n".join(lines)


def _kernel_line(generation: str, k: Result) -> str:
    simulated = f", simulated {k['simulated_cycles']:,}" if k["simulated_cycles"] else ""
    return (
        f"{generation}  {k['name']}: {_us(k['seconds'])} us by {k['limit']}; "
        f"{k['cycles']:,.0f} cycles x {k['steps']:,} steps / {k['cores']}{simulated}; "
        f"MXU {k['mxu']:.1%}, spills {k['spills']:,.0f}, fills {k['fills']:,.0f}, "
        f"VMEM {_mib(k['vmem'])} MiB, HBM {_mib(k['traffic'])} MiB" + "".join(f"; {x}" for x in k["remarks"])
    )


def _kernel_lines(k: Result) -> list[str]:
    cores = f" on {k['cores']} cores" if k["cores"] > 1 else ""
    calls = f" x {k['times']}" if k["times"] > 1 else ""
    steps = "x".join(map(str, k["grid"])) or "1"
    most = f" ({k['cycles_at_most']:,.0f} if all conditions held)" if k["cycles_at_most"] > k["cycles"] else ""
    simulated = f", simulated {k['simulated_cycles']:,} cycles" if k["simulated_cycles"] else ""
    slots = " ".join(f"{name} {use:.0%}" for name, use in k["slots"].items())
    return [
        f"  kernel {k['name']}{calls}: {_us(k['seconds'])} us by {k['limit']}{simulated}",
        f"    grid {steps} = {k['steps']:,} steps{cores}, {k['cycles']:,.0f} cycles a step{most}, "
        f"its inputs after {k['latency']:,.0f}; {k['entry_cycles']:,.0f} cycles around the grid",
        f"    MXU {k['mxu']:.1%} of its peak; slots filled: {slots}",
        f"    a step spills {k['spills']:,.0f} and fills {k['fills']:,.0f} registers; VMEM {_mib(k['vmem'])} MiB; "
        f"HBM {_mib(k['traffic'])} MiB; {k['operations'] / 1e9:,.2f} GFLOPs",
        *(f"    {remark}" for remark in k["remarks"]),
    ]


def programs_table(rows: Sequence[Row]) -> Table:
    """A line for each row: its times beside the bound. Microseconds."""
    columns = ("program", "tokens", "TPU", "kernel us", "bound us", "of bound", "XLA us", "XLA / kernel")
    return Table("times of programs, estimated", columns, [_cells(row) for row in rows])


def _cells(row: Row) -> tuple[str, ...]:
    kernel, xla, bound = row.seconds("kernel"), row.seconds("xla"), row.bound
    return (
        row.name,
        f"{row.length:,}",
        row.generation,
        "-" if kernel is None else _us(kernel),
        "-" if bound is None else _us(bound),
        f"{kernel / bound:.2f}" if kernel and bound else "-",
        "-" if xla is None else _us(xla),
        f"{xla / kernel:.2f}" if kernel and xla else "-",
    )


def kernels_table(rows: Sequence[Row]) -> Table:
    """A line for each kernel of each row's program."""
    columns = ("kernel of", "tokens", "TPU", "us", "limit", "steps", "cores", "cycles a step")
    columns += ("simulated", "MXU %", "spills", "fills", "VMEM MiB", "HBM MiB")
    found = []
    for row in rows:
        for k in row.kernel.get("program", {}).get("kernels", []):
            calls = f" x {k['times']}" if k["times"] > 1 else ""
            simulated = "-" if k["simulated_cycles"] is None else f"{k['simulated_cycles']:,}"
            found.append((
                f"{row.case}: {k['name']}{calls}",
                f"{row.length:,}",
                row.generation,
                _us(k["seconds"]),
                k["limit"],
                f"{k['steps']:,}",
                str(k["cores"]),
                f"{k['cycles']:,.0f}",
                simulated,
                f"{100 * k['mxu']:.1f}",
                f"{k['spills']:,.0f}",
                f"{k['fills']:,.0f}",
                _mib(k["vmem"]),
                _mib(k["traffic"]),
            ))  # fmt: skip
    return Table("kernels", columns, found)


def missing(rows: Iterable[Row]) -> list[str]:
    """A line for each reason why there is no kernel or no program, with what it is the reason for."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        for what, result in (("", row.kernel), ("by XLA: ", row.xla)):
            if result and "error" in result:
                found.setdefault(what + result["error"], []).append(row)
    lines = []
    for reason, there in found.items():
        places = zip(*((row.case, row.direction, f"{row.length:,}", row.generation) for row in there))
        lines.append(f"{reason} ({'; '.join(', '.join(dict.fromkeys(each)) for each in places)})")
    return lines


def hopper_table(found: Sequence[tuple[str, str, Result]]) -> Table:
    """A line for each kernel of each program. found: programs, their tokens, and {"kernels": ...} or {"error": ...}."""
    columns = ("kernel of", "tokens", "registers", "spilled bytes", "shared KiB", "threads", "blocks a multiprocessor")
    lines = [
        (
            f"{program}: {i + 1} {k['name']}",
            tokens,
            str(k["registers"]),
            f"{k['spills']:,}",
            f"{k['shared_memory'] / 1024:.1f}",
            str(k["threads"]),
            str(k["blocks"]),
        )
        for program, tokens, result in found
        for i, k in enumerate(result.get("kernels", []))
    ]
    return Table("kernels for an H100", columns, lines)


def hopper_missing(found: Sequence[tuple[str, str, Result]]) -> list[str]:
    """A line for each reason why a program was not compiled."""
    reasons: dict[str, list[str]] = {}
    for program, tokens, result in found:
        if "error" in result:
            reasons.setdefault(result["error"], []).append(f"{program}, {tokens}" if tokens else program)
    return [f"{reason} ({'; '.join(programs)})" for reason, programs in reasons.items()]


def text(rows: Sequence[Row]) -> str:
    tables = [table for table in (programs_table(rows), kernels_table(rows)) if table.rows]
    return "\n\n".join([*map(as_text, tables), *(["\n".join(missing(rows))] if missing(rows) else [])])


def section(rows: Sequence[Row], heading: str) -> list[str]:
    """Paragraphs of markdown. heading: what was run, when, and by which versions."""
    tables = [table for table in (programs_table(rows), kernels_table(rows)) if table.rows]
    lines = "\n".join(f"- {line}" for line in missing(rows))
    return [heading, *(markdown_table(table.columns, table.rows) for table in tables), *([lines] if lines else [])]


def draw(rows: Sequence[Row], file: Path) -> None:
    """Times over their bound: a panel for each direction and generation, a line for each case and length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    directions = list(dict.fromkeys(row.direction for row in rows))
    generations = list(dict.fromkeys(row.generation for row in rows))
    names = list(dict.fromkeys((row.case, row.length) for row in rows))
    size = (3 + 2.6 * len(generations), 1.2 + (0.9 + 0.22 * len(names)) * len(directions))
    shape = {"squeeze": False, "sharex": True, "sharey": True, "figsize": size, "layout": "constrained"}
    figure, axes = pyplot.subplots(len(directions), len(generations), **shape)
    looks = {"kernel": {"color": "tab:blue", "marker": "o"}, "xla": {"color": "tab:orange", "marker": "s"}}
    for (i, direction), (j, generation) in itertools.product(enumerate(directions), enumerate(generations)):
        ax, here = axes[i][j], [row for row in rows if (row.direction, row.generation) == (direction, generation)]
        for backend, label in (("kernel", "kernel"), ("xla", "XLA")):
            shown = [row for row in here if row.seconds(backend) and row.bound]
            times = [row.seconds(backend) / row.bound for row in shown]
            places = [names.index((row.case, row.length)) for row in shown]
            ax.plot(times, places, linestyle="", label=label, **looks[backend])
        ax.axvline(1, color="black", linewidth=0.8)
        ax.set(xscale="log", title=f"{generation}, {direction}", ylim=(len(names) - 0.5, -0.5))
        ax.set_yticks(range(len(names)), [f"{case}, {length:,}" for case, length in names], fontsize=7)
        ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        ax.xaxis.set_minor_locator(ticker.NullLocator())
        ax.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)
    figure.supxlabel("estimated time over the bound", fontsize=9)
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}"


def _mib(size: float) -> str:
    return f"{size / 2**20:,.2f}"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.strip().splitlines())
