"""python -m seqmodels.tools.kernel_report: the command line."""

import argparse
import importlib.util
import itertools
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, InputError, nearest, run_main
from seqmodels.tools._documents import check_writable, markdown_table, put_section
from seqmodels.tools.compile_check.chips import CHIPS
from seqmodels.tools.kernel_report import hopper, report
from seqmodels.tools.kernel_report.cases import CASES, DIRECTIONS, GPU_KERNEL, KERNEL, REPORTED, XLA, Request, size
from seqmodels.tools.kernel_report.figures import TIMING
from seqmodels.tools.kernel_report.processes import compile_all, compile_on_hopper
from seqmodels.tools.kernel_report.programs import FunctionRequest
from seqmodels.tools.survey import plots
from seqmodels.tools.survey.report import as_text

DESCRIPTION = """\
What the TPU compiler says of our kernels, on any Linux machine and without a TPU: cycles and steps, the time estimated
from them, MXU use, spilled registers, VMEM and HBM, beside the same operator by XLA alone and beside the bound. With
--function, of any function: for those who write kernels. Needs the compiler: pip install -e '.[tpu]'.

With --generations h100: registers, spills and shared memory of each of our kernels for Hopper GPUs, without a GPU.
Needs JAX's CUDA plugin, which pip install -e '.[dev]' brings."""

EPILOG = """\
examples:
  python -m seqmodels.tools.kernel_report --cases linear_attention --lengths 8192 --generations v5e v6e
  python -m seqmodels.tools.kernel_report --markdown docs/kernels.md --plot docs/kernels.png
  python -m seqmodels.tools.kernel_report --function my_kernels.py:forward --set chunk=256 \\
      --arguments 'bf16[1,8192,2048] bf16[1,8192,2048] bf16[1,8192,2048] f32[1,8192,16]' --generations v5e v6e
  python -m seqmodels.tools.kernel_report --cases linear_attention --lengths 8192 --generations h100

figures:
  time      of a kernel: steps of its grid, each the cycles of its schedule or the time its copies take, whichever is
            longer; at least its bytes at the bandwidth that copies reach. Of an instruction of XLA likewise. Good to 5
            to 15 % on v4 and v5e, where published measurements were compared; on the others not compared
  bound     the larger of the operations that the algorithm needs at the chip's peak in bfloat16, and of arguments and
            results, once, at full bandwidth. Of a --function: the operations that it asks for
  cycles    of one step's schedule, a `pl.when` by how often it holds where that depends on the grid alone, else as if
            it held always
  simulated cycles of a whole kernel by libtpu's simulator, with --simulate, on v5e, v5p and v6e

A device of v4 and v5p has two cores, which share a grid with a "parallel" axis; one of TPU7x is one of a chip's two.
A kernel's own copies between memories, and waits for semaphores, are not in its time.

exit codes:
  0   done; an operator without a kernel is a line in the report
  1   a program was not compiled, or a defect
  2   an input is wrong; one line says which"""

PROGRAM = "python -m seqmodels.tools.kernel_report"


def main(argv: list[str]) -> int:
    options = _parser().parse_args(argv)
    _check(options)
    for name in ("json", "markdown", "plot"):
        check_writable(name, getattr(options, name))
    if options.plot is not None:
        plots.check(options.plot)
    on_gpu = options.generations == [hopper.GENERATION]
    if on_gpu and not hopper.has_compiler():
        raise InputError(
            "the GPU compiler is not installed; expected JAX's CUDA plugin, as `pip install -e '.[dev]'` does"
        )
    if not on_gpu and importlib.util.find_spec("libtpu") is None:
        raise InputError("the TPU compiler is not installed; expected libtpu, as `pip install -e '.[tpu]'` brings it")
    if options.list:
        print("\n".join(CASES))
        return EXIT_DONE
    if on_gpu:
        return _report_hopper(options, argv)
    if options.function:
        return _report_function(options)
    return _report_cases(options, argv)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=PROGRAM, description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    some = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument(
        "--generations", default=list(CHIPS), **some, help=f"of {', '.join(CHIPS)}; or {hopper.GENERATION}"
    )
    parser.add_argument(
        "--directions",
        **some,
        help="forward; backward, from what the forward pass kept; both, outputs and gradients (default: forward and"
        " backward, of a --function forward)",
    )
    parser.add_argument("--simulate", action="store_true", help="ask libtpu's simulator too, which may take minutes")
    parser.add_argument("--kernels_only", action="store_true", help="without XLA; a --function in a line a kernel")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")

    cases = parser.add_argument_group("our operators")
    cases.add_argument("--cases", **some, help="of --list, or operators, for all of theirs (default: all)")
    cases.add_argument("--list", action="store_true", help="print the cases")
    cases.add_argument("--tokens", type=int, default=131072, metavar="N", help="times heads (default: %(default)s)")
    cases.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 65536], metavar="T", help="of a sequence")
    cases.add_argument("--heads", type=int, default=16, metavar="H", help="at most so many (default: %(default)s)")
    cases.add_argument("--channels", type=int, default=128, metavar="K", help="of keys, values (default: %(default)s)")
    cases.add_argument(
        "--sizes",
        **{**some, "metavar": "CHUNK:KIB"},
        help="try kernels with chunks of so many positions and steps that"
        " read so much of an operand, instead of what is chosen for the generation",
    )
    cases.add_argument("--markdown", type=Path, metavar="FILE", help="put the tables into a section of this file")
    cases.add_argument("--plot", type=Path, metavar="FILE", help="draw a picture (.png, .svg, .pdf)")

    function = parser.add_argument_group("any function")
    function.add_argument("--function", metavar="PLACE", help="MODULE:FUNCTION or FILE.py:FUNCTION")
    function.add_argument("--arguments", metavar="SHAPES", help="of its arrays, as 'bf16[1,8192,2048] f32[16]'")
    function.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a keyword; repeatable")
    return parser


def _check(options: argparse.Namespace) -> None:
    for name, valid in (("generations", [*CHIPS, hopper.GENERATION]), ("directions", DIRECTIONS)):
        for value in getattr(options, name) or []:
            if value not in valid:
                raise InputError(f"--{name} has {value!r}, which does not exist; {nearest(value, valid)}")
    if hopper.GENERATION in options.generations:
        if options.generations != [hopper.GENERATION]:
            raise InputError(
                f"--generations has {hopper.GENERATION} beside TPUs, whose figures are others; expected one"
            )
        for name in ("simulate", "sizes", "plot"):
            if getattr(options, name):
                raise InputError(f"--{name} is for TPUs; expected it without {hopper.GENERATION}")
    for name in ("tokens", "heads", "channels"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}; expected at least 1")
    if min(options.lengths) < 1:
        raise InputError(f"--lengths has {min(options.lengths)}; expected at least 1")
    if options.function and options.arguments is None:
        raise InputError("--function needs --arguments, the shapes of its arrays, as 'bf16[1,8192,2048] f32[16]'")
    if options.function is None and (options.arguments or options.set):
        raise InputError("--arguments and --set are those of a --function; expected one")
    for name in ("cases", "sizes", "markdown", "plot"):
        if options.function and getattr(options, name):
            raise InputError(f"--{name} is for our operators; expected it without --function")
    for each in options.set:
        if not each.partition("=")[0] or "=" not in each:
            raise InputError(f"--set {each!r}: expected NAME=VALUE")


def _report_function(options: argparse.Namespace) -> int:
    keywords = dict(each.split("=", 1) for each in options.set)
    directions = options.directions or ["forward"]
    requests = [FunctionRequest(options.function, options.arguments, keywords, x) for x in directions]
    found = []
    for generation in options.generations:
        simulate = options.simulate and TIMING[generation].simulator
        for request, result in zip(requests, compile_all(generation, requests, simulate=simulate)):
            if result.get("input_error"):
                raise InputError(result["error"])
            title = f"{request.function}, {request.direction}"
            print(report.program_text(generation, title, result, kernels_only=options.kernels_only), flush=True)
            found.append({"generation": generation, **request._asdict(), **result})
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return EXIT_DEFECT if any("error" in each for each in found) else EXIT_DONE


def _report_cases(options: argparse.Namespace, argv: list[str]) -> int:
    # Only this needs to know what it ran on, and the import takes seconds.
    from seqmodels.training.run_directory import environment

    directions = options.directions or REPORTED
    sizes = [size(options.tokens, length, options.heads, options.channels) for length in options.lengths]
    tried = [_sizes(each) for each in options.sizes or []] or [None]
    if options.sizes:
        options.kernels_only = True
    wanted = [
        Request(case, direction, KERNEL, shape, sizes=each)
        for case, shape, direction, each in itertools.product(_chosen_cases(options.cases), sizes, directions, tried)
    ]
    conditions, rows = environment(), []
    total = len(options.generations) * len(wanted) * (1 if options.kernels_only else 2)
    with tqdm(total=total, unit="program", file=sys.stderr) as progress:
        for generation in options.generations:
            rows += _rows(generation, wanted, options, progress)
            if options.json is not None:
                whole = {"environment": conditions, "rows": [row._asdict() for row in rows]}
                options.json.write_text(json.dumps(whole, indent=1) + "\n")
    print(report.text(rows))
    if options.markdown is not None:
        versions = ", ".join(f"{x} {conditions['packages'].get(x)}" for x in ("jax", "libtpu"))
        heading = f"`{PROGRAM} {shlex.join(argv)}`, {conditions['time'][:10]}, {versions}"
        put_section(options.markdown, "kernels", report.section(rows, heading), start=report.START)
    if options.plot is not None:
        report.draw(rows, options.plot)
    results = [x for row in rows for x in (row.kernel, row.xla) if x is not None]
    failed = any("error" in x and not x.get("input_error") for x in results)
    return EXIT_DEFECT if failed else EXIT_DONE


def _report_hopper(options: argparse.Namespace, argv: list[str]) -> int:
    from seqmodels.training.run_directory import environment

    if options.function:
        keywords = dict(each.split("=", 1) for each in options.set)
        requests = [
            FunctionRequest(options.function, options.arguments, keywords, x) for x in options.directions or ["forward"]
        ]
        wanted = [(f"{x.function}, {x.direction}", "", x) for x in requests]
    else:
        sizes = [size(options.tokens, length, options.heads, options.channels) for length in options.lengths]
        directions = options.directions or REPORTED
        wanted = [
            (f"{case}, {direction}", f"{shape.length:,}", Request(case, direction, GPU_KERNEL, shape))
            for case, shape, direction in itertools.product(_chosen_cases(options.cases), sizes, directions)
        ]
    found = []
    for program, tokens, request in tqdm(wanted, unit="program", file=sys.stderr):
        found.append((program, tokens, compile_on_hopper(request)))
    table, missing = report.hopper_table(found), report.hopper_missing(found)
    print("\n\n".join([*([as_text(table)] if table.rows else []), *missing]))
    conditions = environment()
    if options.json is not None:
        rows = [{"program": program, **request._asdict(), **x} for (program, _, x), (*_, request) in zip(found, wanted)]
        options.json.write_text(json.dumps({"environment": conditions, "rows": rows}, indent=1) + "\n")
    if options.markdown is not None:
        heading = f"`{PROGRAM} {shlex.join(argv)}`, {conditions['time'][:10]}, jax {conditions['packages'].get('jax')}"
        lines = "\n".join(f"- {line}" for line in missing)
        parts = [report.HOPPER_NOTES, heading, markdown_table(table.columns, table.rows), *([lines] if lines else [])]
        put_section(options.markdown, "kernels for h100", parts, start=report.START)
    failed = any("error" in x and not x.get("input_error") for *_, x in found)
    return EXIT_DEFECT if failed else EXIT_DONE


def _sizes(text: str) -> tuple[int, int]:
    chunk, _, kib = text.partition(":")
    if not (chunk.isdecimal() and kib.isdecimal() and int(chunk) and int(kib)):
        raise InputError(f"--sizes has {text!r}; expected positions and KiB, as 128:1024")
    return int(chunk), int(kib)


def _chosen_cases(chosen: Sequence[str] | None) -> list[str]:
    """By their names, or by those of operators, which stand for all of an operator's."""
    operators = {case.partition(",")[0] for case in CASES}
    for name in chosen or []:
        if name not in operators | set(CASES):
            raise InputError(f"--cases has {name!r}, which does not exist; {nearest(name, operators | set(CASES))}")
    return [case for case in CASES if not chosen or case in chosen or case.partition(",")[0] in chosen]


def _rows(generation: str, wanted: Sequence[Request], options: argparse.Namespace, progress: tqdm) -> list[report.Row]:
    """Of one generation. First the kernels of all, which the simulator may follow, then what XLA makes of them, which
    it would take hours for."""
    results: dict[str, list] = {}
    for backend in [KERNEL] if options.kernels_only else [KERNEL, XLA]:
        requests = [request._replace(backend=backend) for request in wanted]
        simulate = options.simulate and backend == KERNEL and TIMING[generation].simulator
        titles = [f"{x.name}, {x.size.length:,} tokens, {x.direction}, {backend}" for x in requests]
        progress.set_postfix_str(f"{generation} {titles[0]}")
        found = results[backend] = []
        compiled = compile_all(generation, requests, simulate=simulate)
        for title, following, result in zip(titles, [*titles[1:], ""], compiled):
            found.append(result)
            progress.update()
            progress.set_postfix_str(f"{generation} {following}")
            if not result.get("input_error"):
                tqdm.write(report.program_text(generation, title, result, most=0), file=sys.stderr)
    xla = results.get(XLA, [None] * len(wanted))
    return [
        report.Row(request.name, request.direction, request.size.length, generation, *both)
        for request, *both in zip(wanted, results[KERNEL], xla)
    ]


if __name__ == "__main__":
    # So that a worker is ended and its folder removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run_main(main)
