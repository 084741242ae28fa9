"""What measuring a program takes: how many calls, how long they take, what a longer one will, and how much memory there
is for it."""

import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

TARGET = 0.05  # seconds of a measurement: long beside the latency of a first call
MOST_CALLS = 1000
QUEUE = 8  # calls that can be queued without waiting, in either library
SLOW = 2.0  # seconds of all measurements together, after which no more are made
MEMORY_SHARE = 0.8  # of the machine's memory: the most that a program may ask for


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

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def spread(self) -> float:
        """How far the slowest measurement is from the fastest, relative to that."""
        return max(self.seconds) / self.best - 1


def span(call: Callable[[], Any], calls: int, wait: Callable[[Any], Any]) -> Span:
    """Queue so many calls, then `wait` for what the last one gave."""
    start = time.perf_counter()
    for _ in range(calls):
        values = call()
    started = time.perf_counter()
    wait(values)
    return Span(time.perf_counter() - start, started - start)


def measure(
    run: Callable[[int], Span], repeats: int, *, first: Span | None = None, most_calls: int = MOST_CALLS
) -> Timing:
    """run: makes so many calls. The first calls, which compile and tune, have been made already; first: a later one
    that has been made as well, to tell how long they take."""
    trial = first or run(1)
    few = min(QUEUE, _calls_for(trial.device, most_calls))
    if few > 1:
        trial = run(few)
    calls = _calls_for(trial.device / few, most_calls)
    seconds: list[float] = []
    while len(seconds) < repeats and (not seconds or sum(seconds) * calls < SLOW):
        seconds.append(run(calls).device / calls)
    return Timing(tuple(seconds), calls, trial.host / few)


def extrapolated(
    measured: Sequence[tuple[int, float]], length: int, least_power: float, most_power: float = math.inf
) -> float:
    """Seconds for a longer length, from (length, seconds) of shorter ones in their order; 0 where there are none.

    Time is taken to grow as a power of the length: the one between the last two, within these bounds.
    """
    if not measured:
        return 0.0
    at, seconds = measured[-1]
    power = least_power
    if len(measured) > 1:
        before, less = measured[-2]
        power = max(power, min(most_power, math.log(seconds / less) / math.log(at / before)))
    return seconds * (length / at) ** power


def machine_memory(share: float = 1.0) -> float:
    """Bytes that a program may ask for on this machine's CPU; share: of the machine, where others run beside it."""
    return share * MEMORY_SHARE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _calls_for(seconds: float, most: int) -> int:
    return max(1, min(most, math.ceil(TARGET / max(seconds, 1e-7))))
