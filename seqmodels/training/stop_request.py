"""SIGTERM and Ctrl-C as a polite request: finish the step, save, leave."""

import os
import signal

import jax
from jax.experimental import multihost_utils

from seqmodels.parallel.ending import handle_stops


class StopRequest:
    """A context in which the first SIGTERM or SIGINT is only noted; a second one acts as if there were no
    context.

    With `jax.distributed`, SIGTERM belongs to JAX, which makes all processes agree on the step to stop after.
    There Ctrl-C is passed on as a SIGTERM.
    """

    def __init__(self) -> None:
        self._noted = False
        self._distributed = jax.distributed.is_initialized()
        self._previous: dict[int, object] = {}

    def requested_at(self, step: int) -> bool:
        """Whether to stop after this step. Every process must ask after every step, and all get the same
        answer."""
        if self._distributed:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._noted

    def __enter__(self) -> "StopRequest":
        handle_stops()
        if self._distributed:
            self._handle(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
        else:
            self._handle(signal.SIGINT, self._note)
            self._handle(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, number, handler):
        self._previous[number] = signal.signal(number, handler)

    def _note(self, *_) -> None:
        self._noted = True
        # Not `print`: the signal may have come in the middle of one.
        os.write(2, b"\nasked to stop: finishing the step and saving; a second time ends it at once\n")
        self.__exit__()
