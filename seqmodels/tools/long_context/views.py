"""What a view of this program is, to its command line."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from seqmodels.errors import InputError

EXPERIMENTS = Path("configs/experiments")


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


def experiment(name: str) -> str:
    """The path of a shipped experiment. Raises InputError where the program runs outside a checkout."""
    file = EXPERIMENTS / f"{name}.gin"
    if not file.exists():
        raise InputError(f"there is no {file} here; expected to run in the checkout of the repository")
    return str(file)
