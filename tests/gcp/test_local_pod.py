"""A job on a pod of this machine: what lost hosts, requests to stop, defects and wrong configs lead to.

In a plain run the pod has two hosts, and its losses are those of one device; in a slow one it has four.
"""

import os
import signal
from pathlib import Path

import pytest

from seqmodels import config
from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, EXIT_INPUT
from seqmodels.files import to_path
from tests.gcp.pods import LocalPod, log_of, tiny_job, write_job
from tests.program.programs import REPOSITORY, contents, load_train_program, write_config
from tests.program.test_processes import assert_same_losses

pytestmark = pytest.mark.xdist_group("programs")

PROGRAM_WITH_DEFECT = Path(__file__).with_name("train_with_defect.py")
ONE_DEVICE = ("--devices", "1")
ON_MESH = "train.mesh=@DeviceMesh()"
MIXED = ("DeviceMesh.data=1", "DeviceMesh.fsdp=2", "DeviceMesh.seq=2", "DeviceMesh.tensor=-1")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> dict[str, str]:
    """An environment with a compilation cache of its own, for processes that may be killed while they write it."""
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled"))}


@pytest.fixture
def job_file(tmp_path):
    """Write a job file: `job_file(more of the config, **keys of the job)`."""

    def write(more: str = "", gin: tuple[str, ...] = (), **keys) -> Path:
        return write_job(tmp_path / "job.toml", tiny_job(write_config(tmp_path, more), gin=[ON_MESH, *gin], **keys))

    return write


def run_alone(folder: Path) -> Path:
    """The run directory of the same config, in this process and on one device."""
    run = folder / "alone"
    try:
        assert load_train_program()(["--config", str(folder / "tiny.gin"), "--run_dir", str(run)]) == EXIT_DONE
    finally:
        config.clear()
    return run


def without_logs(run: Path) -> dict[str, str]:
    return {name: digest for name, digest in contents(run).items() if not name.startswith("logs")}


def test_a_host_is_stopped_then_one_is_killed_and_the_run_is_that_of_one_device(job_file, cache, tmp_path):
    run = tmp_path / "run"
    job = job_file("train.steps = 8\ntrain.eval_every = 8\n")
    with LocalPod(job, run, *ONE_DEVICE, env=cache) as pod:
        pod.wait_for_step(2, attempt=0)
        os.kill(pod.entry("slice-0-host-1", 0), signal.SIGTERM)
        stopped = int(pod.wait_for_line(r"stopped after step (\d+) and saved")[1])
        pod.wait_for_step(stopped + 1, attempt=1)
        os.kill(pod.entry("slice-0-host-1", 1), signal.SIGKILL)
        assert pod.ended() == EXIT_DONE, pod.text
    assert f"continuing after step {stopped}" in pod.text
    assert "has ended with 42: restart 1 of 50" in pod.text
    assert "slice-0-host-1 has ended with 42, ended by SIGKILL, taken for a lost process: restart 2 of 50" in pod.text

    before = without_logs(run)
    with LocalPod(job, run, *ONE_DEVICE, env=cache) as pod:
        assert pod.ended() == EXIT_DONE
    assert "finished at step 8, nothing left to do" in pod.text and "restart" not in pod.text
    assert without_logs(run) == before

    assert_same_losses(run, run_alone(tmp_path))


@pytest.mark.slow
def test_a_pod_of_four_hosts_that_is_stopped_and_killed_is_as_an_undisturbed_one(job_file, cache, tmp_path):
    job, run = job_file(gin=MIXED), tmp_path / "run"
    with LocalPod(job, run, env=cache, processes=4) as pod:
        pod.wait_for_step(6, attempt=0)
        os.kill(pod.entry("slice-0-host-3", 0), signal.SIGTERM)
        pod.wait_for_step(14, attempt=1)
        os.kill(pod.entry("slice-0-host-2", 1), signal.SIGKILL)
        pod.wait_for_step(22, attempt=2)
        os.kill(pod.entry("slice-0-host-0", 2), signal.SIGKILL)  # where the processes' coordinator is
        assert pod.ended() == EXIT_DONE, pod.text
    assert "restart 3 of 50" in pod.text and "restart 4" not in pod.text
    with LocalPod(job, tmp_path / "undisturbed", env=cache, processes=4) as pod:
        assert pod.ended() == EXIT_DONE, pod.text
    assert "restart" not in pod.text
    assert_same_losses(run, tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_pod_whose_run_is_in_a_bucket_loses_a_host_and_goes_on(job_file, cache, gcs, tmp_path):
    job, run = job_file("train.steps = 12\ntrain.eval_every = 12\n"), "gs://bucket/runs/pod"
    with LocalPod(job, run, *ONE_DEVICE, env=cache | gcs.environment) as pod:
        pod.wait_for(lambda: "checkpoints/4/commit_success.txt" in gcs.below("runs/pod"))
        os.kill(pod.entry("slice-0-host-1", 0), signal.SIGKILL)
        assert pod.ended() == EXIT_DONE, pod.text
    assert "restart 1 of 50" in pod.text and "continuing after step" in pod.text
    assert {"DONE", *(f"logs/attempt-{i}/slice-0-host-0.log" for i in range(2))} <= gcs.below("runs/pod").keys()
    assert_same_losses(to_path(run), run_alone(tmp_path))


def check_defect(job: Path, run: Path, env: dict[str, str], processes: int, rank: int, step: int) -> None:
    more = {"DEFECT": f"{rank}:{step}", "PYTHONPATH": str(REPOSITORY)}
    with LocalPod(job, run, *ONE_DEVICE, env=env | more, processes=processes) as pod:
        assert pod.ended() == EXIT_DEFECT, pod.text
    assert "restart" not in pod.text
    told = pod.when(rf"\[slice-0-host-{rank}\] TypeError: a defect at step {step}")
    assert pod.when(r"\[local\] exit code 1") - told < 30
    for peer in set(range(processes)) - {rank}:
        log = log_of(run, f"slice-0-host-{peer}")
        assert f"process {rank} failed (exit code 1): TypeError: a defect at step {step}" in log
        assert "entry: exit code 1" in log and "Traceback" not in log


def test_a_defect_in_one_process_ends_all_and_is_not_tried_again(job_file, cache, tmp_path):
    check_defect(job_file(program=PROGRAM_WITH_DEFECT), tmp_path / "run", cache, processes=2, rank=1, step=0)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "step"), [(2, 0), (2, 9), (0, 0), (0, 9)])
def test_a_defect_in_one_of_four(job_file, cache, tmp_path, rank, step):
    """At the start, and in the step after a save began, which is completed."""
    check_defect(job_file(program=PROGRAM_WITH_DEFECT), tmp_path / "run", cache, processes=4, rank=rank, step=step)
    assert step == 0 or (tmp_path / "run" / "checkpoints" / "8").exists()


def test_a_wrong_config_is_told_once_by_each_and_not_tried_again(job_file, cache, tmp_path):
    with LocalPod(job_file(gin=("train.stepps=3",)), tmp_path / "run", env=cache) as pod:
        assert pod.ended() == EXIT_INPUT, pod.text
    assert pod.text.count("error: ") == 2 and "did you mean 'steps'?" in pod.text
    assert "Traceback" not in pod.text and "restart" not in pod.text
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["logs"]


@pytest.mark.slow
def test_two_slices_are_one_mesh(job_file, cache, tmp_path):
    job = job_file("train.steps = 8\n", slices=2)
    with LocalPod(job, tmp_path / "run", *ONE_DEVICE, env=cache, processes=4) as pod:
        assert pod.ended() == EXIT_DONE, pod.text
    assert "devices: 4 x cpu, in 4 process(es)" in pod.text and "mesh: data=4" in pod.text
    assert sorted(path.name for path in (tmp_path / "run/logs/attempt-0").iterdir()) == [
        f"slice-{i}-host-{j}.log" for i in range(2) for j in range(2)
    ]
    assert "DeviceMesh.slices = 2" in (tmp_path / "run/operative_config.gin").read_text()
