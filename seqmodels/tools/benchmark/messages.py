"""What a comparison and its workers say to each other."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from seqmodels.tools.benchmark.cases import Workload


class Subject(NamedTuple):
    """Whose program is measured: a peer's, by name, or with None ours in a form and with a chunk size.

    differs: in what a peer computes something else than ours; None where it computes the same.
    """

    peer: str | None = None
    form: str = "chunked"
    chunk_size: int | None = None
    differs: str | None = None

    @property
    def name(self) -> str:
        return self.peer or self.form + (f" {self.chunk_size}" if self.chunk_size else "")


class Task(NamedTuple):
    """What a worker measures. limit: CPU seconds that one call may take; None does not predict.
    values: whether the outputs (and gradients) are sent back."""

    subject: Subject
    workload: Workload
    backward: bool
    threads: int
    limit: float | None
    values: bool


class Ready(NamedTuple):
    """A program that has run once.

    compile_seconds  CPU time of tracing and compiling; None where nothing is compiled
    temporary_bytes  what XLA plans to use beside inputs and outputs; None without XLA
    peak_bytes       growth of the resident memory during the first call, inputs apart; None where /proc is missing
    values           "o", and with backward "dq", ... as float32; empty unless they were asked for
    """

    compile_seconds: float | None
    temporary_bytes: int | None
    peak_bytes: int | None
    values: Mapping[str, np.ndarray]


class Skipped(NamedTuple):
    """A program that is not measured, and why. input_error: the person who asked has to change something."""

    reason: str
    input_error: bool = False
    traceback: str | None = None


class Run(NamedTuple):
    """Seconds for one call."""

    cpu: float
    wall: float
