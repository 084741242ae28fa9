"""Several processes as one job.

On TPU there is nothing to say: jax finds the other hosts by itself. Elsewhere every process is told where the first one
listens, how many there are, and which one it is.
"""

import argparse
import importlib.util
import os
import sys
import threading
from typing import Any

import jax

from seqmodels.errors import EXIT_RESTART, InputError, LostContactError
from seqmodels.start_up import has_tpu_chips

# Seconds until all processes have come: those of a pod when there are machines for each of its slices, which can take
# hours, while the others wait. Who starts them starts all again when one that has come is lost meanwhile.
PATIENCE, PATIENCE_ON_PODS = 900, 24 * 3600


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a program that may run as several processes."""
    group = parser.add_argument_group("several processes (not needed on TPU)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, the same for all")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")


def start_processes(arguments: argparse.Namespace) -> None:
    """Join the other processes of the job, if there are any. To be called before jax looks for devices.

    Where they do not all come, the process ends with exit code 42.

    Raises `InputError` where only some of the flags are given, or they contradict each other, and `LostContactError`
    where no connection can be made.
    """
    flags = {name: getattr(arguments, name) for name in ("coordinator", "processes", "process")}
    given = [name for name, value in flags.items() if value is not None]
    if not given:
        if _is_one_of_several_hosts():
            _join(PATIENCE_ON_PODS)
        return
    if len(given) < len(flags):
        missing = ", ".join(f"--{name}" for name in flags if name not in given)
        raise InputError(f"--{given[0]} is given without {missing}: expected all of them, or on TPU none")
    if flags["processes"] < 1 or not 0 <= flags["process"] < flags["processes"]:
        raise InputError(
            f"--process is {flags['process']} of --processes {flags['processes']}: expected 0 to processes - 1"
        )
    if ":" not in flags["coordinator"]:
        raise InputError(f"--coordinator is {flags['coordinator']!r}: expected HOST:PORT")
    if flags["processes"] > 1:
        _join(
            PATIENCE,
            coordinator_address=flags["coordinator"],
            num_processes=flags["processes"],
            process_id=flags["process"],
        )


def _join(patience: float, **place: Any) -> None:
    """`jax.distributed.initialize`, which aborts once its time is over."""
    timer = threading.Timer(patience, _give_up, (patience,))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(**place, initialization_timeout=int(patience) + 60)
    except RuntimeError as error:
        if "distributed.initialize" in str(error):
            raise  # It is called too late, or twice.
        raise LostContactError(f"cannot join the other processes of the job: {error}") from error
    finally:
        timer.cancel()


def _give_up(patience: float) -> None:
    print(f"error: not all processes of the job have come within {patience:g} s", file=sys.stderr, flush=True)
    os._exit(EXIT_RESTART)


def _is_one_of_several_hosts() -> bool:
    """Whether this machine has TPU chips that jax can use, or plays one that has, and is not known to be the only one.

    A host of a pod on GKE finds all of them in its environment. Elsewhere jax asks the machine, and may find one.
    """
    if not (_is_tpu_host() or "JAX_FORCE_TPU_INIT" in os.environ):
        return False
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    slices = int(os.environ.get("MEGASCALE_NUM_SLICES") or 1)
    return hosts is None or len(hosts.split(",")) * slices > 1


def _is_tpu_host() -> bool:
    """Whether this machine has TPU chips that jax can use."""
    if importlib.util.find_spec("libtpu") is None or jax.config.jax_platforms not in (None, "", "tpu", "tpu,cpu"):
        return False
    return has_tpu_chips()
