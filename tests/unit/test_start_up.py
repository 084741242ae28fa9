"""Compiled programs are kept from one start to the next, and what a killed process left is not. Compilers for devices
that are not there are silent. Hosts of a pod find each other, or say that they do not."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from seqmodels.errors import EXIT_RESTART
from seqmodels.parallel import start_up
from seqmodels.start_up import has_nvidia_driver, has_tpu_chips

PROGRAM = """
import os, signal, sys
from seqmodels.start_up import prepare_jax
prepare_jax()
import jax
jax.jit(lambda x: x * 3 + 1)(2.0)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run(folder: Path, how: str, *unset: str) -> None:
    unset += ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["XDG_CACHE_HOME"] = str(folder)
    process = subprocess.run([sys.executable, "-c", PROGRAM, how], env=environment, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (0 if how == "ends" else -9, "")


def entries(folder: Path) -> dict[str, float]:
    """Kept programs, and when each was written."""
    kept = (folder / "seqmodels" / "xla").glob("*-cache")
    return {path.name: path.stat().st_mtime_ns for path in kept}


def test_programs_are_kept_but_not_those_of_a_killed_process(tmp_path):
    run(tmp_path, "ends")
    kept = entries(tmp_path)
    assert kept
    run(tmp_path, "ends")
    assert entries(tmp_path) == kept

    other = tmp_path / "other"
    run(other, "killed")
    suspect = entries(other)
    assert suspect
    run(other, "ends")
    assert entries(other).keys() == suspect.keys()
    assert all(entries(other)[name] > suspect[name] for name in suspect)


def test_a_folder_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "seqmodels").write_text("a file")
    run(tmp_path, "ends")


@pytest.mark.skipif(has_nvidia_driver() or has_tpu_chips(), reason="starts the accelerator of this machine")
def test_compilers_for_other_devices_say_nothing(tmp_path):
    compilers = ("TPU_ACCELERATOR_TYPE", "TPU_WORKER_HOSTNAMES", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK")
    run(tmp_path, "ends", "JAX_PLATFORMS", *compilers)


CHIPS, PLAYED = (True, {}), (False, {"JAX_FORCE_TPU_INIT": "1"})


@pytest.mark.parametrize(
    ("machine", "variables", "several"),
    [
        (CHIPS, {"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        (CHIPS, {"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "a"}, True),
        (CHIPS, {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        (CHIPS, {"TPU_WORKER_HOSTNAMES": "a"}, False),
        (CHIPS, {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": ""}, False),
        (CHIPS, {}, True),  # what the machine itself knows, jax asks
        (PLAYED, {"TPU_WORKER_HOSTNAMES": "localhost,localhost"}, True),
        (PLAYED, {"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ((False, {}), {"TPU_WORKER_HOSTNAMES": "a,b"}, False),
        ((False, {}), {}, False),
    ],
)
def test_which_machines_are_one_of_several_hosts(monkeypatch, machine, variables, several):
    chips, more = machine
    for name in ("JAX_FORCE_TPU_INIT", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | more).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(start_up, "_is_tpu_host", lambda: chips)
    assert start_up._is_one_of_several_hosts() == several


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_whose_others_never_come_says_so_in_a_line(process):
    program = f"""
from seqmodels.parallel import start_up
start_up._join(2, coordinator_address="localhost:{free_port()}", num_processes=2, process_id={process})
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == EXIT_RESTART
    assert ended.stderr == "error: not all processes of the job have come within 2 s\n"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
