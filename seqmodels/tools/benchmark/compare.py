"""Programs side by side: one worker each, values compared first, then timed in alternating order."""

import contextlib
import os
import pickle
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from seqmodels.errors import InputError
from seqmodels.tools.benchmark.cases import Workload
from seqmodels.tools.benchmark.messages import Ready, Run, Skipped, Subject, Task
from seqmodels.tools.benchmark.processes import Ended, WorkerProcess

# Of the greatest magnitude; what differs by more does not compute the same, and gets no ratio.
AGREEMENT = {"float32": 1e-3, "bfloat16": 5e-2}


@dataclass
class Row:
    """What was measured of one program.

    runs        seconds for one call, in the order of measuring; empty when it was skipped
    difference  the greatest over outputs and gradients of max |a - b| / max |b|, b of the first row measured; None
                unless values were compared
    skipped     why nothing was measured
    """

    subject: Subject
    workload: Workload
    threads: int
    ready: Ready | None = None
    runs: list[Run] = field(default_factory=list)
    difference: float | None = None
    skipped: str | None = None

    @property
    def seconds(self) -> list[float]:
        """CPU seconds of each run with one thread, else wall seconds."""
        return [run.cpu if self.threads == 1 else run.wall for run in self.runs]

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def noise(self) -> float:
        """How far the median lies above the best run, as a share of the best."""
        return statistics.median(self.seconds) / self.best - 1

    @property
    def tokens_per_second(self) -> float:
        return self.workload.tokens / self.best

    @property
    def agrees(self) -> bool:
        return self.difference is None or self.difference <= AGREEMENT[self.workload.dtype]


@dataclass(frozen=True)
class Protocol:
    """How programs are measured.

    repeats  runs of each, after one that warms up
    limit    CPU seconds: the most that one call may be predicted to take, and where repeating ends
    """

    backward: bool
    threads: int = 1
    repeats: int = 5
    limit: float = 20.0


def compare(
    programs: Sequence[tuple[Subject, Workload]],
    protocol: Protocol,
    *,
    values: bool,
    progress: Callable[[str], None] = lambda doing: None,
) -> list[Row]:
    """Measure programs beside each other; one row each, in their order.

    values: whether all compute the same, so that their results are compared with the first one's. Without it, as over
    lengths, no program is skipped for the time that it is predicted to take.
    progress: is told what comes next.

    Raises InputError when ours refuses its arguments, RuntimeError when ours fails.
    """
    rows, reference = [], None
    with contextlib.ExitStack() as workers:
        running: list[tuple[Row, _Worker]] = []
        for subject, workload in programs:
            progress(f"{subject.name}, T={workload.length}: compile and first run")
            row = Row(subject, workload, protocol.threads)
            limit, same = protocol.limit if values else None, values and subject.differs is None
            task = Task(subject, workload, protocol.backward, protocol.threads, limit, same)
            worker = workers.enter_context(_Worker(task))
            rows.append(row)
            answer = worker.ready()
            if isinstance(answer, Skipped):
                row.skipped = _explained(answer, subject)
                continue
            row.ready = answer._replace(values={})
            if values and reference is None:
                reference = answer.values
            if same:
                row.difference = difference(answer.values, reference)
            running.append((row, worker))
        for repeat in range(protocol.repeats):
            progress(f"run {repeat + 1} of {protocol.repeats}")
            for row, worker in running[:: 1 if repeat % 2 == 0 else -1]:
                if row.skipped or sum(row.seconds) >= protocol.limit:
                    continue
                answer = worker.run()
                if isinstance(answer, Skipped):
                    row.skipped = _explained(answer, row.subject)
                else:
                    row.runs.append(answer)
    return rows


def difference(values: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> float:
    """The greatest of `differences`; NaN where a NaN is."""
    return float(np.max(list(differences(values, reference).values())))


def differences(values: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> dict[str, float]:
    """max |a - b| / max |b| of each array that both have."""
    shared = [name for name in reference if name in values]
    return {x: float(np.max(np.abs(values[x] - reference[x])) / np.max(np.abs(reference[x]))) for x in shared}


def _explained(skipped: Skipped, subject: Subject) -> str:
    """A peer that fails is a line in the table; ours failing ends the program."""
    if subject.peer is None and skipped.input_error:
        raise InputError(skipped.reason)
    if subject.peer is None and skipped.traceback:
        raise RuntimeError(f"{subject.name} failed in its worker:\n{skipped.traceback}")
    return f"failed: {skipped.reason}" if skipped.traceback else skipped.reason


class _Worker(WorkerProcess):
    """A worker with its task."""

    def __init__(self, task: Task):
        super().__init__("seqmodels.tools.benchmark.worker", worker_environment(task.threads), pickle.dumps(task))

    def ready(self) -> Ready | Skipped:
        return self._answer()

    def run(self) -> Run | Skipped:
        self.send(b"run\n")
        return self._answer()

    def _answer(self) -> Any:
        try:
            return self.answer()
        except Ended as end:
            return Skipped(str(end), traceback=f"{end.printed}\n{end}")


def worker_environment(threads: int) -> dict[str, str]:
    """The environment in which a worker keeps to so many threads, and to the CPU."""
    count = str(threads)
    flags = os.environ.get("XLA_FLAGS", "")
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "NPROC": count,  # size of XLA's thread pool
        "XLA_FLAGS": f"{flags} --xla_cpu_multi_thread_eigen={'false' if threads == 1 else 'true'}".strip(),
        "OMP_NUM_THREADS": count,
        "OPENBLAS_NUM_THREADS": count,
        "MKL_NUM_THREADS": count,
    }
