"""python -m seqmodels.tools.benchmark --suite gpu: the command line."""

import argparse
import ctypes
import importlib.util
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from seqmodels.errors import InputError
from seqmodels.tools._documents import check_writable, put_section
from seqmodels.tools.benchmark.cases import CASES, Workload, pairs
from seqmodels.tools.benchmark.gpu import report
from seqmodels.tools.benchmark.gpu.suite import Protocol, Row, Suite
from seqmodels.tools.benchmark.report import heading

NAME = "python -m seqmodels.tools.benchmark --suite gpu"
NEEDED = (
    "--suite gpu needs an NVIDIA GPU with its driver, jax for CUDA (pip install -e '.[cuda]') and, for the peers, "
    "torch for CUDA, triton and flash-linear-attention"
)
DESCRIPTION = """\
Measure operators on an NVIDIA GPU, forward and forward + backward, beside the Triton kernels of other libraries:
XLA's program of ours, our kernel (pallas_gpu) where the operator has one, and the peers that are installed, on the same
numbers in one run. Peers are named where they are called, in seqmodels/tools/benchmark/gpu/peers.py:
flash-linear-attention, mamba_ssm (of which an unpacked source on PYTHONPATH is enough), mlstm_kernels, torch."""
EPILOG = f"""\
{report.LEGEND}

A program that is not there, fails or gives no answer is a cell with its reason. --json keeps, after every row, all
measurements and the error of every gradient.

exit codes:
  0   done
  1   a defect in the code
  2   an input is wrong, or no GPU is there; one line says which"""
# linear_attention with its normaliser only where it is asked for: the same kernels, and a division.
DEFAULT = (
    *(("linear_attention", case) for case in CASES["linear_attention"] if case != "normalized"),
    *(("delta_rule", case) for case in CASES["delta_rule"]),
    *(("ssd", case) for case in CASES["ssd"]),
)


def main(argv: list[str]) -> None:
    arguments = _parser().parse_args(argv)
    workloads = _plan(arguments)
    passes = (False,) if arguments.forward else (False, True)
    for name in ("json", "markdown"):
        check_writable(name, getattr(arguments, name))
    if arguments.platform == "cuda":
        check_gpu()
    environment = _environment()
    protocol = Protocol(
        tuple(arguments.libraries), arguments.platform, arguments.repeats, arguments.limit, arguments.stop_after
    )
    rows: list[Row] = []
    try:
        suite = Suite(protocol)
    except RuntimeError as error:
        raise InputError(f"{error}; {NEEDED}") from error
    # In a file, a line of progress after each row is enough.
    seen = sys.stderr.isatty()
    rate = {} if seen else {"mininterval": 30}
    with suite, tqdm(total=len(workloads) * len(passes), unit="row", file=sys.stderr, **rate) as progress:
        about = f"{suite.device}\n{heading(environment)}"
        tqdm.write(f"{about}\n\n{report.LEGEND}", file=sys.stdout)
        table, case = None, None
        for row in suite.rows(workloads, passes, partial(progress.set_postfix_str, refresh=seen)):
            rows.append(row)
            if case != (row.workload.op, row.workload.case):
                _say_notes(table)
                table, case = report.Table(row.workload), (row.workload.op, row.workload.case)
                tqdm.write(f"\n{table.head}", file=sys.stdout)
            tqdm.write(table.line(row), file=sys.stdout)
            sys.stdout.flush()
            progress.update()
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(report.as_json(environment, suite.device, rows), indent=1) + "\n")
        _say_notes(table)
    if arguments.markdown is not None:
        command = " ".join([NAME, *argv])
        put_section(arguments.markdown, "gpu", report.section(command, about, rows), start=report.START)


def _environment() -> dict[str, Any]:
    """`environment` of training/run_directory.py, from its file alone: the package around it imports what training
    needs, which a machine for measuring may not have."""
    package = importlib.util.find_spec("seqmodels.training")
    file = Path(package.submodule_search_locations[0]) / "run_directory.py"
    spec = importlib.util.spec_from_file_location("run_directory", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.environment()


def _say_notes(table: report.Table | None) -> None:
    if table is not None and table.notes:
        tqdm.write(table.notes, file=sys.stdout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=NAME,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = ", ".join(f"{op} {case}" for op, case in DEFAULT)
    parser.add_argument("--op", nargs="+", help=f"operators, or all (default: {default})")
    parser.add_argument("--case", nargs="+", metavar="CASE", help="default: all of the operators'")
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768], metavar="T")
    parser.add_argument(
        "--widths", nargs="+", type=int, default=[64, 128], metavar="D", help="channels of keys and values"
    )
    parser.add_argument("--tokens", type=int, default=32768, metavar="N", help="per batch: N / T sequences of T tokens")
    parser.add_argument("--heads", type=int, default=16, metavar="H")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="decays are in float32")
    parser.add_argument("--forward", action="store_true", help="no backward passes")
    parser.add_argument(
        "--libraries", nargs="+", choices=("jax", "torch"), default=["jax", "torch"], help="whose peers are measured"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="measurements, each of about 50 ms")
    parser.add_argument(
        "--limit", type=float, default=180.0, metavar="S", help="seconds for preparing or measuring a program"
    )
    parser.add_argument("--stop_after", type=float, metavar="S", help="seconds after which nothing more is begun")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement to FILE, after each row")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the tables into a section of this file")
    # For tests: everything but the device's clock.
    parser.add_argument("--platform", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    return parser


def _plan(arguments: argparse.Namespace) -> list[Workload]:
    """The workloads, in order. Everything that can be wrong about the command line is found here."""
    for name in ("tokens", "heads", "repeats", "limit", "stop_after"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name} is {value:g}; expected more than 0")
    for name in ("lengths", "widths"):
        if min(getattr(arguments, name)) < 1:
            raise InputError(f"--{name} has {min(getattr(arguments, name))}; expected at least 1")
    for length in arguments.lengths:
        if arguments.tokens % length:
            raise InputError(f"--lengths has {length}, which does not divide {arguments.tokens} tokens (--tokens)")
    found = list(DEFAULT)
    if arguments.op or arguments.case:
        found = pairs(arguments.op or list(dict.fromkeys(op for op, _ in DEFAULT)), arguments.case)
    return [
        Workload(op, case, arguments.tokens // length, length, arguments.heads, width, width, arguments.dtype)
        for op, case in found
        for width in arguments.widths
        for length in arguments.lengths
    ]


def check_gpu() -> None:
    """Raise InputError where the driver finds no GPU. Asks the driver alone, which takes no memory of the device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise InputError(f"{NEEDED}; here is no driver (libcuda.so.1)") from None
    count = ctypes.c_int(0)
    error = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if error or not count.value:
        reason = f"its driver reports error {error}" if error else "its driver finds no device"
        raise InputError(f"{NEEDED}; {reason}")
