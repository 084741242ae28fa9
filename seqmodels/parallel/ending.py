"""How the processes of a job end: all of them, soon, and with one exit code.

Left to itself, a job of several processes waits for minutes when one has failed, and then all abort: nobody can tell a
defect from a lost host. Here the process that fails says so in the key-value store of `jax.distributed`. The others
look there once a second, in a thread that runs whatever the program waits for, and leave with the same code:

    an error of its own                     its exit code, from every process
    an error that a lost process may cause  42, unless another process says within seconds that the fault is its own
    SIGTERM before the first step           42 at once: there is nothing to save
    the end                                 all wait for each other, and hear until then what happens to the others

What C++ code ends, as in all other processes when process 0 is lost, aborts: who started the process takes that for 42.
"""

import contextlib
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
from jax._src import distributed  # The key-value store has no public name.

from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, EXIT_INTERRUPTED, EXIT_RESTART, ToldError

LOOK_EVERY = 1.0
# Whose fault it is says so before it leaves, and mostly before others notice.
BLAME_WITHIN = 5.0
# The store ends with process 0, which therefore leaves last.
LINGER = 3.0
# For the others at the end; process 0 may still write a sample.
PATIENCE = {EXIT_DONE: 3600.0, EXIT_RESTART: 15.0}
# For what takes no time, or for ever where a process is lost in it.
LAST_RESORT = 30.0

_VERDICT, _LEFT, _END = (f"seqmodels/ending/{name}" for name in ("verdict", "left", "end"))
# Where JAX's preemption service writes that a process has got SIGTERM.
_STOP = "RECEIVED_PREEMPTION_NOTICE"

# In messages of XLA, gloo and gRPC. States that are left out, INTERNAL and others, come with faults of either kind.
_CONTACT = r"(?i)\bgloo\b|heartbeat|connection (reset|closed|refused)|socket closed|broken pipe|coordination service"
_OWN_FAULT = (
    r"^(INVALID_ARGUMENT|UNIMPLEMENTED|RESOURCE_EXHAUSTED|OUT_OF_RANGE|NOT_FOUND|PERMISSION_DENIED):"
    r"|Traceback \(most recent call last\)|(?i:compil|mosaic)"
)


class Verdict(NamedTuple):
    """The end of the job: which process says so, everyone's exit code, and one line that says why."""

    process: int
    code: int
    reason: str

    def __str__(self) -> str:
        how = "ends the job" if self.code == EXIT_RESTART else "failed"
        return f"process {self.process} {how} (exit code {self.code}): {self.reason}"


def run_as_one(program: Callable[[], int]) -> int:
    """Run `program()`, as all processes of the job do, and return the exit code that it returns.

    Where `jax.distributed` is in use, an error in any process ends all of them, this one inside this call, and whoever
    calls it is to end the process soon after: what is left to wait for the others is cut off.
    """
    if not jax.distributed.is_initialized():
        return program()
    job = _Job()
    try:
        code = program()
    except BaseException as error:
        job.fail(error)
    job.end(code)
    return code


def handle_stops() -> None:
    """From now on the program itself asks whether to stop. Before, SIGTERM to any process ends all of them."""
    _stops_are_handled.set()


_stops_are_handled = threading.Event()


class _Job:
    """This process as one of a job's, from now to its end."""

    def __init__(self) -> None:
        self._store = distributed.global_state.client
        self._process, self._processes = distributed.global_state.process_id, distributed.global_state.num_processes
        self._leaving = threading.RLock()
        self._over = threading.Event()
        _stops_are_handled.clear()
        self._watch = threading.Thread(target=self._look, name="ending", daemon=True)
        self._watch.start()

    def end(self, code: int) -> None:
        """Wait for the others."""
        try:
            self._store.wait_at_barrier(_END, int(1000 * PATIENCE.get(code, LINGER)))
        except jax.errors.JaxRuntimeError as error:
            self._leave(code, f"other processes did not come to the end: {_first_line(error)}")
        self._over.set()
        self._watch.join(LINGER)
        _exit_in(LAST_RESORT, code)  # in case that another is killed before all have shut down

    def fail(self, error: BaseException) -> None:
        """Leave because of an error."""
        code, reason = _judge(error)
        if code == EXIT_RESTART:
            time.sleep(BLAME_WITHIN)  # The thread that looks acts on another's word, if there is any.
        self._leaving.acquire()
        told = (
            f"error: {error}" if isinstance(error, ToldError) else "".join(traceback.format_exception(error)).rstrip()
        )
        verdict = self._publish(code, reason)
        if code == EXIT_RESTART or verdict[1:] != (code, reason):
            told += f"\n{verdict}"
        self._leave(verdict.code, told)

    def _look(self) -> None:
        while not self._over.wait(LOOK_EVERY):
            verdict = self._verdict()
            if not verdict and not _stops_are_handled.is_set() and self._read(_STOP):
                verdict = self._publish(EXIT_RESTART, "asked to stop before the first step")
            if verdict:
                self._leave(verdict.code, str(verdict))

    def _verdict(self) -> Verdict | None:
        text = self._read(_VERDICT)
        return Verdict(*json.loads(text)) if text else None

    def _publish(self, code: int, reason: str) -> Verdict:
        """Returns what holds for all: this, or what another process has said before."""
        verdict = Verdict(self._process, code, reason)
        try:
            self._store.key_value_set(_VERDICT, json.dumps(verdict))
        except jax.errors.JaxRuntimeError:
            return self._verdict() or verdict
        return verdict

    def _read(self, key: str) -> str | None:
        try:
            return self._store.key_value_try_get(key)
        except jax.errors.JaxRuntimeError:
            return None  # It is not there. If the store itself is gone, JAX ends the process.

    def _leave(self, code: int, told: str) -> None:
        """Never returns. Nothing is cleaned up: that would wait for processes that do not come."""
        self._leaving.acquire()
        _exit_in(LAST_RESORT, code)
        print(told, file=sys.stderr, flush=True)
        sys.stdout.flush()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if self._process == 0:
                self._wait_until_others_have_left()
            else:
                self._store.key_value_set(f"{_LEFT}/{self._process}", "")
        os._exit(code)

    def _wait_until_others_have_left(self) -> None:
        deadline = time.monotonic() + LINGER
        while time.monotonic() < deadline and len(self._store.key_value_dir_get(_LEFT)) < self._processes - 1:
            time.sleep(LOOK_EVERY / 10)


def _judge(error: BaseException) -> tuple[int, str]:
    """The exit code of a process that has failed, and one line that says why."""
    if isinstance(error, ToldError):
        return error.exit_code, _first_line(error)
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED, "interrupted"
    if may_be_lost_contact(error):
        return EXIT_RESTART, f"lost contact with other processes: {_first_line(error)}"
    return EXIT_DEFECT, f"{type(error).__name__}: {_first_line(error)}"


def may_be_lost_contact(error: BaseException) -> bool:
    """Whether an error can be one that the loss of another process has caused, rather than this one's own fault."""
    for link in _chain(error):
        text = str(link)
        if isinstance(link, ValueError | RuntimeError | OSError) and re.search(_CONTACT, text):
            return True
        if isinstance(link, jax.errors.JaxRuntimeError):
            return not re.search(_OWN_FAULT, text)
    return False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and those that it has come from."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _exit_in(seconds: float, code: int) -> None:
    """End this process then, if it is still there."""
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()
