"""What a view of this program is, to its command line."""

import argparse
import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from seqmodels.errors import InputError

EXPERIMENTS = Path("configs/long_context")


class View(NamedTuple):
    """One subcommand.

    summary      what it shows, in a line
    description  what exactly is measured, compared with what
    add          (parser) -> None; adds its own options
    measure      (options) -> rows of its table, the first of them the columns
    draw         (rows, file) -> None; None for a view without a picture
    """

    summary: str
    description: str
    add: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], list[Sequence[str]]]
    draw: Callable[[list[Sequence[str]], Path], None] | None = None


def use_cpu_devices(count: int) -> None:
    """So many virtual devices, whatever the machine has; where jax runs already, those that it has."""
    # A device that waits longer than this for the others ends the process.
    flag = "--xla_cpu_collective_call_terminate_timeout_seconds"
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}=3600".strip()
    import jax

    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    if jax.device_count() != count:
        raise InputError(f"jax has {jax.device_count()} devices; expected {count} virtual ones of the CPU")


def experiment(name: str) -> str:
    """The path of a shipped experiment. Raises InputError where the program runs outside a checkout."""
    file = EXPERIMENTS / f"{name}.gin"
    if not file.exists():
        raise InputError(f"there is no {file} here; expected to run in the checkout of the repository")
    return str(file)
