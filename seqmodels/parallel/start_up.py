"""Several processes as one job.

On TPU there is nothing to say: jax finds the other hosts by itself. Elsewhere every process is told where the first one
listens, how many there are, and which one it is.
"""

import argparse
import importlib.util

import jax

from seqmodels.errors import InputError
from seqmodels.start_up import has_tpu_chips


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a program that may run as several processes."""
    group = parser.add_argument_group("several processes (not needed on TPU)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens, the same for all")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")


def start_processes(arguments: argparse.Namespace) -> None:
    """Join the other processes of the job, if there are any. To be called before jax looks for devices.

    Raises `InputError` where only some of the flags are given, or they contradict each other.
    """
    flags = {name: getattr(arguments, name) for name in ("coordinator", "processes", "process")}
    given = [name for name, value in flags.items() if value is not None]
    if not given:
        if _is_tpu_host():
            jax.distributed.initialize()
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
        jax.distributed.initialize(flags["coordinator"], flags["processes"], flags["process"])


def _is_tpu_host() -> bool:
    """Whether this machine has TPU chips that jax can use."""
    if importlib.util.find_spec("libtpu") is None or jax.config.jax_platforms not in (None, "", "tpu", "tpu,cpu"):
        return False
    return has_tpu_chips()
