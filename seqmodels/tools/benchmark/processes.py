"""A process that measures: started, spoken to in pickles over its standard input and output, and always ended."""

import contextlib
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from typing import Any


class Ended(Exception):
    """The process has ended without an answer. The message is its exit code, `printed` what it wrote as errors."""

    def __init__(self, code: int, printed: str):
        super().__init__(f"its process ended with exit code {code}")
        self.printed = printed


class WorkerProcess:
    """python -m module, from its start to its end. As a context manager it leaves no process behind.

    first: a message that it is sent at once
    """

    def __init__(self, module: str, environment: Mapping[str, str], first: bytes):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- has no name, and goes with the object
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then ends its workers
        )
        self._answers: queue.SimpleQueue = queue.SimpleQueue()
        try:
            # Answers are read beside the program, so that it can stop waiting for one.
            threading.Thread(target=self._read, daemon=True).start()
            self.send(first)
        except BaseException:  # an interrupt, before anybody else can end the process
            self.end()
            raise

    def __enter__(self) -> "WorkerProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.end()

    def send(self, message: bytes) -> None:
        """Does nothing where the process has ended: the missing answer says so."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(message)
            self._process.stdin.flush()

    def answer(self, timeout: float | None = None) -> Any:
        """The next answer. Raises Ended where the process ends instead, TimeoutError after so many seconds."""
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(answer, _NoMore):
            self._answers.put(answer)  # whoever asks again is told the same
            code = self._process.wait()
            self._errors.seek(0)
            raise Ended(code, self._errors.read().decode(errors="replace").strip())
        return answer

    def end(self) -> None:
        self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # of what it has not read
            self._process.stdin.close()
        self._errors.close()

    def _read(self) -> None:
        with self._process.stdout as pipe:
            try:
                while True:
                    self._answers.put(pickle.load(pipe))
            except (EOFError, pickle.UnpicklingError):
                self._answers.put(_NoMore())


class _NoMore:
    """In place of an answer: there will be none."""
