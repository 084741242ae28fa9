"""A program in a process of its own, whose lines are heard as they come and whose memory is told at its end."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple


class Ended(NamedTuple):
    """How a program ended. peak_bytes: the most resident memory that it had."""

    code: int
    errors: str
    peak_bytes: int


class Program:
    """python COMMAND, from its start to its end. As a context manager it leaves no process behind."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], folder: Path | None = None) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- has no name, and goes with the object
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=folder,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends it
        )

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *error: object) -> None:
        with self._errors, self._process:
            if self._process.returncode is None:
                self._process.kill()

    def lines(self) -> Iterator[str]:
        """Of standard output, until it is closed."""
        for line in self._process.stdout:
            yield line.rstrip("\n")

    def ended(self) -> Ended:
        """Waits for its end."""
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._errors.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        errors = self._errors.read().decode(errors="replace").strip()
        return Ended(self._process.returncode, errors, usage.ru_maxrss * unit)
