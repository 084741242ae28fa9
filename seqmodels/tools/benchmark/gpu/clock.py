"""How many calls make a measurement, and how long one of them takes."""

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

TARGET = 0.05  # seconds of a measurement: long beside the latency of a first call
MOST_CALLS = 1000
QUEUE = 8  # calls that can be queued without waiting, in either library
SLOW = 2.0  # seconds of all measurements together, after which no more are made


class Span(NamedTuple):
    """Seconds for some calls: until the device had done them, and until the host had started them."""

    device: float
    host: float


class Timing(NamedTuple):
    """Seconds of one call, one for each measurement of so many calls; host: for starting one."""

    seconds: tuple[float, ...]
    calls: int
    host: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def measure(run: Callable[[int], Span], repeats: int) -> Timing:
    """run: makes so many calls. The first calls, which compile and tune, have been made already."""
    few = max(1, min(QUEUE, _calls_for(run(1).device)))
    trial = run(few)
    calls = _calls_for(trial.device / few)
    seconds: list[float] = []
    while len(seconds) < repeats and (not seconds or sum(seconds) * calls < SLOW):
        seconds.append(run(calls).device / calls)
    return Timing(tuple(seconds), calls, trial.host / few)


def _calls_for(seconds: float) -> int:
    return max(1, min(MOST_CALLS, math.ceil(TARGET / max(seconds, 1e-7))))
