"""What runs on every host of a pod: the program under watch, its output kept, its end put into the contract's terms.

    python -m gcp.entry --run_dir DIR -- train.py --config FILE --run_dir DIR

The program runs as a child, so that its last words are kept however it ends. What it prints goes to standard output and
to DIR/logs/attempt-K/slice-I-host-J.log; SIGTERM and Ctrl-C are passed on to it. How it ends becomes an exit code of
`seqmodels.errors`, which the failure policy of a job maps to what is done next:

    0, 1, 2, 42       stay what they are
    killed, aborted   42: C++ code aborts where another process of the job is gone
    anything else     1

Unless this host itself is asked to end, some seconds pass before a 42: another host's defect or preemption, of which it
may be the consequence, is reported first, and decides what becomes of the job.

A job that has finished is started all the same: only the program can tell whether the finished run is the one that is
asked for, and it ends at once.
"""

import argparse
import contextlib
import ctypes
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, EXIT_INPUT, EXIT_RESTART, InputError, run_main
from seqmodels.files import GrowingFile, in_bucket, to_path

# Seconds before a 42 that may be the consequence of what happens on another host.
GRACE = 5.0
# For the last of the output, which a process that outlives the program can hold back.
LAST_OUTPUT = 5.0
PACKAGES = ("jax", "jaxlib", "libtpu")
MEANINGS = {
    EXIT_DONE: "done",
    EXIT_DEFECT: "a defect, or a loss that is not finite: not to be started again",
    EXIT_INPUT: "an input is wrong: not to be started again",
    EXIT_RESTART: "to be started again",
}
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    end = argv.index("--") if "--" in argv else len(argv)
    arguments, command = _parser(os.environ).parse_args(argv[:end]), argv[end + 1 :]
    if not command:
        raise InputError("no program: expected python -m gcp.entry --run_dir DIR -- PROGRAM ARGUMENTS...")
    place = f"slice-{arguments.slice}-host-{arguments.host}"
    log = Log(f"{arguments.run_dir.rstrip('/')}/logs/attempt-{arguments.attempt}/{place}.log")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    log.say(f"{place}, attempt {arguments.attempt}: process {os.getpid()} on {socket.gethostname()}, {now}")
    log.say(f"python {platform.python_version()}, {', '.join(map(_version, PACKAGES))}")
    log.say(f"runs {shlex.join(['python', *command])}")
    child = Child([sys.executable, *command], log)
    status = child.wait()
    code, reason = outcome(status, asked=child.asked)
    if code == EXIT_RESTART:
        child.wait_until_asked(GRACE)
    if code == EXIT_DONE and (step := finished_step(arguments.run_dir)) is not None:
        reason = f"the run is finished at step {step}"
    log.say(f"exit code {code}, {MEANINGS[code]}" + (f": {reason}" if reason else ""))
    log.close()
    return code


def outcome(status: int, *, asked: bool) -> tuple[int, str]:
    """The exit code of the contract for an end of the program, and why where that is not plain.

    Args:
        status: an exit code, or a signal's number with a minus. A shell's code for a signal, 128 more, is one too.
        asked: whether it was asked to end.
    """
    if status in MEANINGS:
        return status, ""
    number = -status if status < 0 else status - 128
    if number not in signal.valid_signals():
        return EXIT_DEFECT, f"the program ended with {status}, which means nothing here"
    name = signal.Signals(number).name if number in iter(signal.Signals) else f"signal {number}"
    return EXIT_RESTART, f"ended by {name}" + ("" if asked else ", taken for a lost process")


def finished_step(run_dir: str) -> int | None:
    """The last step of a finished run; None for any other, and where that cannot be read."""
    with contextlib.suppress(Exception):
        return json.loads((to_path(run_dir) / "DONE").read_text())["step"]
    return None


class Log:
    """Standard output and a file. What cannot be written is lost, and nothing ends because of it."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._file = None
        self._file = self._tried(self._open)

    def _open(self) -> GrowingFile:
        if not in_bucket(self._path):
            Path(self._path).parent.mkdir(parents=True, exist_ok=True)
        return GrowingFile(self._path)

    def say(self, line: str) -> None:
        self.write(f"entry: {line}\n".encode())

    def write(self, data: bytes) -> None:
        with contextlib.suppress(OSError):
            rest = data
            while rest:
                rest = rest[os.write(sys.stdout.fileno(), rest) :]
        if self._file:
            self._tried(self._file.write, data)

    def close(self) -> None:
        if self._file:
            self._tried(self._file.close)

    def _tried(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except Exception as error:
            self._file = None
            self.say(f"warning: no more is written to {self._path}: {error}")


class Child:
    """A running program, whose output goes to `log`. It is killed where this process is.

    asked: whether this process was asked to end, and passed that on.
    """

    def __init__(self, command: Sequence[str], log: Log) -> None:
        self._log = log
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
            process_group=0,  # Ctrl-C then comes once, by way of this process.
            preexec_fn=die_with_parent,
        )
        self._asked = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._pass_on)

    @property
    def asked(self) -> bool:
        return self._asked.is_set()

    def wait_until_asked(self, seconds: float) -> None:
        """For so long at most."""
        self._asked.wait(seconds)

    def wait(self) -> int:
        """How the program ended: its exit code, or a signal's number with a minus. All that it printed is kept then."""
        copying = threading.Thread(target=self._copy, daemon=True)
        copying.start()
        # The first process of a container also gets children of others, whose ends it has to take note of.
        while self._process.returncode is None:
            process, status = os.wait()
            if process == self._process.pid:
                self._process.returncode = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # What outlives it would keep the pipe open.
        copying.join(LAST_OUTPUT)
        return self._process.returncode

    def _copy(self) -> None:
        while data := os.read(self._process.stdout.fileno(), 1 << 16):
            self._log.write(data)

    def _pass_on(self, number: int, _) -> None:
        self._asked.set()
        if self._process.returncode is None:
            os.kill(self._process.pid, number)


def die_with_parent() -> None:
    """To be called in a child before its program begins: it is killed when the process that started it is gone."""
    if _LIBC:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gcp.entry",
        usage="%(prog)s --run_dir DIR [options] -- PROGRAM ARGUMENTS...",
        description="Run a program on one host of a pod: keep its output, and end with an exit code of the contract.",
    )
    parser.add_argument("--run_dir", required=True, metavar="DIR", help="of the run; the log goes to DIR/logs")
    for name, variable, meaning in (
        ("slice", "MEGASCALE_SLICE_ID", "which slice this host is of"),
        ("host", "TPU_WORKER_ID", "which host of the slice this is"),
        ("attempt", "SEQMODELS_ATTEMPT", "how often the job has started before"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=environment.get(variable) or 0, metavar="I", help=f"{meaning}; {variable}"
        )
    return parser


def _version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {package}"


if __name__ == "__main__":
    run_main(main)
