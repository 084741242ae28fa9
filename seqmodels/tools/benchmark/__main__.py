"""python -m seqmodels.tools.benchmark: the command line."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from seqmodels.errors import InputError, nearest, run_main
from seqmodels.tools._documents import check_writable, put_section
from seqmodels.tools.benchmark import report
from seqmodels.tools.benchmark.cases import CASES, Workload, pairs
from seqmodels.tools.benchmark.compare import Protocol, compare
from seqmodels.tools.benchmark.gpu import command as gpu
from seqmodels.tools.benchmark.messages import Subject
from seqmodels.tools.benchmark.peers import PEERS, peers
from seqmodels.tools.benchmark.report import Group

DESCRIPTION = """\
Measure operators on this machine's CPU against something measured beside them.

  forms     one form against the definition, token by token: how much the chunked form saves
  lengths   one form from short to long sequences at equal tokens per batch: whether the cost per token stays
  peers     ours against functions of other libraries that are installed, after comparing their values

On a GPU, beside the Triton kernels of other libraries: --suite gpu, and --suite gpu --help.

Every program runs in a process of its own, held to --threads threads; programs of one table take turns. Times are
CPU time with one thread, which other processes hardly disturb, and wall time with more; compilation is apart."""

COLUMNS = """\
columns:
  ms          one call: the best of the runs; noise is how far the median lies above it
  ratio       time for as many tokens, over that of the first line
  peak MiB    growth of resident memory during a call, inputs apart (Linux)
  XLA MiB     what XLA plans to use beside inputs and outputs
  difference  from the first line: the largest of max |a - b| / max |b| over outputs and gradients; - for a peer
              that computes something else, which a line below says

A program that is predicted to take over --limit CPU seconds for one call, from runs at a sixteenth and a quarter of
the length, is skipped (not in the view lengths), and so is a peer whose library is not installed. Both are lines in
the table."""

VIEWS = {
    "forms": (
        "one form against the definition, token by token",
        "Wanted of linear attention at 8,192 tokens: a ratio of at least 5 forward, 10 with --backward.",
    ),
    "lengths": (
        "one form from short to long sequences",
        "Wanted of linear attention from 1,024 to 32,768 tokens: the most over the least speed at most 1.15.",
    ),
    "peers": (
        "ours against functions of other libraries",
        "Peers are named where they are called, in seqmodels/tools/benchmark/peers.py: fla (flash-linear-attention\n"
        "with triton 3.6.0, so that it imports without a GPU), transformers, mlstm_kernels, recurrentgemma,\n"
        "titans-pytorch, ejkernel, torch and jax. tests/agreement says how to install them.",
    ),
}


def main(argv: list[str]) -> None:
    suite = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    suite.add_argument("--suite", choices=("cpu", "gpu"), default="cpu")
    chosen, argv = suite.parse_known_args(argv)
    if chosen.suite == "gpu":
        return gpu.main(argv)
    _main(argv)


def _main(argv: list[str]) -> None:
    """The suite for a CPU."""
    arguments = _parser().parse_args(argv)
    groups = _plan(arguments)
    for name in ("json", "markdown"):
        check_writable(name, getattr(arguments, name))
    # After the command line is known to be right: this import takes seconds.
    from seqmodels.training.run_directory import environment

    environment = environment()
    load_at_start = report.load()
    print(report.heading(environment))
    done = []
    with tqdm(groups, unit="table", file=sys.stderr) as progress:
        for planned in progress:
            rows = compare(
                planned.programs,
                planned.protocol,
                values=not planned.over_lengths,
                progress=progress.set_postfix_str,
            )
            done.append(Group(planned.protocol.backward, planned.over_lengths, rows))
            tqdm.write(f"\n{report.table(done[-1])}", file=sys.stdout)
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(report.as_json(environment, done, load_at_start), indent=1) + "\n")
    print(f"\nload average at the end {report.load()}")
    if arguments.markdown is not None:
        command = " ".join(["python -m seqmodels.tools.benchmark", *argv])
        parts = report.section(arguments.view, command, report.heading(environment), done)
        put_section(arguments.markdown, arguments.view, parts, start=report.START)


class _Planned(NamedTuple):
    """Programs to measure beside each other."""

    programs: list[tuple[Subject, Workload]]
    protocol: Protocol
    over_lengths: bool


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m seqmodels.tools.benchmark", description=DESCRIPTION, formatter_class=raw
    )
    views = parser.add_subparsers(dest="view", required=True, metavar="{forms,lengths,peers}")
    for view, (summary, more) in VIEWS.items():
        over_lengths = view == "lengths"
        sub = views.add_parser(view, help=summary, description=more, epilog=COLUMNS, formatter_class=raw)
        lengths = {"forms": [8192], "lengths": [1024 << i for i in range(6)], "peers": [2048, 8192]}[view]
        sub.add_argument(
            "--op", nargs="+", default=["linear_attention"], help="operators, or all (default: linear_attention)"
        )
        sub.add_argument("--case", nargs="+", metavar="CASE", help=f"{_known_cases()}; default: all of the operators'")
        sub.add_argument("--form", default="chunked", help="form of ours (default: %(default)s)")
        sub.add_argument("--chunk_size", nargs="+", type=int, metavar="C", help="measure these chunk sizes")
        sub.add_argument("--lengths", nargs="+", type=int, default=lengths, metavar="T", help=f"default: {lengths}")
        size = sub.add_mutually_exclusive_group()
        size.add_argument(
            "--batch", type=int, metavar="B", help="sequences" + ("" if over_lengths else " (default: 1)")
        )
        many = " (default: 32768)" if over_lengths else ""
        size.add_argument("--tokens", type=int, metavar="N", help=f"tokens per batch: N / T sequences{many}")
        sub.add_argument("--heads", type=int, default=8, metavar="H", help="default: %(default)s")
        sub.add_argument(
            "--key_dim", type=int, default=64, metavar="K", help="channels of a key (default: %(default)s)"
        )
        sub.add_argument("--value_dim", type=int, default=64, metavar="V", help="of a value (default: %(default)s)")
        sub.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="default: %(default)s")
        sub.add_argument("--backward", action="store_true", help="measure forward + backward too")
        sub.add_argument("--threads", type=int, default=1, metavar="N", help="default: %(default)s")
        sub.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each (default: %(default)s)")
        sub.add_argument(
            "--limit",
            type=float,
            default=20.0,
            metavar="S",
            help="CPU seconds for a program (default: %(default)g)",
        )
        sub.add_argument("--json", type=Path, metavar="FILE", help="write every run to FILE, after each table")
        sub.add_argument("--markdown", type=Path, metavar="FILE", help="put the tables into a section of this file")
    return parser


def _known_cases() -> str:
    return "; ".join(f"{op}: {', '.join(cases)}" for op, cases in CASES.items())


def _plan(arguments: argparse.Namespace) -> list[_Planned]:
    """The tables to measure. Everything that can be wrong about the command line is found here."""
    for name in ("heads", "key_dim", "value_dim", "threads", "repeats", "limit", "batch", "tokens"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise InputError(f"--{name} is {value:g}; expected more than 0")
    if min(arguments.lengths) < 1:
        raise InputError(f"--lengths has {min(arguments.lengths)}; expected at least 1")
    if arguments.chunk_size and min(arguments.chunk_size) < 1:
        raise InputError(f"--chunk_size has {min(arguments.chunk_size)}; expected at least 1")
    cases = _cases(arguments)
    for op in dict.fromkeys(op for op, _ in cases):
        _check_form(op, arguments.form)
    protocols = [
        Protocol(backward, arguments.threads, arguments.repeats, arguments.limit)
        for backward in ([False, True] if arguments.backward else [False])
    ]
    ours = [Subject(None, arguments.form, size) for size in arguments.chunk_size or [None]]
    return [
        _Planned(programs, protocol, arguments.view == "lengths")
        for op, case in cases
        for programs in _programs(arguments, op, case, ours)
        for protocol in protocols
    ]


def _cases(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    """Operators, each with its cases to measure."""
    ops = list(CASES) if arguments.op == ["all"] else arguments.op
    found = pairs(ops, arguments.case)
    if arguments.view != "peers":
        return found
    with_peers = [pair for pair in found if peers(*pair)]
    for case in arguments.case or []:
        if case not in dict.fromkeys(case for _, case in with_peers):
            known = sorted({case for peer in PEERS if peer.op in ops for case in peer.cases})
            raise InputError(f"--case {case} of {', '.join(ops)} has no peer; with peers: {', '.join(known) or 'none'}")
    if not with_peers:
        known = sorted({peer.op for peer in PEERS})
        raise InputError(f"--op {' '.join(ops)} has no peer; with peers: {', '.join(known)}")
    return with_peers


def _programs(
    arguments: argparse.Namespace, op: str, case: str, ours: list[Subject]
) -> Iterator[list[tuple[Subject, Workload]]]:
    """The programs of each table of one case."""
    workloads = [_workload(arguments, op, case, length) for length in arguments.lengths]
    if arguments.view == "lengths":
        yield from ([(subject, workload) for workload in workloads] for subject in ours)
        return
    others = [Subject(None, "recurrent")]
    if arguments.view == "peers":
        others = [Subject(peer.name, differs=peer.differs) for peer in peers(op, case)]
    yield from ([(subject, workload) for subject in (*ours, *others)] for workload in workloads)


def _workload(arguments: argparse.Namespace, op: str, case: str, length: int) -> Workload:
    tokens = arguments.tokens
    if tokens is None and arguments.batch is None and arguments.view == "lengths":
        tokens = 32768
    if tokens is not None and tokens % length:
        raise InputError(f"--lengths has {length}, which does not divide {tokens} tokens per batch (--tokens)")
    batch = arguments.batch or (1 if tokens is None else tokens // length)
    dims = (arguments.heads, arguments.key_dim, arguments.value_dim)
    return Workload(op, case, batch, length, *dims, arguments.dtype)


def _check_form(op: str, form: str) -> None:
    from seqmodels.registry import ops

    forms = ("recurrent", *ops()[op].forms)
    if form not in forms:
        raise InputError(f"--form {form} is not a form of {op}; {nearest(form, forms)}")


if __name__ == "__main__":
    run_main(main)
