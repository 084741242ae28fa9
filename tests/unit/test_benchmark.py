"""The benchmark program: its inputs, its comparisons, its clock, and how it ends.

Of the suite for a GPU everything runs here but the device's clock and the Triton kernels: JAX is on the CPU."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import numpy as np
import pytest

from seqmodels.errors import InputError
from seqmodels.registry import ops
from seqmodels.tools import _measuring
from seqmodels.tools.benchmark import __main__ as program
from seqmodels.tools.benchmark import peers as peer_table
from seqmodels.tools.benchmark import worker
from seqmodels.tools.benchmark.cases import CASES, Workload, inputs
from seqmodels.tools.benchmark.compare import AGREEMENT, Protocol, Row, compare, difference
from seqmodels.tools.benchmark.gpu import command as gpu_command
from seqmodels.tools.benchmark.gpu import libraries, suite, tuning
from seqmodels.tools.benchmark.gpu import peers as gpu_peers
from seqmodels.tools.benchmark.gpu import report as gpu_report
from seqmodels.tools.benchmark.gpu import worker as gpu_worker
from seqmodels.tools.benchmark.gpu.messages import REFERENCE, XLA, Doing, Done, Failed, Job, Key, Measured
from seqmodels.tools.benchmark.gpu.messages import Ready as GpuReady
from seqmodels.tools.benchmark.messages import Ready, Run, Subject, Task
from seqmodels.tools.benchmark.peers import PEERS, Peer
from seqmodels.tools.benchmark.processes import Ended
from seqmodels.tools.benchmark.programs import jax_step
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
        (["--suite", "gpu", "--op", "sdd"], "did you mean 'ssd'"),
        (["--suite", "gpu", "--case", "scalr"], "did you mean 'scalar'"),
        (["--suite", "gpu", "--lengths", "1000"], "does not divide 32768 tokens"),
        (["--suite", "gpu", "--widths", "0"], "--widths has 0"),
        (["--suite", "gpu", "--limit", "-1"], "--limit is -1"),
        (["--suite", "gpu", "--json", "/proc/no/file.json"], "--json /proc/no/file.json cannot be written"),
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


def test_help_of_the_gpu_suite(capsys):
    with pytest.raises(SystemExit) as end:
        program.main(["--suite", "gpu", "--help"])
    assert end.value.code == 0
    assert "--widths" in capsys.readouterr().out


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


GPU_SMALL = ["--suite", "gpu", "--platform", "cpu", "--tokens", "128", "--lengths", "64", "--heads", "2"]
ON_CPU = suite.Protocol(libraries=("torch",), platform="cpu", repeats=1, limit=100.0)


def measured(name, ms, backward=False, host=0.0, **values) -> Measured:
    return Measured(Key(name, backward), values, (ms / 1e3,), 10, host, 0.0)


def test_what_the_gpu_suite_measures_by_default():
    plan = gpu_command._plan(gpu_command._parser().parse_args([]))
    sizes = {(work.length, work.key_dim, work.value_dim) for work in plan}
    assert sizes == {(length, width, width) for length in (2048, 8192, 32768) for width in (64, 128)}
    peers = {(work.op, work.case): {x.name for x in gpu_peers.peers(work.op, work.case)} for work in plan}
    assert len(plan) == len(sizes) * len(peers)
    expected = {
        ("linear_attention", "none"): "fla chunk_simple_gla",
        ("linear_attention", "head"): "fla chunk_simple_gla",  # retention, lightning attention
        ("linear_attention", "scalar"): "fla chunk_simple_gla",
        ("linear_attention", "channel"): "fla chunk_gla",
        ("delta_rule", "none"): "fla chunk_delta_rule",
        ("delta_rule", "scalar"): "fla chunk_gated_delta_rule",
        ("delta_rule", "channel"): "fla chunk_kda",
        ("ssd", "one_group"): "mamba_ssm mamba_chunk_scan_combined",
    }
    assert peers.keys() == expected.keys()
    assert all(expected[each] in names for each, names in peers.items())


@pytest.mark.parametrize("op", [name for name, op in ops().items() if "pallas_gpu" in op.kernels])
def test_a_kernel_is_measured_by_its_name(op):
    """Also one that backend="auto" does not take."""
    lowered = []
    for case in CASES[op]:
        work = Workload(op, case, 1, 128, 2, 64, 64, "bfloat16")
        given = inputs(work)
        placed = libraries.JaxLibrary("cpu").place(given, work)
        for name in ("pallas_gpu", "xla"):
            step = jax.jit(jax_step(gpu_worker._ours(name, work, given).call, True))
            try:
                text = step.trace(placed.arrays, placed.cotangent).lower(lowering_platforms=("cuda",)).as_text()
            except ValueError as error:
                assert name == "pallas_gpu" and "cannot run this" in str(error)
            else:
                lowered.append((case, name))
                assert ("mosaic_gpu" in text) == (name == "pallas_gpu")
    assert any(name == "pallas_gpu" for _, name in lowered)


def test_every_gpu_peer_belongs_to_a_case():
    assert {(peer.op, case) for peer in gpu_peers.PEERS for case in peer.cases} <= set(ALL_CASES)
    for op, case in ALL_CASES:
        assert len(set(suite.names(op, case))) == len(suite.names(op, case))


@pytest.mark.parametrize("cost, calls, measurements", [(1e-3, 50, 5), (1e-6, 1000, 5), (0.7, 1, 3), (9.0, 1, 1)])
def test_a_measurement_has_calls_for_50_ms_and_a_slow_one_is_not_repeated(cost, calls, measurements):
    made = []

    def run(count: int) -> _measuring.Span:
        made.append(count)
        return _measuring.Span(device=count * cost + (0.02 if count == 1 and cost < 0.1 else 0), host=count * 1e-4)

    timing = _measuring.measure(run, repeats=5)
    assert timing.calls == calls and made[-measurements:] == [calls] * measurements
    assert len(made) <= measurements + 2 and max(made[:-measurements]) <= _measuring.QUEUE
    assert timing.median == pytest.approx(cost) and timing.host == pytest.approx(1e-4)


def test_positions_that_are_compared_fall_on_every_place_of_a_chunk():
    for length in (1, 64, 2048, 8192, 32768):
        places = np.arange(0, length, libraries.stride(length))
        assert len(np.unique(places % 64)) == min(length, 64)
        assert len(places) <= 2 * libraries.SAMPLES


@pytest.mark.parametrize("case", ["head", "channel"])
def test_values_of_a_batch_are_compared_with_its_last_sequence_alone(case):
    work = workload(case=case, batch=3)._replace(dtype="bfloat16")
    given = inputs(work)

    def rounded(x: np.ndarray) -> np.ndarray:
        return np.asarray(jax.numpy.bfloat16(x), np.float32)

    last = {name: x if name == "g" else rounded(x) for name, x in given.arrays.items()}
    last = {name: x[-1:] if x.ndim > 1 else x for name, x in last.items()}
    cotangent = rounded(given.cotangent)[-1:]
    o, pull_back = jax.vjp(lambda x: ops()[work.op].call(**x, form="recurrent")[0], last)
    want = {"o": o, **{f"d{name}": x for name, x in pull_back(cotangent)[0].items()}}

    answers = []
    keys = (Key(REFERENCE, True), Key(XLA, True))
    gpu_worker.run(Job(work, keys), libraries.JaxLibrary("cpu"), 1, given, answers.append)
    reference, ours = (each for each in answers if isinstance(each, Measured))
    assert reference.form == "recurrent" and ours.form == "chunked"
    for name, x in want.items():
        x = x[-1] if x.ndim > 1 else x
        np.testing.assert_allclose(reference.values[name], x, atol=1e-5 * np.max(np.abs(x)))
    found = suite._row(work, True, {each.key: each for each in (reference, ours)}, "not asked for").cells[0]
    assert set(found.errors) == {"o", "dq", "dk", "dv", "dg"}
    assert 0 < max(found.errors.values()) < AGREEMENT["bfloat16"] and found.agrees


def test_the_reference_is_chunked_where_states_of_every_token_do_not_fit(monkeypatch):
    work = workload(case="scalar")
    assert gpu_worker._ours(REFERENCE, work, inputs(work)).form == "recurrent"
    assert gpu_worker._states(ops()[work.op], work._replace(batch=1), inputs(work)) == 64 * 2 * 8 * 8 * 4
    monkeypatch.setattr(gpu_worker, "STATES", 64 * 2 * 8 * 8 * 4 - 1)
    assert gpu_worker._ours(REFERENCE, work, inputs(work)).form == "chunked"
    monkeypatch.undo()
    monkeypatch.setattr(gpu_worker, "STEPS", 63)
    assert gpu_worker._ours(REFERENCE, work, inputs(work)).form == "chunked"


def test_one_program_that_fails_leaves_the_others(monkeypatch):
    def load(given):
        import no_such_library  # noqa: F401

    def fails(given):
        def call(**arrays):
            raise RuntimeError("no such instruction\nand more")

        return call

    peers = tuple(Peer("linear_attention", ("none",), name, "jax", f) for name, f in (("ghost", load), ("bad", fails)))
    monkeypatch.setattr(gpu_peers, "PEERS", peers)
    answers = []
    keys = tuple(Key(name, False) for name in ("ghost", "bad", XLA))
    gpu_worker.run(Job(workload(), keys), libraries.JaxLibrary("cpu"), 1, inputs(workload()), answers.append)
    ghost, bad, ours = (each for each in answers if not isinstance(each, Doing))
    assert ghost.reason == "not installed: ModuleNotFoundError: No module named 'no_such_library'"
    assert bad.reason == "RuntimeError: no such instruction" and "Traceback" in bad.traceback
    assert ours.seconds[0] > 0


class ScriptedProcess:
    """In place of a worker's process: measures what it is told to, but ends at some programs and hangs at others."""

    started, ends, hangs, shared = 0, (), (), False

    def __init__(self, module, environment, first):
        type(self).started += 1
        self.answers = [GpuReady("device")]

    def send(self, message):
        job = pickle.loads(message)
        self.answers = [] if self.shared else [Doing(None, "compile")]
        for key in job.keys:
            if not self.shared:
                self.answers.append(Doing(key, "forward"))
            if key.name in (*self.ends, *self.hangs):
                self.answers.append(Ended(-11, "Segmentation fault") if key.name in self.ends else TimeoutError())
            self.answers.append(measured(key.name, 1.0))
        if self.shared and any(key.name in self.ends for key in job.keys):
            self.answers = [Ended(-11, "Segmentation fault")]
        self.answers.append(Done())

    def answer(self, timeout):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def end(self):
        pass


@pytest.mark.parametrize(
    "more, reasons, processes",
    [
        ({}, [None, None, None], 1),
        ({"ends": ("b",)}, [None, "its process ended with exit code -11", None], 2),
        ({"hangs": ("a", "c")}, ["no answer in 100 s", None, "no answer in 100 s"], 2),
        ({"ends": ("a", "b"), "shared": True}, ["its process ended with exit code -11"] * 2 + [None], 4),
    ],
)
def test_a_process_that_ends_or_hangs_costs_one_program(monkeypatch, more, reasons, processes):
    process = type("Process", (ScriptedProcess,), {"started": 0, **more})
    monkeypatch.setattr(suite, "WorkerProcess", process)
    worker = suite._Worker("torch", ON_CPU)
    job = Job(workload(), tuple(Key(name, False) for name in "abc"))
    answers = {answer.key.name: answer for answer in worker.run(job, lambda doing: None)}
    assert [getattr(answers[name], "reason", None) for name in "abc"] == reasons
    assert process.started == processes


def test_a_library_that_does_not_start_is_the_reason_of_all_its_programs(monkeypatch):
    monkeypatch.setattr(ScriptedProcess, "answer", lambda self, timeout: Failed(None, "torch finds no GPU"))
    monkeypatch.setattr(suite, "WorkerProcess", ScriptedProcess)
    job = Job(workload(), (Key("a", False), Key("b", True)))
    answers = list(suite._Worker("torch", ON_CPU).run(job, lambda doing: None))
    assert answers == [Failed(key, "torch finds no GPU") for key in job.keys]


def gpu_row(backward=False, **answers) -> suite.Row:
    """Of a workload with the peers "fla chunk_simple_gla" and "fla fused_chunk_simple_gla"."""
    one = np.ones(4, np.float32)
    given = {REFERENCE: measured(REFERENCE, 0, backward, o=one)._replace(form="recurrent")}
    given |= {name.replace("fla_", "fla "): x for name, x in answers.items()}
    by_key = {Key(name, backward): x for name, x in given.items()}
    return suite._row(workload(case="scalar"), backward, by_key, "not asked for")


def test_the_ratio_is_of_the_fastest_that_agree():
    one = np.ones(4, np.float32)
    right, wrong, no_number = one * 1.01, one * 1.2, one * np.nan
    values = {
        "xla": measured("xla", 3.0, o=right),
        "pallas_gpu": measured("pallas_gpu", 1.0, o=right),
        "fla_chunk_simple_gla": measured("", 2.0, o=right),
        "fla_fused_chunk_simple_gla": measured("", 0.5, o=right),
    }
    assert gpu_row(**values).ratio == 2.0
    for bad in (wrong, no_number):
        row = gpu_row(**{**values, "fla_fused_chunk_simple_gla": measured("", 0.5, o=bad)})
        assert row.ratio == 0.5 and row.fastest(False).name == "fla chunk_simple_gla"
        assert "!" in gpu_report.Table(row.workload).line(row)
    assert gpu_row(xla=values["xla"]).ratio is None
    row = gpu_row(**values)
    assert gpu_report._row(row)["peer"] == "fla fused_chunk_simple_gla" and gpu_report._row(row)["ours"] == "pallas_gpu"


def test_a_line_says_times_errors_and_reasons():
    one = np.ones(4, np.float32)
    row = gpu_row(
        backward=True,
        xla=measured("xla", 3.0, True, host=2.9e-3, o=one, dq=one),
        pallas_gpu=Failed(Key("pallas_gpu", True), "there is no kernel"),
        fla_chunk_simple_gla=measured("", 2.0, True, o=one * 1.01),
    )
    table = gpu_report.Table(row.workload)
    cells = table.cells(row)
    assert cells[:3] == ("both", "64 x 1", "8")
    assert cells[3:] == ("3* (0e+00)", "- [1]", "2 (1e-02)", "- [2]", "1.50", "recurrent")
    assert table.notes == "  [1] pallas_gpu: there is no kernel\n  [2] fla fused_chunk_simple_gla: not asked for"
    assert len(table.head.splitlines()[1]) == len(table.line(row))


def test_gpu_suite_from_the_command_line(tmp_path, capsys, monkeypatch):
    file, document = tmp_path / "result.json", tmp_path / "result.md"
    cases = ["--op", "linear_attention", "aaren", "--case", "scalar", "learned_query", "--repeats", "2"]
    program.main([*GPU_SMALL, "--widths", "8", *cases, "--json", str(file), "--markdown", str(document)])
    rows = json.loads(file.read_text())["rows"]
    assert [(row["op"], row["backward"]) for row in rows] == [
        ("linear_attention", False),
        ("linear_attention", True),
        ("aaren", False),
        ("aaren", True),
    ]
    for row in rows:
        assert row["reference"] == "recurrent" and (row["length"], row["batch"], row["heads"]) == (64, 2, 2)
        found = {each["program"]: each for each in row["programs"]}
        assert found["xla"]["milliseconds"] > 0 and len(found["xla"]["seconds"]) == 2
        assert max(found["xla"]["errors"].values()) < AGREEMENT["bfloat16"]
        assert row["backward"] == ("dk" in found["xla"]["errors"])
        # Without a GPU no Triton kernel runs; and a program that does not run has its reason.
        for each in row["programs"]:
            assert (each["milliseconds"] is None) == (each["skipped"] is not None)
            if each["program"].startswith("fla"):
                assert each["skipped"]
    assert rows[3]["ratio"] > 0 and rows[3]["peer"] is not None
    printed = capsys.readouterr().out
    assert "aaren, learned_query; 2 heads, bfloat16" in printed
    assert "| forward | 64 x 2 | 8 |" in document.read_text()


def test_an_operator_without_a_kernel_is_said():
    with suite.Suite(ON_CPU._replace(libraries=())) as begun:
        (row,) = begun.rows([workload("rglru", "griffin")], [False])
    assert {cell.name: cell.skipped for cell in row.cells}["pallas_gpu"] == "rglru has no pallas_gpu kernel"


def test_what_is_late_is_said():
    with suite.Suite(ON_CPU._replace(libraries=(), stop_after=1e-6)) as begun:
        (row,) = begun.rows([workload()], [False])
    assert all(cell.skipped.startswith("not begun") for cell in row.cells)
    assert row.ratio is None and row.reference is None


@pytest.mark.parametrize(
    "error, count, words", [(0, 0, "finds no device"), (100, 1, "reports error 100"), (0, 1, None)]
)
def test_a_gpu_is_looked_for_with_the_driver(monkeypatch, error, count, words):
    class Driver:
        def __init__(self, name):
            assert name == "libcuda.so.1"

        def cuInit(self, flags):
            return error

        def cuDeviceGetCount(self, found):
            found._obj.value = count
            return 0

    monkeypatch.setattr(gpu_command.ctypes, "CDLL", Driver)
    if words is None:
        return gpu_command.check_gpu()
    with pytest.raises(InputError, match=words):
        gpu_command.check_gpu()


def test_without_a_gpu_the_suite_ends_with_what_it_needs(monkeypatch):
    def none(name):
        raise OSError

    monkeypatch.setattr(gpu_command.ctypes, "CDLL", none)
    with pytest.raises(InputError, match="needs an NVIDIA GPU with its driver, jax for CUDA") as error:
        program.main(["--suite", "gpu"])
    assert "\n" not in str(error.value)


def test_default_gpu_suite():
    works = gpu_command._plan(gpu_command._parser().parse_args([]))
    assert {(work.tokens, work.heads, work.dtype) for work in works} == {(32768, 16, "bfloat16")}
    assert {(work.length, work.key_dim, work.value_dim) for work in works} == {
        (length, width, width) for length in (2048, 8192, 32768) for width in (64, 128)
    }
    assert {work.op for work in works} == {"linear_attention", "delta_rule", "ssd"}


def test_kernels_of_mamba_are_imported_without_the_package_around_them(tmp_path, monkeypatch):
    folder = tmp_path / "mamba_ssm" / "ops" / "triton"
    folder.mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("raise ImportError('a compiled extension')")
    source = "def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D): return x, chunk_size"
    (folder / "ssd_combined.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        for _ in range(2):
            call = gpu_peers._mamba_chunk_scan(None)
            assert call("x", None, None, None, None, None) == ("x", 256)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "mamba_ssm"]:
            del sys.modules[name]


@pytest.mark.parametrize("backward", [False, True])
def test_torch_is_given_the_same_numbers(backward):
    pytest.importorskip("torch", reason="torch is not installed; it comes with the extra 'peers'")
    work = workload("softmax_attention", "causal", batch=2)._replace(dtype="bfloat16")
    name = "torch scaled_dot_product_attention"
    answers = []
    for library, key in (("jax", Key(REFERENCE, backward)), ("torch", Key(name, backward))):
        made = libraries.LIBRARIES[library]("cpu")
        gpu_worker.run(Job(work, (key,)), made, 1, inputs(work), answers.append)
    found = {each.key: each for each in answers if isinstance(each, Measured)}
    (cell,) = (x for x in suite._row(work, backward, found, "not asked for").cells if x.name == name)
    assert set(cell.errors) == ({"o", "dq", "dk", "dv"} if backward else {"o"})
    assert 0 < max(cell.errors.values()) < AGREEMENT["bfloat16"]


def test_events_of_the_device_are_the_clock_of_torch(monkeypatch):
    done = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(done)

        def synchronize(self):
            self.waited = True

        def elapsed_time(self, end):
            assert end.waited
            return 40.0 * (end.at - self.at)

    torch = SimpleNamespace(cuda=SimpleNamespace(Event=Event))
    monkeypatch.setitem(sys.modules, "torch", torch)
    library = object.__new__(libraries.TorchLibrary)
    library._on = "cuda"
    span = library.span(lambda: done.append(1), 3)
    assert span.device == pytest.approx(0.12) and 0 < span.host < 0.1 and len(done) == 3


def test_configurations_are_compiled_before_they_are_timed(monkeypatch):
    ran, pools = [], []

    class Autotuner:
        _do_bench, nargs = None, {"x": "the array"}

        def prune_configs(self, kwargs):
            return [SimpleNamespace(all_kwargs=lambda n=n: {"BLOCK": n}) for n in (16, 32, 64)]

    class AsyncCompileMode:
        def __init__(self, pool, ignore_errors):
            pools.append(ignore_errors)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    def compile(*args, **kwargs):
        ran.append((args, kwargs))
        if kwargs["BLOCK"] == 16:
            raise RuntimeError("too small")

    modules = {
        "triton": {},
        "triton.runtime": {},
        "triton.runtime._async_compile": {"AsyncCompileMode": AsyncCompileMode},
        "triton.runtime.autotuner": {"Autotuner": Autotuner},
        "triton.testing": {"do_bench": lambda call, warmup, rep: (warmup, rep)},
    }
    for name, contents in modules.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    tuning.compile_side_by_side()
    tuner = Autotuner()
    tuner.fn = SimpleNamespace(run=compile)
    assert len(tuner.prune_configs({"grid": 1, "warmup": False})) == 3
    want = [(("the array",), {"grid": 1, "warmup": True, "BLOCK": n}) for n in (16, 32, 64)]
    assert ran == want and pools == [True]
    assert tuner._do_bench(None) == (tuning.WARM_UP, tuning.TIMED)


def test_the_gpu_suite_knows_what_it_runs_on_without_what_training_needs():
    source = "import sys; from seqmodels.tools.benchmark.gpu import command; found = command._environment();"
    source += "assert found['python'] and found['packages'] and not {'orbax', 'grain', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", source], check=True)
