"""Several processes are one job: the numbers of one process, and checkpoints that any number of them goes on from."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from seqmodels.errors import EXIT_DONE
from seqmodels.training.run_directory import read_metrics
from tests.program.programs import train_command, write_config
from tests.tolerances import FLOAT32

pytestmark = pytest.mark.xdist_group("programs")

MIXED = ("--gin.DeviceMesh.data=1", "--gin.DeviceMesh.fsdp=2", "--gin.DeviceMesh.seq=2", "--gin.DeviceMesh.tensor=-1")
PATIENCE = 240.0


@contextlib.contextmanager
def running(processes: int, devices: int, gin: Path, run: Path, *more: str) -> Iterator[list[subprocess.Popen]]:
    """The processes of a job with so many devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = train_command(gin, run, "--gin.train.mesh=@DeviceMesh()", *more)
    together = ["--coordinator", f"localhost:{port}", "--processes", str(processes), "--process"]
    jobs = [
        subprocess.Popen(
            [*command, *([*together, str(rank)] if processes > 1 else [])],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        yield jobs
    finally:
        # SIGTERM is a request to save and stop.
        for job in jobs:
            job.kill()


def run_job(*job) -> str:
    """Run it to its end; what the first process said."""
    with running(*job) as jobs:
        said = [process.communicate(timeout=PATIENCE)[0] for process in jobs]
    assert [process.returncode for process in jobs] == [EXIT_DONE] * len(jobs), said[0][-3000:]
    return said[0]


def assert_same_losses(run: Path, reference: Path) -> None:
    """But for rounding, which each update may add to: every step's and every evaluation's."""
    rows, others = (read_metrics(folder / "metrics.jsonl") for folder in (run, reference))
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, other in zip(rows, others):
        name = "loss" if "loss" in row else "eval/loss"
        assert abs(row[name] - other[name]) <= row["step"] * 2**5 * FLOAT32 * other[name], (row, other)


@pytest.fixture(scope="module")
def short_job(tmp_path_factory) -> Path:
    return write_config(tmp_path_factory.mktemp("processes"), "train.steps = 8\ntrain.eval_every = 4\n")


def test_two_processes_are_one_job_that_one_process_continues(short_job, tmp_path):
    run_job(1, 4, short_job, tmp_path / "one", *MIXED)
    run_job(2, 2, short_job, tmp_path / "two", *MIXED)
    assert_same_losses(tmp_path / "two", tmp_path / "one")
    # The same config with fewer steps done: what two have saved, one goes on from, on another mesh.
    shutil.rmtree(tmp_path / "two" / "checkpoints" / "8")
    (tmp_path / "two" / "DONE").unlink()
    assert "continuing after step 4" in run_job(1, 4, short_job, tmp_path / "two", *MIXED)
    assert_same_losses(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_a_killed_process_and_a_restart_leave_no_trace(tmp_path):
    """Four processes; one is killed after a checkpoint, the others end, and the same command goes on. Then what four
    have saved is gone on from by one, and by two."""
    gin = write_config(tmp_path)
    run_job(1, 8, gin, tmp_path / "one", *MIXED)
    with running(4, 2, gin, tmp_path / "four", *MIXED) as jobs:
        deadline = time.monotonic() + PATIENCE
        while not (tmp_path / "four" / "checkpoints" / "8").exists():
            assert time.monotonic() < deadline and all(job.poll() is None for job in jobs)
            time.sleep(0.1)
        jobs[2].kill()
        for job in jobs:
            assert job.wait(timeout=PATIENCE) != EXIT_DONE
    for processes in (1, 2, 4):
        shutil.copytree(tmp_path / "four", tmp_path / f"by {processes}")
        said = run_job(processes, 8 // processes, gin, tmp_path / f"by {processes}", *MIXED)
        assert "continuing after step" in said
        assert_same_losses(tmp_path / f"by {processes}", tmp_path / "one")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "2"], "--processes is given without --coordinator, --process"),
        (["--coordinator", "here:1", "--processes", "2", "--process", "2"], "--process is 2 of --processes 2"),
        (["--coordinator", "here", "--processes", "2", "--process", "0"], "expected HOST:PORT"),
    ],
)
def test_flags_that_contradict_each_other(here, train, short_job, tmp_path, flags, message):
    ended = here(train, "--config", short_job, "--run_dir", tmp_path / "run", *flags)
    assert ended.code == 2 and message in ended.err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["DeviceMesh.seq=3"], "DeviceMesh: mesh (data=-1, fsdp=1, seq=3, tensor=1) does not fit 8 devices"),
        (["DeviceMesh.data=1", "DeviceMesh.seq=16"], "does not fit 8 devices"),
        (["DeviceMesh.fsdp=8", "DeviceMesh.data=1"], "train.batch_size is 4: expected a multiple of 8"),
        (["DeviceMesh.seq=8", "train.seq_len=36"], "train.seq_len is 36: expected a multiple of 8"),
        (["DeviceMesh.tensor=8"], "the mesh's tensor = 8 does not split heads: 2; expected a multiple of 8"),
        (["DeviceMesh.seq=8", "DeviceMesh.rules=[('kernel', ('time',))]"], "names the axis 'time'; expected data"),
        (["DeviceMesh.seq=8", "GatedLinearAttention.exchange='ring'"], "exchange='ring' does not exist for it"),
        (["DeviceMesh.seq=8", "GatedLinearAttention.exchange='ulysses'"], "= 8 does not split heads: 2"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_a_mesh_that_does_not_fit(here, train, short_job, tmp_path, overrides, message):
    gin = [f"--gin.{override}" for override in ("train.mesh=@DeviceMesh()", *overrides)]
    ended = here(train, "--config", short_job, "--run_dir", tmp_path / "run", *gin)
    assert ended.code == 2 and message in ended.err and len(ended.err.splitlines()) == 1, ended
    assert not (tmp_path / "run").exists()
