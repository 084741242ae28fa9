"""Measurements in processes of their own.

`python -m seqmodels.tools.survey.worker` says `progress SHARE DOING` as often as it likes, then `result JSON`.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from seqmodels.errors import EXIT_INPUT, InputError
from seqmodels.tools._processes import Ended, Program
from seqmodels.tools.benchmark.compare import worker_environment
from seqmodels.tools.survey.views import Progress, Result


def run(command: Sequence[str], hear: Callable[[str], None], *, threads: int, folder: Path) -> Ended:
    """Run to the end, on the CPU with so many threads; `hear` is told each line of standard output."""
    with Program(command, environment=worker_environment(threads), folder=folder) as program:
        for line in program.lines():
            hear(line)
        return program.ended()


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
