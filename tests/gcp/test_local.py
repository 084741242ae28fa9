"""What `gcp.local` does when a process ends, and what it gives to every process; the program pretends."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from gcp import entry, local
from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, EXIT_INPUT, EXIT_RESTART, InputError
from tests.gcp.pods import LocalPod, log_of, tiny_job, write_job

pytestmark = pytest.mark.filterwarnings("ignore:os.fork")  # JAX minds; it is not used in these children

PROGRAM = Path(__file__).with_name("pretend.py")


@pytest.fixture
def play(monkeypatch, capfd, tmp_path):
    """Play a job whose processes end as told; the exit code, and what was printed."""

    def play(ends="", processes=2, *, grace=10.0, all_logs=False, **keys) -> tuple[int, str]:
        monkeypatch.setenv("ENDS", ends)
        job = tiny_job(tmp_path / "tiny.gin", PROGRAM, **keys)
        code = local.run_local(job, processes, tmp_path / "run", grace=grace, all_logs=all_logs)
        return code, capfd.readouterr().out

    return play


def variables(log: str) -> dict[str, str]:
    return json.loads(log.splitlines()[3])


def test_all_done_is_done(play, tmp_path):
    code, said = play()
    assert code == EXIT_DONE and said.splitlines()[-1] == "[local] exit code 0: done"
    assert sorted(path.name for path in (tmp_path / "run/logs/attempt-0").iterdir()) == [
        "slice-0-host-0.log",
        "slice-0-host-1.log",
    ]


def test_a_code_to_start_again_starts_all_again_with_the_next_attempt(play, tmp_path):
    code, said = play("0.1=42 1.0=SIGKILL")
    assert code == EXIT_DONE, said
    restarts = re.findall(r"\[local\] (.*: restart \d of 50)", said)
    assert restarts == [
        "slice-0-host-1 has ended with 42: restart 1 of 50",
        "slice-0-host-0 has ended with 42: restart 2 of 50",
    ]
    for attempt in range(3):
        assert variables(log_of(tmp_path / "run", "slice-0-host-1", attempt))["SEQMODELS_ATTEMPT"] == str(attempt)
    assert "ended by SIGKILL, taken for a lost process" in log_of(tmp_path / "run", "slice-0-host-0", 1)
    # The others were asked to end, and did.
    assert "exit code 42" in log_of(tmp_path / "run", "slice-0-host-0", 0)


@pytest.mark.parametrize(("end", "code"), [("1", EXIT_DEFECT), ("2", EXIT_INPUT), ("7", EXIT_DEFECT)])
def test_what_is_not_to_be_tried_again_ends_the_job(play, end, code):
    found, said = play(f"0.1={end}", processes=3)
    assert found == code and "restart 1" not in said
    assert said.splitlines()[-1] == f"[local] exit code {code}: slice-0-host-1 has failed"


def test_restarts_that_are_used_up_are_a_failure(play):
    code, said = play("0.0=42 1.0=42 2.0=42 3.0=42", max_restarts=2)
    assert code == EXIT_DEFECT
    assert said.splitlines()[-1] == "[local] exit code 1: given up after 2 restarts; the same command goes on"
    assert "attempt 2" in said and "attempt 3" not in said


def test_a_process_that_does_not_end_is_killed(play, monkeypatch):
    monkeypatch.setenv("STUBBORN", "1")
    before = time.monotonic()
    code, said = play("0.0=42", grace=0.5)
    assert code == EXIT_DONE and time.monotonic() - before < 10, said


def test_of_others_than_the_first_only_starts_ends_and_errors_are_shown(play):
    _, said = play("0.1=42")
    others = [line for line in said.splitlines() if line.startswith("[slice-0-host-1]")]
    kinds = [re.sub(r"process \d+ on .*", "", line.removeprefix("[slice-0-host-1] ")) for line in others]
    assert kinds == [
        "entry: slice-0-host-1, attempt 0: ",
        "error: one that is shown",
        "entry: exit code 42, to be started again",
        "entry: slice-0-host-1, attempt 1: ",
        "entry: exit code 0, done",
    ]
    assert "[slice-0-host-0] a line that is not shown" in said
    _, said = play(all_logs=True)
    assert "[slice-0-host-1] a line that is not shown" in said


def test_a_traceback_is_shown_to_its_last_line():
    screen = local._Screen(local.Host(0, 0), all_logs=False)
    lines = ["noise", "Traceback (most recent call last):", "  File", "    call", "", "TypeError: it", "noise"]
    assert [screen._tells(local.Host(0, 1), line) for line in lines] == [False, True, True, True, True, True, False]


def test_the_environment_is_that_of_a_pod(play, monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_FLAGS", "--xla_own=1")
    _, said = play(
        env={"SEQMODELS_X": "x", "XLA_FLAGS": "--xla_tpu_x=1", "JAX_COMPILATION_CACHE_DIR": "gs://bucket/x"},
        secrets={"WANDB_API_KEY": "wandb:key"},
        data={"/data/corpus": "gs://bucket/corpus"},
    )
    for host in range(2):
        found = variables(log_of(tmp_path / "run", f"slice-0-host-{host}"))
        expected = {
            "TPU_WORKER_ID": str(host),
            "TPU_WORKER_HOSTNAMES": "localhost,localhost",
            "MEGASCALE_NUM_SLICES": "",
            "MEGASCALE_SLICE_ID": "",
            "MEGASCALE_COORDINATOR_ADDRESS": "",
            "SEQMODELS_ATTEMPT": "0",
            "SEQMODELS_X": "x",
            "JAX_PLATFORMS": "cpu",
            "JAX_FORCE_TPU_INIT": "1",
            "TPU_SKIP_MDS_QUERY": "1",
            "XLA_FLAGS": "--xla_own=1 --xla_force_host_platform_device_count=2",
        }
        assert {name: found[name] for name in expected} == expected
        assert not found.get("JAX_COMPILATION_CACHE_DIR", "").startswith("gs:")
    assert "left out of the environment: XLA_FLAGS, JAX_COMPILATION_CACHE_DIR" in said
    assert "secrets that are not set here: WANDB_API_KEY" in said
    assert "/data/corpus is not here" in said


def test_processes_divide_over_slices(play, tmp_path):
    code, _ = play(processes=4, slices=2)
    assert code == EXIT_DONE
    for slice, host in ((0, 0), (0, 1), (1, 0), (1, 1)):
        log = log_of(tmp_path / "run", f"slice-{slice}-host-{host}")
        found = variables(log)
        assert (found["MEGASCALE_SLICE_ID"], found["TPU_WORKER_ID"]) == (str(slice), str(host))
        assert (found["MEGASCALE_NUM_SLICES"], found["TPU_WORKER_HOSTNAMES"]) == ("2", "localhost,localhost")
        assert found["MEGASCALE_COORDINATOR_ADDRESS"] == "localhost"
        assert "--gin.DeviceMesh.slices=2" in json.loads(log.splitlines()[4])


def test_the_command_is_that_of_the_manifest_with_another_folder(play, tmp_path):
    play(gin=["train.steps=3"])
    arguments = json.loads(log_of(tmp_path / "run", "slice-0-host-0").splitlines()[4])
    job = tiny_job(tmp_path / "tiny.gin", PROGRAM, gin=["train.steps=3"])
    assert job.command(str(tmp_path / "run"))[-len(arguments) :] == arguments


@pytest.mark.parametrize(("processes", "devices"), [(3, 1), (0, 1), (2, 0)])
def test_numbers_that_do_not_fit(tmp_path, processes, devices):
    job = tiny_job(tmp_path / "tiny.gin", PROGRAM, slices=2)
    with pytest.raises(InputError, match="expected"):
        local.run_local(job, processes, tmp_path / "run", devices=devices)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_to_end_ends_all_and_leaves_no_process(tmp_path, number):
    job = write_job(tmp_path / "job.toml", tiny_job(tmp_path / "tiny.gin", PROGRAM))
    # Shells start what runs in the background so that it ignores Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    pod = LocalPod(job, tmp_path / "run", env=os.environ | {"ENDS": "0.9=0"})
    signal.signal(signal.SIGINT, before)
    with pod:
        entries = [pod.entry(f"slice-0-host-{host}", 0) for host in range(2)]
        pod.wait_for_line("a line that is not shown")
        pod.process.send_signal(number)
        assert pod.ended() == EXIT_RESTART, pod.text
    assert pod.lines[-1][1] == "[local] exit code 42: ended on request, the same command goes on"
    assert "Traceback" not in pod.text
    for process in entries:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_the_grace_of_the_entry_is_within_that_of_the_pod():
    assert entry.GRACE + entry.LAST_OUTPUT < local.GRACE
