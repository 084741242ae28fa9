"""A program in a process of its own, whose lines are heard as they come and whose memory is told at its end.

A measurement of ours runs as `python -m seqmodels.tools.survey.worker` and says `progress SHARE DOING` as often as it
likes, then `result JSON`.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from seqmodels.errors import EXIT_INPUT, InputError
from seqmodels.tools.benchmark.compare import worker_environment
from seqmodels.tools.survey.views import Progress, Result


class Ended(NamedTuple):
    """How a program ended. peak_bytes: the most resident memory that it had."""

    code: int
    errors: str
    peak_bytes: int


def run(command: Sequence[str], hear: Callable[[str], None], *, threads: int, folder: Path) -> Ended:
    """Run to the end, on the CPU with so many threads; `hear` is told each line of standard output."""
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [sys.executable, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=folder,
            env=worker_environment(threads),
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends it
        ) as process,
    ):
        try:
            for line in process.stdout:
                hear(line.rstrip("\n"))
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
        errors.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        return Ended(process.returncode, errors.read().decode(errors="replace").strip(), usage.ru_maxrss * unit)


def in_worker(measurement: str, subject: str, options: dict, progress: Progress, threads: int = 1) -> Result:
    """What a measurement of worker.py gives for a mixer or an operator."""
    results: list[Result] = []

    def hear(line: str) -> None:
        kind, _, rest = line.partition(" ")
        if kind == "progress":
            share, _, doing = rest.partition(" ")
            progress(float(share), doing)
        elif kind == "result":
            results.append(json.loads(rest))

    command = ["-m", "seqmodels.tools.survey.worker", measurement, subject, json.dumps(options)]
    ended = run(command, hear, threads=threads, folder=Path.cwd())
    if ended.code == EXIT_INPUT:
        raise InputError(f"{subject}: {ended.errors.splitlines()[-1].removeprefix('error: ')}")
    if ended.code or not results:
        raise RuntimeError(f"{measurement} of {subject} ended with exit code {ended.code}:\n{ended.errors}")
    return results[-1]
