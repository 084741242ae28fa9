"""What the suite and its workers say to each other."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from seqmodels.tools.benchmark.cases import Workload

XLA, PALLAS, REFERENCE = "xla", "pallas_gpu", "reference"  # programs of ours; others have their peer's name
STEPS = 2048  # tokens up to which the reference is the definition, token by token


class Key(NamedTuple):
    """A program of a workload: whose, and whether it gives gradients too."""

    name: str
    backward: bool


class Setup(NamedTuple):
    """A worker's first message. platform: "cuda" or "cpu". repeats: measurements of each program."""

    library: str
    platform: str
    repeats: int


class Job(NamedTuple):
    """Programs of one workload to measure. following: the workload whose numbers are to be made meanwhile."""

    workload: Workload
    keys: tuple[Key, ...]
    following: Workload | None = None


class Ready(NamedTuple):
    """The library is there. device: its name for the GPU."""

    device: str


class Doing(NamedTuple):
    """What comes next. key: of the program that it is about; None for what all of the job share."""

    key: Key | None
    text: str


class Measured(NamedTuple):
    """A program that ran.

    values           some of the outputs and gradients as float32, see `libraries.sample`
    seconds          of one call, one for each measurement; empty for the reference
    calls            in a measurement
    host             seconds that the host takes to start a call; 0 for the reference
    prepare_seconds  compiling (JAX) or the first call (PyTorch), which compiles and tunes
    temporary_bytes  what XLA plans to use beside inputs and outputs; None without XLA
    form             of ours
    """

    key: Key
    values: Mapping[str, np.ndarray]
    seconds: tuple[float, ...]
    calls: int
    host: float
    prepare_seconds: float
    temporary_bytes: int | None = None
    form: str | None = None


class Failed(NamedTuple):
    """A program that did not run, or (key None) a library that is not there, and why."""

    key: Key | None
    reason: str
    traceback: str | None = None


class Done(NamedTuple):
    """The job's last answer."""
