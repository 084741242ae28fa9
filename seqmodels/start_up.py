"""What every program does before it uses JAX: compiled programs kept on disk, libraries' remarks off the terminal."""

import atexit
import importlib.util
import logging
import os
import socket
from pathlib import Path

import jax

from seqmodels.files import in_bucket, to_path


def prepare_jax() -> None:
    """Keep compiled programs from one start to the next, in a folder of the user's unless one is set already."""
    for library in ("absl", "jax", "orbax", "tensorboardX"):
        logging.getLogger(library).setLevel(logging.ERROR)
    if importlib.util.find_spec("libtpu") is not None and not has_tpu_chips():
        # It is loaded all the same, and says at length what it misses.
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    if not has_nvidia_driver():
        # Where JAX's plugin for CUDA is installed, as a compiler, it would report that NVIDIA's libraries are not.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if jax.config.jax_compilation_cache_dir is not None:
        if in_bucket(jax.config.jax_compilation_cache_dir):
            to_path(jax.config.jax_compilation_cache_dir)  # says what is missing
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "seqmodels" / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _drop_torn_entries(folder)
        mark = folder / _mark(os.getpid())
        mark.touch()
    except OSError:
        return  # A folder that cannot be written keeps nothing; everything else works.
    atexit.register(mark.unlink, missing_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def has_tpu_chips() -> bool:
    """Whether this machine has TPUs. Asking jax would start it."""
    devices = Path("/dev")
    return any(devices.glob("accel*")) or any(devices.glob("vfio/[0-9]*"))


def has_nvidia_driver() -> bool:
    """Whether this machine may have NVIDIA GPUs. Of its devices /dev/dxg is Windows'."""
    devices = Path("/dev")
    return any(devices.glob("nvidia*")) or (devices / "dxg").exists()


def _drop_torn_entries(folder: Path) -> None:
    """Remove what a killed process may have left half written: JAX would find it, fail to read it, and keep it.

    A process leaves a mark while it runs. Where its process is gone, entries younger than the mark are suspect.
    """
    for mark in folder.glob(_mark("*")):
        if _is_running(int(mark.name.rpartition("-")[2])):
            continue
        began = mark.stat().st_mtime
        for entry in folder.iterdir():
            if entry.name.endswith("-cache") and entry.stat().st_mtime >= began:
                entry.unlink(missing_ok=True)
        mark.unlink(missing_ok=True)


def _mark(process: int | str) -> str:
    return f"running-{socket.gethostname()}-{process}"


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
