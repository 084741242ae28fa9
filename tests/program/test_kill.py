"""A run that is killed at random moments, again and again, ends as if nothing had happened."""

import contextlib
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from seqmodels.errors import EXIT_DONE
from tests.program.programs import STEPS, assert_same_run, run_command, train_command

pytestmark = pytest.mark.xdist_group("programs")

SEED = 0
SAVE = "*.orbax-checkpoint-tmp"
Job = tuple[list[str], dict[str, str]]  # a command and its environment
PATIENCE = 120.0  # seconds until a process that shows no progress fails the test


def last_step(run: Path) -> int:
    """The step of the last complete row of the metrics."""
    try:
        rows = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return int(rows[-1].split(b'"step": ')[1].split(b",")[0]) if rows else 0


def identity(file: Path) -> int | None:
    """The number of a file on its disk: another one when it has been replaced, the same when it has grown."""
    return file.stat().st_ino if file.exists() else None


@contextlib.contextmanager
def running(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen]:
    """The process of a command; it does not outlive the block."""
    with subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition, process: subprocess.Popen) -> None:
    """Return as soon as `condition()` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, f"ended by itself with {process.returncode}: {process.stderr.read()}"
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.001)


def kill_during_start(job: Job, chance: random.Random) -> str:
    delay = chance.uniform(0.2, 4.0)
    with running(*job) as process:
        time.sleep(delay)
        assert process.poll() is None
        process.kill()
    return f"{delay:.3f} s after the start"


def kill_after_step(job: Job, run: Path, chance: random.Random, step: int) -> str:
    """Rows of an earlier process do not count: the new one replaces the file before its first step."""
    delay, earlier = chance.uniform(0.0, 0.05), identity(run / "metrics.jsonl")
    with running(*job) as process:
        wait_for(lambda: identity(run / "metrics.jsonl") != earlier and last_step(run) >= step, process)
        time.sleep(delay)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    return f"{delay:.3f} s after step {step}"


def kill_during_save(job: Job, run: Path, chance: random.Random) -> str:
    """The process is halted to look, so that what is seen is what it is killed in."""
    with running(*job) as process:
        while True:
            wait_for(lambda: list((run / "checkpoints").glob(SAVE)), process)
            time.sleep(chance.uniform(0.0, 0.005))
            process.send_signal(signal.SIGSTOP)
            os.waitpid(process.pid, os.WUNTRACED)
            if unfinished := [folder.name for folder in (run / "checkpoints").glob(SAVE)]:
                break
            process.send_signal(signal.SIGCONT)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert [folder.name for folder in (run / "checkpoints").glob(SAVE)] == unfinished
    return f"while saving {unfinished[0]}"


def test_five_kills_leave_no_trace(undisturbed, own_cache, tmp_path):
    run, chance = tmp_path / "run", random.Random(SEED)
    command = train_command(undisturbed.parent / "tiny.gin", run)
    job = (command, own_cache)
    # In the last quarter the run could end before the blow falls.
    steps = sorted(chance.sample(range(2, STEPS - STEPS // 4), 3))
    moments = [kill_during_start(job, chance)]
    save_comes_after = chance.randrange(3)
    for i, step in enumerate(steps):
        moments.append(kill_after_step(job, run, chance, step))
        if i == save_comes_after:
            moments.append(kill_during_save(job, run, chance))
    ended = run_command(command, env=own_cache)
    note = f"seed {SEED}, killed {'; '.join(moments)}"
    assert len(moments) == 5 and ended.code == EXIT_DONE, (ended, note)
    assert_same_run(run, undisturbed, note)
    assert not list((run / "checkpoints").glob(SAVE)), note
