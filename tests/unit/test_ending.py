"""When one process of a job fails, is killed, or is asked to stop, all end soon and with one exit code."""

import signal
import socket
import subprocess
import sys
import time
from typing import NamedTuple

import jax
import pytest

from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, EXIT_INPUT, EXIT_RESTART, InputError
from seqmodels.parallel import ending
from seqmodels.parallel.ending import may_be_lost_contact, run_as_one

# Sums over all devices, one after the other, and in one process what the test says.
PROGRAM = """
import os, signal, sys, time
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from seqmodels.errors import InputError, run_main
from seqmodels.parallel import ending
from seqmodels.parallel.start_up import _join

address, processes, process, culprit, moment, deed = sys.argv[1:]
processes, process, culprit = int(processes), int(process), int(culprit)

def defect():
    raise TypeError("a defect")

def wrong_input():
    raise InputError("an input is wrong")

def defect_on_the_device():
    jax.jit(lambda: jax.pure_callback(lambda: 1 / 0, jax.ShapeDtypeStruct((), jnp.float32)))().block_until_ready()

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def stop():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(30)

def stop_late():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(3)

def at(now):
    if now == moment and culprit in (process, -1):
        globals()[deed]()

def program():
    at("start")
    mesh = jax.make_mesh((jax.device_count(),), ("x",), axis_types=(AxisType.Auto,))
    x = jax.device_put(jnp.zeros(jax.device_count()), NamedSharding(mesh, PartitionSpec("x")))
    f = jax.jit(lambda x: x + x.sum())
    ending.handle_stops()
    for step in range(20):
        f(x).block_until_ready()
        if step == 10:
            at("middle")
    at("end")
    return 0

_join(60, coordinator_address=address, num_processes=processes, process_id=process)
print("joined", flush=True)
ending.BLAME_WITHIN = 2.5
run_main(lambda argv: ending.run_as_one(program))
"""


class Ended(NamedTuple):
    """How a process ended. after: seconds since the last had joined the others."""

    code: int
    said: str
    after: float


def run_job(culprit: int, moment: str, deed: str, processes: int = 3) -> list[Ended]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    words = [[address, str(processes), str(rank), str(culprit), moment, deed] for rank in range(processes)]
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *own], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for own in words
    ]
    try:
        for job in jobs:
            assert job.stdout.readline() == "joined\n"
        began = time.monotonic()
        deadline, after = began + 120, [0.0] * processes
        while any(job.poll() is None for job in jobs) and time.monotonic() < deadline:
            after = [x if job.poll() is not None else time.monotonic() - began for x, job in zip(after, jobs)]
            time.sleep(0.01)
        return [Ended(job.poll(), job.stdout.read(), x) for x, job in zip(after, jobs)]
    finally:
        for job in jobs:
            job.kill()


@pytest.mark.parametrize(
    ("culprit", "moment", "deed"), [(1, "start", "defect"), (0, "middle", "defect"), (2, "end", "defect_on_the_device")]
)
def test_a_defect_in_one_process_is_the_end_of_all_and_all_know_whose_it_is(culprit, moment, deed):
    ends = run_job(culprit, moment, deed, processes=max(culprit + 1, 2))
    assert {end.code for end in ends} == {EXIT_DEFECT}, ends
    error = "TypeError: a defect" if deed == "defect" else "JaxRuntimeError: INTERNAL: CpuCallback error"
    for rank, end in enumerate(ends):
        assert ("Traceback (most recent call last)" in end.said) == (rank == culprit) or deed != "defect", end.said
        assert (f"process {culprit} failed (exit code 1): {error}" in end.said) == (rank != culprit), end.said
        assert end.after < 20


def test_a_wrong_input_of_one_process_is_the_exit_code_of_all():
    ends = run_job(0, "start", "wrong_input", processes=2)
    assert [end.code for end in ends] == [EXIT_INPUT] * 2, ends
    assert ends[0].said == "error: an input is wrong\n"
    assert ends[1].said == "process 0 failed (exit code 2): an input is wrong\n"


def test_a_wrong_input_of_all_is_told_in_one_line_by_each():
    for rank, end in enumerate(run_job(-1, "start", "wrong_input", processes=2)):
        assert end.code == EXIT_INPUT
        other = f"process {1 - rank} failed (exit code 2): an input is wrong\n"
        assert end.said in ("error: an input is wrong\n", other)


def test_a_killed_process_makes_the_others_ask_for_a_restart():
    ends = run_job(2, "middle", "kill")
    assert [end.code for end in ends] == [EXIT_RESTART, EXIT_RESTART, -signal.SIGKILL], ends
    assert all("ends the job (exit code 42): lost contact with other processes" in end.said for end in ends[:2])
    assert all(end.after < 30 for end in ends)


def test_without_process_0_the_others_abort_soon():
    """Which who started them takes for a lost process."""
    ends = run_job(0, "middle", "kill", processes=2)
    assert [end.code for end in ends] == [-signal.SIGKILL, -signal.SIGABRT], ends
    assert ends[1].after < 20


def test_a_request_to_stop_before_the_first_step_ends_all_at_once():
    ends = run_job(1, "start", "stop", processes=2)
    assert [end.code for end in ends] == [EXIT_RESTART] * 2, ends
    assert all("ends the job (exit code 42): asked to stop before the first step" in end.said for end in ends)
    assert all(end.after < 20 for end in ends)


def test_all_end_well_together_also_where_one_is_asked_to_stop_after_the_last_step():
    ends = run_job(1, "end", "stop_late", processes=2)
    assert [end.code for end in ends] == [EXIT_DONE] * 2, ends
    assert all("ends the job" not in end.said and "Traceback" not in end.said for end in ends)


def test_one_process_alone_returns_what_its_program_returns():
    assert run_as_one(lambda: 42) == 42
    with pytest.raises(InputError, match="wrong"):
        run_as_one(lambda: (_ for _ in ()).throw(InputError("wrong")))


def error_within(outer: Exception, inner: Exception, *, cause: bool) -> Exception:
    try:
        try:
            raise inner
        except Exception as error:
            raise outer from (error if cause else None)
    except Exception as error:
        return error


LOST = jax.errors.JaxRuntimeError("UNAVAILABLE: the other end has gone")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (LOST, True),
        (jax.errors.JaxRuntimeError("INTERNAL: something"), True),
        (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), True),
        (jax.errors.JaxRuntimeError("FAILED_PRECONDITION: Gloo all-reduce failed: Connection closed by peer"), True),
        (ValueError("UNKNOWN: Gloo all-reduce failed: Read error: Connection reset by peer"), True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (error_within(KeyError("x"), LOST, cause=True), True),
        (error_within(KeyError("x"), LOST, cause=False), False),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: Executable expected"), False),
        (jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile TPU kernel"), False),
        (jax.errors.JaxRuntimeError("INTERNAL: CpuCallback error: Traceback (most recent call last):"), False),
        (ValueError("shapes do not match"), False),
        (NameError("name 'gloo' is not defined"), False),
        (FileNotFoundError(2, "No such file"), False),
        (MemoryError(), False),
    ],
    ids=lambda x: str(x)[:40],
)
def test_which_errors_a_lost_process_can_cause(error, lost):
    assert may_be_lost_contact(error) == lost


def test_a_processes_own_word_comes_in_time():
    assert ending.LOOK_EVERY < ending.LINGER < ending.BLAME_WITHIN < ending.LAST_RESORT
