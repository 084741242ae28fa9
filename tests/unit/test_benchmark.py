"""The benchmark program: its inputs, its comparisons, its clock, and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.registry import ops
from seqmodels.tools.benchmark import __main__ as program
from seqmodels.tools.benchmark import peers as peer_table
from seqmodels.tools.benchmark import worker
from seqmodels.tools.benchmark.cases import CASES, Workload, inputs
from seqmodels.tools.benchmark.compare import AGREEMENT, Protocol, Row, compare, difference
from seqmodels.tools.benchmark.messages import Ready, Run, Subject, Task
from seqmodels.tools.benchmark.peers import PEERS, Peer
from seqmodels.tools.benchmark.report import Group, conclusion, ratio, table

SMALL = ["--heads", "2", "--key_dim", "8", "--value_dim", "4"]
ALL_CASES = [(op, case) for op, cases in CASES.items() for case in cases]


def workload(op="linear_attention", case="none", batch=1, length=64) -> Workload:
    return Workload(op, case, batch, length, heads=2, key_dim=8, value_dim=8)


def row(subject=Subject(), seconds=(1.0,), length=64, **more) -> Row:  # noqa: B008 -- immutable
    runs = [Run(cpu=x, wall=10 * x) for x in seconds]
    return Row(subject, workload(length=length), 1, Ready(None, None, None, {}), runs, **more)


@pytest.mark.parametrize("op, case", ALL_CASES)
def test_every_case_is_an_input_of_a_registered_operator(op, case):
    given = inputs(workload(op, case, batch=2))
    o, _ = jax.eval_shape(lambda arrays: ops()[op].call(**arrays, **given.options), given.arrays)
    assert o.shape == given.cotangent.shape
    assert {x.dtype for x in jax.tree.leaves(given.arrays)} == {np.dtype("float32")}
    again = inputs(workload(op, case, batch=2))
    assert jax.tree.all(jax.tree.map(np.array_equal, given.arrays, again.arrays))
    if "g" in given.arrays:
        assert np.all(given.arrays["g"] <= 0)


def test_every_peer_belongs_to_a_case():
    assert {(peer.op, case) for peer in PEERS for case in peer.cases} <= set(ALL_CASES)


def test_difference_finds_the_worst_value_and_is_relative_to_the_largest():
    reference = {"o": np.array([1.0, -4.0]), "dq": np.array([8.0]), "dg": np.array([1.0])}
    assert difference(reference, reference) == 0
    assert difference({"o": np.array([1.0, -4.0]), "dq": np.array([6.0])}, reference) == 0.25
    assert difference({"o": np.array([3.0, -4.0]), "dq": np.array([8.0])}, reference) == 0.5
    assert np.isnan(difference({"o": np.array([np.nan, -4.0])}, reference))


def test_the_best_run_counts_and_the_median_tells_the_noise():
    measured = row(seconds=(3.0, 2.0, 2.5))
    assert (measured.best, measured.noise, measured.tokens_per_second) == (2.0, 0.25, 32.0)
    measured.threads = 2
    assert measured.best == 20.0  # wall time: CPU time would hide what threads save


def test_what_computes_something_else_gets_no_ratio():
    peer = Subject("other library")
    wrong = row(peer, seconds=(0.5,), difference=2 * AGREEMENT["float32"])
    right = row(peer, seconds=(2.0,), difference=AGREEMENT["float32"] / 2)
    not_a_number = row(peer, difference=float("nan"))
    group = Group(False, False, [row(), wrong, right, not_a_number, row(peer, skipped="not installed: no")])
    assert [ratio(each, group) for each in group.rows] == [1.0, None, 2.0, None, None]
    assert conclusion(group) == ["chunked is 2.00 times as fast as other library, the fastest of the others"]
    text = table(group)
    assert text.count("differs") == 2
    assert "not installed: no" in text


def test_what_is_known_to_compute_something_else_is_timed_and_said():
    programs = [
        (Subject(), workload("softmax_attention", "causal")),
        (Subject("jax.nn.dot_product_attention", differs="it is a test"), workload("softmax_attention", "causal")),
    ]
    group = Group(False, False, compare(programs, Protocol(backward=False, repeats=1), values=True))
    assert group.rows[1].difference is None and ratio(group.rows[1], group) > 0
    assert "jax.nn.dot_product_attention computes something else: it is a test" in table(group)


def test_another_chunk_size_is_not_an_opponent():
    rows = [row(), row(Subject(chunk_size=32), seconds=(0.5,)), row(Subject(form="recurrent"), seconds=(4.0,))]
    assert conclusion(Group(False, False, rows)) == [
        "chunked is 4.00 times as fast as recurrent, the fastest of the others"
    ]


def test_over_lengths_the_spread_of_speeds_is_told():
    rows = [row(seconds=(1.0,)), row(seconds=(2.5,), length=128), row(seconds=(2.0,), length=128)]
    assert conclusion(Group(False, True, rows)) == ["most over least tokens per second: 1.25"]


def test_lengths_keep_the_tokens_of_a_batch():
    planned = program._plan(program._parser().parse_args(["lengths", "--backward", "--case", "none", "scalar"]))
    assert [each.protocol.backward for each in planned] == [False, True, False, True]
    for each in planned:
        assert [work.length for _, work in each.programs] == [1024, 2048, 4096, 8192, 16384, 32768]
        assert {work.tokens for _, work in each.programs} == {32768}


def test_several_operators_in_one_run():
    def pairs(*arguments):
        planned = program._plan(program._parser().parse_args(list(arguments)))
        return list(dict.fromkeys((work.op, work.case) for each in planned for _, work in each.programs))

    assert pairs("forms", "--op", "all") == ALL_CASES
    assert pairs("peers", "--op", "all") == [pair for pair in ALL_CASES if peer_table.peers(*pair)]
    two = pairs("forms", "--op", "delta_rule", "linear_attention", "--case", "none", "head")
    assert two == [("delta_rule", "none"), ("linear_attention", "none"), ("linear_attention", "head")]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["forms", "--op", "linear_atention"], "did you mean 'linear_attention'"),
        (["forms", "--case", "scalr"], "did you mean 'scalar'"),
        (["forms", "--form", "chunky"], "did you mean 'chunked'"),
        (["forms", "--lengths", "0"], "--lengths has 0"),
        (["forms", "--chunk_size", "16", "-1"], "--chunk_size has -1"),
        (["forms", "--repeats", "0"], "--repeats is 0"),
        (["forms", "--batch", "0"], "--batch is 0"),
        (["lengths", "--lengths", "1000"], "does not divide 32768 tokens"),
        (["peers", "--op", "ssd", "short_conv", "--case", "one_group", "width_4"], "--case width_4 of ssd, short_conv"),
        (["peers", "--op", "short_conv"], "--op short_conv has no peer"),
        (["peers", "--op", "short_conv", "--case", "width_4"], "--case width_4 of short_conv has no peer"),
        (["forms", "--json", "/proc/no/file.json"], "--json /proc/no/file.json cannot be written"),
    ],
)
def test_bad_arguments_are_one_line_before_anything_runs(arguments, words):
    with pytest.raises(InputError, match=words) as error:
        program.main(arguments)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("view", list(program.VIEWS))
def test_help(view, capsys):
    with pytest.raises(SystemExit) as end:
        program.main([view, "--help"])
    assert end.value.code == 0
    assert "--lengths" in capsys.readouterr().out


def test_forms_from_the_command_line(tmp_path, capsys):
    file, document = tmp_path / "result.json", tmp_path / "docs" / "result.md"
    files = ["--json", str(file), "--markdown", str(document)]
    program.main(["forms", "--case", "scalar", "--lengths", "80", "--repeats", "2", *files, "--backward", *SMALL])
    forward, both = json.loads(file.read_text())["groups"]
    assert (forward["backward"], both["backward"]) == (False, True)
    for group in (forward, both):
        assert [each["program"] for each in group["rows"]] == ["chunked", "recurrent"]
        for each in group["rows"]:
            assert len(each["runs"]) == 2
            assert each["runs"][0]["cpu"] > 0
            assert each["compile_seconds"] > 0
            assert each["difference"] <= AGREEMENT["float32"]
    # The scan keeps every state for the backward pass: 80 of 2 x 8 x 4 floats.
    assert both["rows"][1]["temporary_bytes"] > 80 * 2 * 8 * 4 * 4 > forward["rows"][1]["temporary_bytes"]
    printed = capsys.readouterr().out
    assert "load average" in printed
    assert "linear_attention, scalar: forward + backward; batch 1, length 80" in printed
    text = document.read_text()
    assert text.startswith("# Benchmarks on a CPU") and printed.split("\n\n")[1].strip() in text
    row = next(line for line in text.splitlines() if line.startswith("| linear_attention, scalar | 80 | both |"))
    times = both["rows"][1]["ratio"]
    assert f"| recurrent | {both['rows'][1]['tokens_per_second'] / 1e3:.1f} | {times:.2f} |" in row


def test_a_peer_is_compared_by_values_and_gradients():
    programs = [
        (subject, workload("softmax_attention", "causal"))
        for subject in (Subject(), Subject("jax.nn.dot_product_attention"))
    ]
    said = []
    ours, peer = compare(programs, Protocol(backward=True, repeats=1), values=True, progress=said.append)
    assert ours.difference == 0
    assert 0 < peer.difference <= AGREEMENT["float32"]
    assert said[-1] == "run 1 of 1"


def test_gradients_are_among_the_compared_values():
    _, ready = worker._prepare(Task(Subject(), workload(case="channel"), True, 1, None, True))
    assert {name: x.shape for name, x in ready.values.items()} == {
        "o": (1, 64, 2, 8),
        **{name: (1, 64, 2, 8) for name in ("dq", "dk", "dv", "dg")},
    }


def test_a_library_that_is_missing_is_said(monkeypatch):
    def load(given):
        import no_such_library  # noqa: F401

    monkeypatch.setattr(peer_table, "PEERS", (Peer("linear_attention", ("none",), "ghost", "jax", load),))
    with pytest.raises(worker._Skip, match="not installed: ModuleNotFoundError: No module named 'no_such_library'"):
        worker._prepare(Task(Subject("ghost"), workload(), False, 1, None, False))


def test_ours_refusing_its_arguments_is_an_input_error():
    with pytest.raises(InputError, match="form='chunky' is not a form of it; did you mean 'chunked'"):
        compare([(Subject(form="chunky"), workload())], Protocol(backward=False), values=True)


@pytest.mark.parametrize("power, skipped", [(1, False), (2, True)])
def test_prediction_follows_the_growth_of_time(monkeypatch, power, skipped):
    """At a quarter of the length both take 20 ms: 80 ms for the whole if linear, 320 ms if quadratic."""
    length = 4096

    def burn(task, work):
        def call():
            end = time.process_time() + 0.02 * (work.length / (length / 4)) ** power
            while time.process_time() < end:
                pass

        return worker.Program(call, np.asarray)

    monkeypatch.setattr(worker, "_program", burn)
    task = Task(Subject(), workload(length=length), False, 1, 0.2, False)
    if not skipped:
        worker._check_prediction(task)
        return
    with pytest.raises(worker._Skip, match="over the limit"):
        worker._check_prediction(task)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_an_interrupt_ends_every_worker():
    # Too many runs to be done before the interrupt comes, however busy the machine.
    process = subprocess.Popen(
        [sys.executable, "-m", "seqmodels.tools.benchmark", "forms", "--case", "none", *SMALL, "--repeats", "1000000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A job in the background of a shell, as tests may be, ignores interrupts, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        while not (workers := _workers_of(process.pid)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole process group
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.endswith("interrupted\n")
    assert "Traceback" not in errors
    assert not any(_runs(pid) for pid in workers)


def _workers_of(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent_of = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_text()
        except OSError:  # it ended meanwhile
            continue
        if parent_of == parent and "seqmodels.tools.benchmark.worker" in command:
            found.append(int(entry.name))
    return found


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
