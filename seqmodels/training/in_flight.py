"""Steps that were handed to the device and whose numbers have not been looked at yet.

The loop hands over a step, then asks what has finished meanwhile, and so never waits in order to log. It waits
for one thing, that the device is no more than `limit` steps behind: this bounds the memory of queued batches.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from seqmodels.errors import ToldError
from seqmodels.training.step import StepResult

SHOWN = 5


class NonFiniteError(ToldError, ArithmeticError):
    """The loss, the gradient or the update of a step is not finite. The message names step, batch and
    parameters."""


class FinishedStep(NamedTuple):
    """The metrics of update number `step` (counted from 1), on the host."""

    step: int
    metrics: dict[str, float]


class StepsInFlight:
    """A first-in, first-out queue of results.

    Args:
        limit: how many steps the device may be behind; 0 waits for every step.
        parameter_names: names for `StepResult.gradient_norms`.
    """

    def __init__(self, limit: int, parameter_names: Sequence[str]):
        self._limit = limit
        self._names = parameter_names
        self._queue: deque[tuple[int, StepResult, Any]] = deque()

    def add(self, step: int, result: StepResult, data_position: Any) -> None:
        """`data_position` is the data iterator's state from before the step's batch was read."""
        for array in jax.tree.leaves(result):
            array.copy_to_host_async()
        self._queue.append((step, result, data_position))

    def wait_for_room(self) -> None:
        """Wait until no more than `limit` steps are unfinished."""
        if len(self._queue) > self._limit:
            jax.block_until_ready(self._queue[-1 - self._limit][1])

    def finished(self) -> Iterator[FinishedStep]:
        """Steps that have finished, oldest first, without waiting for any."""
        while self._queue and _is_ready(self._queue[0][1]):
            yield self._take()

    def drain(self) -> Iterator[FinishedStep]:
        """All steps, oldest first, waiting for them. After that the current state is known to be finite."""
        while self._queue:
            yield self._take()

    def _take(self) -> FinishedStep:
        step, result, position = self._queue.popleft()
        metrics = {name: float(value) for name, value in result.metrics.items()}
        if not all(np.isfinite(list(metrics.values()))):
            raise NonFiniteError(self._describe(step, metrics, np.asarray(result.gradient_norms), position))
        return FinishedStep(step, metrics)

    def _describe(self, step: int, metrics: dict[str, float], norms: np.ndarray, position: Any) -> str:
        bad = [name for name, value in metrics.items() if not np.isfinite(value)]
        # argsort puts NaN last, so that from the end come NaN, inf, and the largest finite norms.
        largest = [f"{self._names[i]} {norms[i]:.3g}" for i in np.argsort(norms)[::-1][:SHOWN]]
        return (
            f"step {step}: {' and '.join(bad)} not finite (loss {metrics['loss']:.6g}, gradient norm "
            f"{metrics['gradient_norm']:.6g}, learning rate {metrics['learning_rate']:.3g})\n"
            f"  batch: number {step} of the run, read from data position {position}\n"
            f"  largest of {len(norms)} gradients: {', '.join(largest)}"
        )


def _is_ready(result: StepResult) -> bool:
    return all(array.is_ready() for array in jax.tree.leaves(result))
