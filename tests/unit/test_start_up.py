"""Compiled programs are kept from one start to the next, and what a killed process left is not. Compilers for devices
that are not there are silent."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

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
