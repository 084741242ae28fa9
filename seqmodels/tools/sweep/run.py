"""Running points: each in processes of its own, so many at a time, until all are done, have failed, or are stopped."""

import contextlib
import datetime
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, EXIT_RESTART
from seqmodels.files import told
from seqmodels.tools.sweep import child
from seqmodels.tools.sweep.folder import PointFolder
from seqmodels.tools.sweep.points import result_of
from seqmodels.tools.sweep.progress import Progress

ROOT = Path(__file__).resolve().parents[3]
LOOK_EVERY = 0.2
# For a program of a runner that was killed to be gone, which takes milliseconds.
PATIENCE = 10.0
_LAST_LINES = 5


class Program(NamedTuple):
    """What a point runs next. evaluation: the arguments of it where it is one."""

    name: str
    command: list[str]
    evaluation: str | None = None


def programs_left(folder: PointFolder, evaluations: Sequence[str]) -> list[Program]:
    """In order; none for a point that is done."""
    found = []
    if folder.finished is None:
        train = [str(ROOT / "train.py"), "--config", str(folder.config), "--run_dir", str(folder.path)]
        found.append(Program("train.py", train))
    for evaluation in evaluations:
        if not folder.is_evaluated(evaluation):
            command = ["-m", "seqmodels.tools.evaluate", str(folder.path), "--suite", *shlex.split(evaluation)]
            found.append(Program(f"evaluate {result_of(evaluation)}", command, evaluation))
    return found


class Outcome(NamedTuple):
    """What became of the points, by name."""

    done: list[str]
    failed: list[str]
    stopped: list[str]
    asked: bool

    @property
    def exit_code(self) -> int:
        if self.asked and self.stopped:
            return EXIT_RESTART
        if self.failed:
            return EXIT_DEFECT
        return EXIT_RESTART if self.stopped else EXIT_DONE


def run_points(
    points: Sequence[PointFolder],
    evaluations: Sequence[str],
    jobs: int,
    progress: Progress,
    *,
    environment: Mapping[str, str] | None = None,
) -> Outcome:
    """Run all of these points, `jobs` at a time, which divide the cores of this process among them.

    Ctrl-C and SIGTERM stop the programs, which save, and then this; a second one kills them. Where this process is
    killed, they are killed with it.
    """
    outcome = Outcome([], [], [], asked=False)
    waiting = list(points)
    running: dict[int, _Running] = {}  # by the share of the cores
    shares = _shares(jobs)
    with _Stop() as stop:
        try:
            while running or (waiting and not stop.asked):
                for slot in range(jobs):
                    if slot not in running and waiting and not stop.asked:
                        running[slot] = _Running(waiting.pop(0), evaluations, shares[slot], environment)
                if stop.asked:
                    for at_work in running.values():
                        at_work.stop(signal.SIGTERM if stop.asked == 1 else signal.SIGKILL)
                for slot, at_work in list(running.items()):
                    ended = at_work.look(stop.asked > 0)
                    if ended is not None:
                        del running[slot]
                        getattr(outcome, ended).append(at_work.folder.name)
                        progress.ended(at_work.folder, ended, at_work.seconds, at_work.reason)
                progress.show(list(running.values()))
                if running:
                    time.sleep(LOOK_EVERY)
        finally:
            for at_work in running.values():
                at_work.stop(signal.SIGKILL)
    outcome.stopped.extend(folder.name for folder in waiting)
    return outcome._replace(asked=stop.asked > 0)


class _Running:
    """A point at work: the programs that it still needs, one after the other."""

    def __init__(
        self,
        folder: PointFolder,
        evaluations: Sequence[str],
        cores: Sequence[int],
        environment: Mapping[str, str] | None,
    ) -> None:
        self.folder = folder
        self.reason = ""
        self._evaluations, self._cores, self._environment = evaluations, cores, environment
        self._began = time.monotonic()
        self._process: subprocess.Popen | None = None
        self._program: Program | None = None
        self._log_from = 0
        self._signal: int | None = None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    @property
    def doing(self) -> str:
        return self._program.name if self._program else "waits"

    def stop(self, number: int) -> None:
        """Once for each signal: to a program that saves, a second SIGTERM means at once."""
        if self._process is not None and self._process.returncode is None and self._signal != number:
            self._signal = number
            self._process.send_signal(number)

    def look(self, stopping: bool) -> str | None:
        """Start what comes next, if it is time; at the point's end "done", "failed" or "stopped"."""
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return None
            if code != EXIT_DONE:
                return self._ended_with(code)
            evaluation = self._program.evaluation
            if evaluation is None and self.folder.finished is None:
                return self._fail(code, "ended, and the run is not finished")
            if evaluation is not None:
                self.folder.note_evaluation(evaluation)
                if not self.folder.is_evaluated(evaluation):
                    return self._fail(code, "wrote no result of the run's last step")
        self._process = self._program = None
        left = programs_left(self.folder, self._evaluations)
        if not left:
            return "done"
        if stopping:
            return "stopped"
        user = self.folder.user()
        if user is not None:
            self.reason = f"its run directory is in use by process {user}"
            return "stopped" if self.seconds > PATIENCE else None
        self._start(left[0])
        return None

    def _start(self, program: Program) -> None:
        self._program = program
        cores = ",".join(map(str, self._cores)) or "-"
        starter = [sys.executable, child.__file__, cores, str(os.getpid()), *program.command]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        with told(f"cannot write {self.folder.log}", self.folder.log), self.folder.log.open("ab") as log:
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            log.write(f"--- {now} {shlex.join(['python', *program.command])}\n".encode())
            log.flush()
            self._log_from = log.tell()
            self._process = subprocess.Popen(
                starter,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": path, **(self._environment or {})},
                start_new_session=True,  # Ctrl-C reaches this process alone
            )

    def _ended_with(self, code: int) -> str:
        asked = self._signal is not None
        if code == EXIT_RESTART or (asked and code in (-signal.SIGTERM, -signal.SIGKILL)):
            self.reason = "" if asked else f"{self._program.name} ended with {code}: to be started again"
            return "stopped"
        return self._fail(code, f"ended with {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}")

    def _fail(self, code: int, how: str) -> str:
        with self.folder.log.open("rb") as log:
            log.seek(self._log_from)
            lines = [line.rstrip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        self.reason = f"{self._program.name} {how}"
        self.folder.fail(
            program=self._program.name,
            code=code,
            reason=self.reason,
            says=_telling(lines),
            log=str(self.folder.log),
        )
        return "failed"


def _telling(lines: list[str]) -> list[str]:
    """The end of what a program has said, the error first where it has told one."""
    errors = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    raised = [number for number, line in enumerate(lines) if line.startswith("Traceback ")]
    if errors:
        return lines[errors[-1] :][:_LAST_LINES]
    if raised:
        after = range(raised[-1] + 1, len(lines))
        return lines[next((number for number in after if not lines[number][:1].isspace()), -1) :][:_LAST_LINES]
    return lines[-1:]


def _shares(jobs: int) -> list[list[int]]:
    """The cores of this process, divided; cores that are shared where there are fewer than jobs. [] for all."""
    if jobs == 1 or not hasattr(os, "sched_getaffinity"):
        return [[]] * jobs
    cores = sorted(os.sched_getaffinity(0))
    if jobs > len(cores):
        return [[cores[slot % len(cores)]] for slot in range(jobs)]
    return [cores[slot * len(cores) // jobs : (slot + 1) * len(cores) // jobs] for slot in range(jobs)]


class _Stop:
    """A context in which SIGTERM and Ctrl-C are counted. asked: how many have come."""

    def __init__(self) -> None:
        self.asked = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "_Stop":
        with contextlib.suppress(ValueError):  # not in the main thread, where no signal comes
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _note(self, *_) -> None:
        self.asked += 1
        # Not `print`: the signal may have come in the middle of one.
        text = "the points save and end; once more kills them" if self.asked == 1 else "killing the points"
        os.write(2, f"\nasked to stop: {text}\n".encode())


def failures(points: Sequence[PointFolder]) -> Iterator[str]:
    """Lines about the points that have failed, for a person."""
    for folder in points:
        failed = folder.failed
        if failed is not None:
            yield f"FAILED {folder.name}: {failed['reason']}; all that it said is in {failed['log']}"
            yield from (f"    {line}" for line in failed["says"])
