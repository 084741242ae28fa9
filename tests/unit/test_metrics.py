"""What a person and the files are told, and how resuming looks in them."""

import io
import json
import math

import jax
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from seqmodels.training import metrics as metrics_module
from seqmodels.training.metrics import Report, peak_flops
from seqmodels.training.run_directory import RunDirectory, read_metrics

HELD_OUT = {"loss": math.log(16), "accuracy": 0.25}
VALUES = HELD_OUT | {"gradient_norm": 1.0}


@pytest.fixture
def run(tmp_path):
    with RunDirectory(tmp_path / "run") as run:
        run.open("")
        yield run


def make_report(run, start=0, **changes):
    settings = {
        "steps": 10,
        "tokens_per_step": 1000,
        "flops_per_token": 6e6,
        "bytes_per_token": 2.0,
        "every": 4,
    }
    return Report(run, start=start, **settings | changes)


def test_rows_hold_the_values_of_their_own_step(run):
    with make_report(run) as report:
        for step in range(1, 11):
            report.step(step, VALUES | {"loss": float(step)})
        report.evaluation(10, {"loss": 3.0, "accuracy": 0.5})
    *rows, last = read_metrics(run.metrics)
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1.0), (4, 4.0), (8, 8.0), (10, 10.0)]
    assert rows[1]["bits_per_byte"] == 4.0 / math.log(2) / 2.0
    assert last == {"step": 10, "eval/loss": 3.0, "eval/accuracy": 0.5}


def test_nothing_in_a_row_depends_on_the_time(run):
    """Otherwise the files of a resumed run and of an undisturbed one could not be compared."""
    with make_report(run, every=1) as report:
        report.step(1, VALUES)
        report.step(2, VALUES)
    first, second = map(json.loads, run.metrics.read_text().splitlines())
    assert first.keys() == second.keys() == VALUES.keys() | {"step", "bits_per_byte"}


def test_without_bytes_per_token_there_are_no_bits_per_byte(run, capsys):
    with make_report(run, bytes_per_token=None) as report:
        report.step(1, VALUES)
    assert "bits_per_byte" not in read_metrics(run.metrics)[0]
    assert "bits/byte" not in capsys.readouterr().out


def clock(monkeypatch, seconds_per_step):
    now = iter(float(seconds_per_step * i) for i in range(1000))
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: next(now))


def test_lines_where_there_is_no_terminal(run, capsys, monkeypatch):
    monkeypatch.setattr(metrics_module, "peak_flops", lambda kind: 1e9 / jax.device_count())
    clock(monkeypatch, 8)
    with make_report(run) as report:
        for step in range(1, 11):
            report.step(step, VALUES)
        report.evaluation(10, HELD_OUT | {"bits_per_byte": 2.0, "macro_accuracy": 0.2})
    first, second, *_, last = capsys.readouterr().out.splitlines()
    assert first == "step  1/10: loss 2.773, 2.000 bits/byte, accuracy 0.250"
    # A step of 1000 tokens in eight seconds, each token 6e6 FLOPs, of 1e9 a second; six steps to go.
    assert (
        second
        == "step  4/10: loss 2.773, 2.000 bits/byte, accuracy 0.250, 125 tokens/s, MFU 75.0%, 00:48 left"
    )
    assert last == "step 10/10: held out: loss 2.773, accuracy 0.250, macro accuracy 0.200, 2.000 bits/byte"


def test_a_row_without_accuracy(run, capsys):
    """Data that are numbers have none."""
    with make_report(run, bytes_per_token=None) as report:
        report.step(1, {"loss": 2.0})
        report.evaluation(1, {"loss": 1.0})
    assert capsys.readouterr().out.splitlines() == ["step  1/10: loss 2.000", "step  1/10: held out: loss 1.000"]


def test_time_spent_elsewhere_does_not_count(run, capsys, monkeypatch):
    clock(monkeypatch, 8)
    with make_report(run, every=1) as report:
        report.step(1, VALUES)
        report.step(2, VALUES)
        report.restart_clock()
        report.step(3, VALUES)
        report.step(4, VALUES)
    lines = capsys.readouterr().out.splitlines()
    assert ["tokens/s" in line for line in lines] == [False, True, False, True]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_one_line_changes_in_place(run, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    with make_report(run, start=4, every=1) as report:
        for step in range(5, 11):
            report.step(step, VALUES)
        report.evaluation(10, HELD_OUT)
    shown = terminal.getvalue()
    assert "10/10 [" in shown and "loss 2.773, 2.000 bits/byte" in shown.rpartition("10/10 [")[2]
    lines = [line.rpartition("\r")[2].strip() for line in shown.split("\n")]
    assert [line for line in lines if line.startswith("step")] == [
        "step 10/10: held out: loss 2.773, accuracy 0.250"
    ]
    assert not tqdm._instances


def test_tensorboard_forgets_what_a_resumed_run_does_again(run):
    with make_report(run, every=1) as report:
        for step in range(1, 8):
            report.step(step, VALUES)
    with make_report(run, start=5, every=1) as report:
        for step in range(6, 11):
            report.step(step, VALUES | {"loss": 1.0})
        report.evaluation(10, VALUES)
    events = EventAccumulator(str(run.tensorboard)).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in losses] == list(range(1, 11))
    assert {value for step, value in losses if step > 5} == {1.0}
    assert {"train/gradient_norm", "eval/loss", "speed/tokens_per_second"} <= set(events.Tags()["scalars"])


def test_only_the_first_process_speaks(run, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with make_report(run, every=1) as report:
        report.step(1, VALUES)
        report.evaluation(1, VALUES)
        metrics_module.say("hello")
    assert capsys.readouterr().out == ""
    assert not run.metrics.exists() and not list(run.tensorboard.iterdir())


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1154),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA A100-SXM4-80GB", 312),
    ],
)
def test_peak_of_known_devices(kind, tera):
    assert peak_flops(kind) == tera * 1e12


@pytest.mark.parametrize("kind", ["cpu", "TPU v4 lite", "NVIDIA T4"])
def test_no_peak_of_other_devices(kind):
    assert peak_flops(kind) is None
