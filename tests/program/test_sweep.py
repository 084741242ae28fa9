"""Sweeps as they run: with programs that only play train.py, which take no time, and with the real one."""

import contextlib
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, EXIT_INPUT, EXIT_RESTART
from seqmodels.tools.report import __main__ as report
from seqmodels.tools.sweep import __main__ as program
from seqmodels.tools.sweep import run as running
from seqmodels.tools.sweep.folder import PointFolder
from seqmodels.tools.sweep.progress import Progress
from seqmodels.tools.sweep.run import failures, programs_left, run_points
from tests.program.programs import REPOSITORY

pytestmark = pytest.mark.xdist_group("programs")
PATIENCE = 300.0  # seconds until what does not come fails the test

# What stands in a point's config.gin is what it does, in Python; `folder` is its run directory.
TRAIN = """\
import json, os, pathlib, signal, sys, time
config, run = (sys.argv[sys.argv.index(name) + 1] for name in ("--config", "--run_dir"))
folder = pathlib.Path(run)
with (folder / "starts").open("a") as starts:
    starts.write(f"{sorted(os.sched_getaffinity(0))}\\n")
def finish():
    (folder / "DONE").write_text(json.dumps({"step": 4, "metrics": {"step": 4, "eval/accuracy": 0.5}}))
def serve():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
    (folder / "serves").write_text(str(os.getpid()))
    time.sleep(600)
exec(pathlib.Path(config).read_text())
"""
EVALUATE = """\
import json, pathlib, sys
run, suite = pathlib.Path(sys.argv[1]), sys.argv[3]
with (run / "calls").open("a") as calls:
    calls.write(" ".join(sys.argv[3:]) + "\\n")
if suite == "broken":
    sys.exit("error: no such thing")
step = json.loads((run / "DONE").read_text())["step"]
(run / "evaluations" / f"{suite}.json").write_text(json.dumps({"step": step - (suite == "early")}))
"""


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Points by name, each with what it does in place of being trained."""
    root = tmp_path / "root"
    (root / "seqmodels" / "tools").mkdir(parents=True)
    for package in ("seqmodels", "seqmodels/tools"):
        (root / package / "__init__.py").write_text("")
    (root / "train.py").write_text(TRAIN)
    (root / "seqmodels" / "tools" / "evaluate.py").write_text(EVALUATE)
    monkeypatch.setattr(running, "ROOT", root)
    monkeypatch.chdir(root)  # where python -m looks first
    (tmp_path / "logs").mkdir()

    def points(**programs: str) -> list[PointFolder]:
        for name, does in programs.items():
            (tmp_path / name / "evaluations").mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "config.gin").write_text(does)
        return [PointFolder(tmp_path / name, tmp_path / "logs" / f"{name}.log") for name in programs]

    return points


def run(points, evaluations=(), jobs=1):
    with Progress([(point, 4) for point in points], "accuracy", len(points)) as progress:
        return run_points(points, evaluations, jobs, progress)


def starts(point: PointFolder) -> list[str]:
    file = point.path / "starts"
    return file.read_text().splitlines() if file.exists() else []


def wait_until(condition, ended=lambda: False) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert not ended() and time.monotonic() < deadline
        time.sleep(0.01)


def test_what_is_done_is_skipped_and_a_failure_stops_no_other_point(play, capsys):
    points = play(
        a="finish()",
        b="print('before'); sys.exit('error: the loss is nan\\nsee there')",
        c="os.kill(os.getpid(), signal.SIGKILL)",
        d="raise ValueError('too wide')",
        e="pass",
        f="finish()",
    )
    outcome = run(points)
    assert outcome.done == ["a", "f"] and outcome.failed == ["b", "c", "d", "e"] and not outcome.stopped
    assert outcome.exit_code == EXIT_DEFECT
    told = capsys.readouterr().out.splitlines()
    assert [line.split(" after ")[0] for line in told] == [
        "[1/6] a: done",
        "[2/6] b: FAILED",
        "[3/6] c: FAILED",
        "[4/6] d: FAILED",
        "[5/6] e: FAILED",
        "[6/6] f: done",
    ]
    assert "accuracy 0.5" in told[0] and "train.py ended with 1" in told[1]
    text = "\n".join(failures(points))
    assert "FAILED b: train.py ended with 1; all that it said is in" in text
    assert "    error: the loss is nan\n    see there\nFAILED c: train.py was killed by SIGKILL" in text
    assert "\n    ValueError: too wide\nFAILED e: train.py ended, and the run is not finished;" in text
    assert "before" in points[1].log.read_text()
    assert [bool(programs_left(point, ())) for point in points] == [False, True, True, True, True, False]


# Waits for a second point, and notes how many are at work when it begins.
TOGETHER = """\
(folder / "begun").touch()
begun = lambda: [point for point in folder.parent.glob("p*") if (point / "begun").exists()]
(folder / "at_work").write_text(str(sum(not (point / "DONE").exists() for point in begun())))
while len(begun()) < 2:
    time.sleep(0.01)
finish()
"""


def test_points_share_the_cores_and_what_runs_at_a_time_is_bounded(play):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("one core")
    points = play(**{f"p{i}": TOGETHER for i in range(4)})
    assert sorted(run(points, jobs=2).done) == ["p0", "p1", "p2", "p3"]
    assert max(int((point.path / "at_work").read_text()) for point in points) == 2
    half = len(cores) // 2
    assert {starts(point)[0] for point in points} == {str(cores[:half]), str(cores[half:])}
    (alone,) = play(alone="finish()")
    run([alone])
    assert starts(alone) == [str(cores)]


def test_more_jobs_than_cores_share_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5, 7})
    assert running._shares(4) == [[3], [5], [7], [3]]
    assert running._shares(2) == [[3], [5, 7]]
    assert running._shares(1) == [[]]


def test_evaluations_follow_training_once(play):
    evaluations = ["perplexity --lengths 5", "recall"]
    points = play(a="finish()")
    assert run(points, evaluations).exit_code == EXIT_DONE
    assert run(points, evaluations).exit_code == EXIT_DONE
    calls = points[0].path / "calls"
    assert calls.read_text().splitlines() == evaluations and len(starts(points[0])) == 1
    run(points, ["perplexity --lengths 7", "recall"])  # other arguments
    assert calls.read_text().splitlines() == [*evaluations, "perplexity --lengths 7"]
    (points[0].path / "DONE").write_text('{"step": 5, "metrics": {}}')  # a longer run
    run(points, ["recall"])
    assert calls.read_text().splitlines()[3:] == ["recall"]


@pytest.mark.parametrize(
    ("suite", "reason"),
    [("broken", "evaluate broken ended with 1"), ("early", "evaluate early wrote no result of the run's last step")],
)
def test_an_evaluation_that_fails_is_a_failure_of_a_trained_point(play, suite, reason):
    points = play(a="finish()")
    assert run(points, [suite]).failed == ["a"]
    assert points[0].failed["reason"] == reason
    assert [x.name for x in programs_left(points[0], [suite])] == [f"evaluate {suite}"]


def test_a_stop_lets_points_save_and_begins_no_other(play, capfd):
    points = play(a="serve()", b="serve()", c="finish()")

    def stop():
        wait_until(lambda: all((point.path / "serves").exists() for point in points[:2]))
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop)
    stopper.start()
    outcome = run(points, jobs=2)
    stopper.join()
    assert (outcome.done, outcome.failed, sorted(outcome.stopped)) == ([], [], ["a", "b", "c"])
    assert outcome.exit_code == EXIT_RESTART and not starts(points[2])
    assert "once more kills them" in capfd.readouterr().err


def test_a_second_stop_kills(play):
    points = play(
        a="signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(folder / 'serves').write_text('')\ntime.sleep(600)"
    )

    def stop():
        for _ in range(2):
            wait_until(lambda: (points[0].path / "serves").exists())
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    stopper = threading.Thread(target=stop)
    stopper.start()
    began = time.monotonic()
    assert run(points).stopped == ["a"]
    assert time.monotonic() - began < 30
    stopper.join()


def test_a_point_that_is_to_be_started_again_is_not_a_failure(play):
    points = play(a="sys.exit(42)", b="finish()")
    outcome = run(points)
    assert (outcome.done, outcome.failed, outcome.stopped) == (["b"], [], ["a"])
    assert outcome.exit_code == EXIT_RESTART and points[0].failed is None


def test_a_run_directory_in_use_is_waited_for_and_then_left(play, monkeypatch, capsys):
    monkeypatch.setattr(running, "PATIENCE", 1.0)
    points = play(a="finish()", b="finish()")
    with (points[0].path / ".lock").open("w") as lock:
        lock.write("123\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        outcome = run(points)
    assert (outcome.done, outcome.stopped) == (["b"], ["a"])
    assert "in use by process 123" in capsys.readouterr().out
    assert run(points[:1]).done == ["a"]


RUNNER = """\
import sys
from pathlib import Path
from seqmodels.tools.sweep import run
from seqmodels.tools.sweep.folder import PointFolder
from seqmodels.tools.sweep.progress import Progress
run.ROOT = Path({root!r})
points = [PointFolder(Path(path), Path(path + ".log")) for path in {paths!r}]
with Progress([(point, 4) for point in points], "accuracy", len(points)) as progress:
    run.run_points(points, [], 2, progress)
"""


def test_points_do_not_outlive_a_runner_that_is_killed(play, tmp_path):
    points = play(a="serve()", b="serve()")
    text = RUNNER.format(root=str(running.ROOT), paths=[str(point.path) for point in points])
    with subprocess.Popen([sys.executable, "-c", text], cwd=REPOSITORY) as runner:
        try:
            wait_until(lambda: all((point.path / "serves").exists() for point in points), runner.poll)
            numbers = [int((point.path / "serves").read_text()) for point in points]
        finally:
            runner.kill()
    wait_until(lambda: not any(map(runs, numbers)))


def runs(number: int) -> bool:
    """Whether there is such a process, which is no zombie."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# The real train.py

SWEEP = """\
include 'configs/base.gin'
include 'configs/tasks/mqar.gin'
include 'configs/mixers/retention.gin'
LanguageModel.d_model = 16
LanguageModel.n_layers = 1
Retention.num_heads = 2
train.batch_size = 2
train.seq_len = 32
MQAR.num_kv_pairs = 4
train.eval_batches = 1
train.log_every = 1
AdamW.warmup_steps = 1
"""


def test_a_sweep_from_its_file_to_its_end(here, tmp_path):
    file, folder = tmp_path / "sweep.gin", tmp_path / "sweep"
    text = SWEEP + "train.steps = 4\nsweep.product = {'AdamW.learning_rate': [1e-3, 1e38]}\n"
    file.write_text(text)

    listed = here(program.main, file, "--dry_run", "--sweep_dir", folder)
    assert listed.code == EXIT_DONE and not folder.exists()
    assert "0.001: AdamW.learning_rate = 0.001\n1e+38: AdamW.learning_rate = 1e+38\n2 of 2 points" in listed.out

    wrong = here(program.main, file, "--sweep_dir", folder, "--gin.LanguageModel.d_modle=3")
    assert wrong.code == EXIT_INPUT and not folder.exists()
    assert wrong.err.startswith("error: 0.001 and the other point: command line: LanguageModel has no parameter")

    first = here(program.main, file, "--sweep_dir", folder, "--jobs", "2")
    assert first.code == EXIT_DEFECT, first
    assert "2 points: 0 done, 0 failed before, 2 to run, 2 at a time" in first.out
    assert "] 0.001: done after" in first.out and ", accuracy 0" in first.out
    assert "FAILED 1e+38: train.py ended with 1; all that it said is in" in first.out
    assert "\n    error: " in first.out and "not finite" in first.out
    rows = [json.loads(line) for line in (folder / "0.001" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4]

    before = (folder / "logs" / "1e+38.log").read_bytes()
    again = here(program.main, file, "--sweep_dir", folder)
    assert again.code == EXIT_DEFECT and "2 points: 1 done, 1 failed before, 0 to run" in again.out
    assert "not tried again: 1e+38; --retry does" in again.out
    assert (folder / "logs" / "1e+38.log").read_bytes() == before

    done = here(program.main, file, "--sweep_dir", folder, "--only", "learning_rate=0.001")
    assert done.code == EXIT_DONE and "1 points: 1 done" in done.out

    retried = here(program.main, file, "--sweep_dir", folder, "--retry", "--only", "1e+38")
    assert retried.code == EXIT_DEFECT
    assert "retrying 1e+38, which failed: train.py ended with 1" in retried.out
    assert (folder / "logs" / "1e+38.log").read_bytes().startswith(before)


def sweep_command(file: Path, folder: Path) -> list[str]:
    options = ["--sweep_dir", str(folder), "--jobs", "2"]
    return [sys.executable, "-m", "seqmodels.tools.sweep", str(file), *options]


@contextlib.contextmanager
def started(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen]:
    """The process of a command; it does not outlive the block."""
    with subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.slow
def test_three_kills_leave_no_trace(tmp_path, own_cache):
    file, seed, steps = tmp_path / "sweep.gin", 0, 40
    more = "train.steps = 40\ntrain.checkpoint_every = 4\ntrain.eval_every = 10\n"
    more += "sweep.evaluate = ['recall --lengths 32 64']\n"
    file.write_text(SWEEP + more + "sweep.product = {'LanguageModel.d_model': [16, 32]}\n")
    env = own_cache | {"PYTHONPATH": str(REPOSITORY)}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    names = ["16", "32"]
    subprocess.run(sweep_command(file, undisturbed), env=env, check=True)

    def updates() -> int:
        return sum(PointFolder(killed / name, killed / "log").step for name in names)

    def wait_for_updates(number: int, runner: subprocess.Popen) -> None:
        wait_until(lambda: updates() >= number, lambda: runner.poll() is not None)

    chance, moments = random.Random(seed), []
    for _ in range(3):
        after, delay = chance.randrange(0, len(names) * steps * 3 // 4), chance.uniform(0.0, 3.0)
        with started(sweep_command(file, killed), env) as runner:
            wait_for_updates(after, runner)
            time.sleep(delay)
            runner.kill()
            assert runner.wait() == -signal.SIGKILL
        moments.append(f"{delay:.1f} s after {updates()} updates")
    note = f"seed {seed}, killed {'; '.join(moments)}"
    ended = subprocess.run(sweep_command(file, killed), env=env, capture_output=True, text=True)
    assert ended.returncode == EXIT_DONE, (ended, note)
    for name in names:
        configs, results = ("config.gin", "operative_config.gin", "point.json"), ("DONE", "evaluations/recall.json")
        for part in ("metrics.jsonl", *configs, *results):
            assert (killed / name / part).read_bytes() == (undisturbed / name / part).read_bytes(), (name, part, note)
    assert (killed / "sweep.json").read_bytes() == (undisturbed / "sweep.json").read_bytes(), note
    reports = [tmp_path / f"report of {folder.name}" for folder in (undisturbed, killed)]
    for folder, out in zip((undisturbed, killed), reports):
        assert report.main([str(folder), "--no_pictures", "--out", str(out)]) == EXIT_DONE
    for part in ("summary.csv", "results.csv"):  # times are in another file
        assert len({(out / part).read_bytes() for out in reports}) == 1, (part, note)
