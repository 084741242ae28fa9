"""Workers that take turns on the device, and rows put together from what they answer."""

import contextlib
import os
import pickle
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from seqmodels.tools.benchmark.cases import Workload
from seqmodels.tools.benchmark.compare import differences
from seqmodels.tools.benchmark.gpu.messages import (
    PALLAS,
    REFERENCE,
    XLA,
    Doing,
    Done,
    Failed,
    Job,
    Key,
    Measured,
    Ready,
    Setup,
)
from seqmodels.tools.benchmark.gpu.peers import peers
from seqmodels.tools.benchmark.processes import Ended, WorkerProcess

OURS = (XLA, PALLAS)
# Of the greatest magnitude. Products of bfloat16 leave some hundredths; what computes something else is off by more.
AGREEMENT = 0.1
START_LIMIT = 180.0  # seconds for importing a library and finding the device
MEMORY_OF_JAX = 0.6  # of the device's: the most that JAX may hold, so that the rest is there for PyTorch

Tell = Callable[[str], None]


@dataclass
class Cell:
    """One program of a row.

    errors   max |a - b| / max |b|, b the reference's, of the output ("o") and of gradients ("dq", ...); empty where
             there is no reference, or where `differs` says what the program computes that ours does not
    skipped  why there is no time
    """

    name: str
    measured: Measured | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    differs: str | None = None
    skipped: str | None = None
    traceback: str | None = None

    @property
    def milliseconds(self) -> float:
        """The median of the measurements."""
        return statistics.median(self.measured.seconds) * 1e3

    @property
    def host_bound(self) -> bool:
        """Whether starting a call takes about as long as the call: the device may have waited."""
        return self.measured.host > 0.9 * statistics.median(self.measured.seconds)

    @property
    def agrees(self) -> bool:
        return all(error <= AGREEMENT for error in self.errors.values())  # False for a NaN


@dataclass
class Row:
    """A workload, forward or forward and backward. reference: the form that errors are against, None without one."""

    workload: Workload
    backward: bool
    cells: list[Cell]
    reference: str | None = None
    no_reference: str | None = None

    def fastest(self, ours: bool) -> Cell | None:
        """The fastest of ours, or of the peers; None where none ran and agrees."""
        ran = [x for x in self.cells if (x.name in OURS) == ours and x.measured is not None and x.agrees]
        return min(ran, key=lambda x: x.milliseconds, default=None)

    @property
    def ratio(self) -> float | None:
        """Time of our fastest over that of the fastest peer: below 1 ours is faster. None where one is missing."""
        ours, peer = self.fastest(True), self.fastest(False)
        return None if ours is None or peer is None else ours.milliseconds / peer.milliseconds


class Protocol(NamedTuple):
    """How programs are measured.

    libraries   those that are started; programs of others are skipped
    platform    "cuda" or "cpu"
    repeats     measurements of each program
    limit       seconds in which a worker has to answer, or is ended
    stop_after  seconds after which no more workloads are begun; None for all of them
    """

    libraries: tuple[str, ...]
    platform: str
    repeats: int
    limit: float
    stop_after: float | None = None


def names(op: str, case: str) -> list[str]:
    """The programs of a case, in the order of the table."""
    return [*OURS, *(peer.name for peer in peers(op, case))]


class Suite:
    """Workers for some workloads. As a context manager it leaves no process behind.

    device: the GPU's name. Raises RuntimeError where JAX, whose programs everything is compared with, does not start.
    """

    def __init__(self, protocol: Protocol):
        self._protocol, self._start = protocol, time.monotonic()
        self._workers = {name: _Worker(name, protocol) for name in ("jax", *protocol.libraries)}
        with contextlib.ExitStack() as workers:
            for worker in self._workers.values():
                workers.callback(worker.end)
            for worker in self._workers.values():
                worker.start()  # they import at the same time
            jax = self._workers["jax"].ready()
            if isinstance(jax, Failed):
                raise RuntimeError(f"JAX does not start: {jax.reason}")
            self.device = jax.device
            self._closing = workers.pop_all()

    def __enter__(self) -> "Suite":
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.close()

    def rows(
        self, workloads: Sequence[Workload], passes: Sequence[bool], tell: Tell = lambda doing: None
    ) -> Iterator[Row]:
        """The rows of each workload, as they become known. passes: with gradients or not. tell: hears what is next."""
        for workload, following in zip(workloads, [*workloads[1:], None]):
            seconds, most = time.monotonic() - self._start, self._protocol.stop_after
            if most is not None and seconds > most:
                late = f"not begun: {seconds:.0f} s had passed"
                yield from (_row(workload, backward, {}, late) for backward in passes)
                continue
            answers = {answer.key: answer for answer in self._answers(workload, passes, following, tell)}
            yield from (_row(workload, backward, answers, "skipped by --libraries") for backward in passes)

    def _answers(
        self, workload: Workload, passes: Sequence[bool], following: Workload | None, tell: Tell
    ) -> Iterator[Measured | Failed]:
        by_library: dict[str, list[Key]] = {name: [] for name in self._workers}
        by_library["jax"].append(Key(REFERENCE, any(passes)))
        frameworks = {peer.name: peer.framework for peer in peers(workload.op, workload.case)}
        for name in names(workload.op, workload.case):
            if name == PALLAS and not _has_kernel(workload.op):
                yield from (Failed(Key(name, backward), f"{workload.op} has no {PALLAS} kernel") for backward in passes)
                continue
            library = frameworks.get(name, "jax")
            if library in by_library:
                by_library[library] += [Key(name, backward) for backward in passes]
        for library, keys in by_library.items():
            if keys:
                yield from self._workers[library].run(Job(workload, tuple(keys), following), tell)


def _has_kernel(op: str) -> bool:
    from seqmodels.registry import ops

    return PALLAS in ops()[op].kernels


def _row(workload: Workload, backward: bool, answers: Mapping[Key, Measured | Failed], otherwise: str) -> Row:
    """otherwise: why a program has no answer."""
    reference = next((answer for key, answer in answers.items() if key.name == REFERENCE), None)
    differing = {peer.name: peer.differs for peer in peers(workload.op, workload.case)}
    cells = []
    for name in names(workload.op, workload.case):
        answer = answers.get(Key(name, backward), Failed(None, otherwise))
        cell = Cell(name, differs=differing.get(name))
        if isinstance(answer, Failed):
            cell.skipped, cell.traceback = answer.reason, answer.traceback
        else:
            if isinstance(reference, Measured) and cell.differs is None:
                cell.errors = differences(answer.values, reference.values)
            cell.measured = answer._replace(values={})
        cells.append(cell)
    if isinstance(reference, Measured):
        return Row(workload, backward, cells, reference.form)
    return Row(workload, backward, cells, no_reference=otherwise if reference is None else reference.reason)


class _Worker:
    """The process of one library; another one after it has ended or gives no answer."""

    def __init__(self, library: str, protocol: Protocol):
        self._library, self._protocol = library, protocol
        self._process: WorkerProcess | None = None
        self._first: Ready | Failed | None = None

    def start(self) -> None:
        self.end()
        platform = self._protocol.platform
        self._process = WorkerProcess(
            "seqmodels.tools.benchmark.gpu.worker",
            environment(self._library, platform),
            pickle.dumps(Setup(self._library, platform, self._protocol.repeats)),
        )

    def end(self) -> None:
        if self._process is not None:
            self._process.end()
        self._process = self._first = None

    def ready(self) -> Ready | Failed:
        """The first answer; waits for it."""
        if self._process is None:
            self.start()
        if self._first is None:
            try:
                self._first = self._process.answer(START_LIMIT)
            except (TimeoutError, Ended) as error:
                self._first = _failed(None, error, START_LIMIT)
        return self._first

    def run(self, job: Job, tell: Tell) -> Iterator[Measured | Failed]:
        """An answer for every program of the job. One that ends the process, or does not end itself, is one too."""
        ready, limit = self.ready(), self._protocol.limit
        if isinstance(ready, Failed):
            yield from (ready._replace(key=key) for key in job.keys)
            return
        pending, doing = list(job.keys), None
        self._process.send(pickle.dumps(job))
        try:
            while not isinstance(answer := self._process.answer(limit), Done):
                if isinstance(answer, Doing):
                    doing = answer.key
                    about = f"{doing.name}, {answer.text}" if doing else f"{self._library}, {answer.text}"
                    tell(f"{job.workload.op} {job.workload.case} T={job.workload.length}: {about}")
                else:
                    pending.remove(answer.key)
                    doing = None
                    yield answer
            return
        except (TimeoutError, Ended) as error:
            why = error
        self.end()
        if doing is None and len(pending) == len(job.keys) > 1:
            # In what they share, so that it shows who it is only when they come one by one.
            for key in pending:
                yield from self.run(job._replace(keys=(key,)), tell)
            return
        if doing is None and len(pending) == len(job.keys):
            doing = pending[0]
        if doing is not None:
            pending.remove(doing)
            yield _failed(doing, why, limit)
        if pending:
            yield from self.run(job._replace(keys=tuple(pending)), tell)


def _failed(key: Key | None, error: TimeoutError | Ended, limit: float) -> Failed:
    if isinstance(error, Ended):
        return Failed(key, str(error), error.printed)
    return Failed(key, f"no answer in {limit:g} s")


def environment(library: str, platform: str) -> dict[str, str]:
    """The environment in which a library leaves the other one its part of the device."""
    mine = library == "jax" and platform == "cuda"
    return {
        **os.environ,
        "JAX_PLATFORMS": "cuda" if mine else "cpu",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": str(MEMORY_OF_JAX),
        **({"CUDA_VISIBLE_DEVICES": ""} if platform == "cpu" else {}),
    }
