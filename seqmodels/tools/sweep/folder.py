"""The folder of a sweep: its points' run directories, what has become of each, and who may write to it."""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from seqmodels import config
from seqmodels.errors import InputError
from seqmodels.files import TEMPORARY, in_bucket, told, write_file
from seqmodels.tools.sweep.check import Resolved
from seqmodels.tools.sweep.points import Sweep, result_of
from seqmodels.training.run_directory import EVALUATED, EVALUATIONS, FAILED, POINT, RunDirectory

_LOCK, _SWEEP = ".lock", "sweep.json"
_TAIL = 8192


class PointFolder:
    """What there is of one point, read from its run directory whenever it is asked for."""

    def __init__(self, path: Path, log: Path):
        self.path, self.log = path, log

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def config(self) -> Path:
        return self.path / "config.gin"

    @property
    def started(self) -> bool:
        """Whether train.py has opened it."""
        return (self.path / "environment.json").exists()

    @property
    def finished(self) -> dict[str, Any] | None:
        """The step and the last row of metrics of a run that is trained to its end."""
        return RunDirectory(self.path, writer=False).finished

    @property
    def failed(self) -> dict[str, Any] | None:
        """Of a point that has failed: {"program", "code", "reason", "says": its last lines, "log"}."""
        file = self.path / FAILED
        return json.loads(file.read_text()) if file.exists() else None

    def fail(self, **why: Any) -> None:
        write_file(self.path / FAILED, json.dumps(why, indent=1) + "\n")

    def forget_failure(self) -> None:
        (self.path / FAILED).unlink(missing_ok=True)

    @property
    def step(self) -> int:
        """The last update that metrics.jsonl tells of."""
        try:
            with (self.path / "metrics.jsonl").open("rb") as file:
                file.seek(0, os.SEEK_END)
                file.seek(max(0, file.tell() - _TAIL))
                lines = file.read().split(b"\n")[:-1]
        except OSError:
            return 0
        for line in reversed(lines):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return int(json.loads(line)["step"])
        return 0

    def is_evaluated(self, evaluation: str) -> bool:
        """Whether the finished run has the result of this evaluation, which `note_evaluation` knows: of its last step,
        with these arguments."""
        done, text = self.finished, self._result(evaluation)
        try:
            step = json.loads(text or "{}").get("step")
        except ValueError:
            return False
        noted = self._evaluated().get(result_of(evaluation))
        return done is not None and step == done["step"] and noted == [evaluation, _digest(text)]

    def note_evaluation(self, evaluation: str) -> None:
        """That the result is that of these arguments; one that is written by hand later is not."""
        text = self._result(evaluation)
        if text is not None:
            noted = self._evaluated() | {result_of(evaluation): [evaluation, _digest(text)]}
            write_file(self.path / EVALUATIONS / EVALUATED, json.dumps(noted, indent=1) + "\n")

    def _result(self, evaluation: str) -> str | None:
        return _text_of(self.path / EVALUATIONS / f"{result_of(evaluation)}.json")

    def _evaluated(self) -> dict[str, list[str]]:
        file = self.path / EVALUATIONS / EVALUATED
        return json.loads(file.read_text()) if file.exists() else {}

    def user(self) -> str | None:
        """The process that has the run directory in use."""
        try:
            with (self.path / _LOCK).open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return file.read().strip() or "unknown"
        except FileNotFoundError:
            pass
        return None


class SweepFolder:
    """A sweep's folder, which must be on a disk of this machine. Nothing is touched before `open`."""

    def __init__(self, path: Path):
        if in_bucket(path):
            raise InputError(
                f"--sweep_dir {path} is in a bucket: expected a folder; a point that goes to a pod has its "
                "run directory in the bucket of the job file"
            )
        self.path = path
        self._lock: TextIO | None = None

    def point(self, name: str) -> PointFolder:
        return PointFolder(self.path / name, self.path / "logs" / f"{name}.log")

    def known(self) -> list[dict[str, Any]]:
        """The points of sweep.json, also those that the sweep's file had once; none where there is none."""
        record = self._record()
        return [*record.get("points", []), *record.get("gone", [])]

    def checked(self, sweep: Sweep) -> dict[str, tuple[str, int]]:
        """Fingerprints of the configs, and steps, of points that have been checked before, for the sweep's metric."""
        if self._record().get("metric") != sweep.metric:
            return {}
        return {point["name"]: (point["fingerprint"], point["steps"]) for point in self.known()}

    def check(self, sweep: Sweep, resolved: Mapping[str, Resolved]) -> None:
        """Raise `InputError` where the folder is something else's, or has started a point with another config."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"--sweep_dir {self.path} is a file: expected a folder")
        inside = sorted(x.name for x in self.path.iterdir()) if self.path.exists() else []
        strangers = [x for x in inside if x not in (_LOCK, "logs") and not x.endswith(TEMPORARY)]
        known = self.known()
        if strangers and not known:
            raise InputError(
                f"{self.path} is not the folder of a sweep: it holds {strangers[0]!r} and no {_SWEEP}; "
                "name an empty or a new folder"
            )
        if known and not {point["name"] for point in known} & resolved.keys():
            raise InputError(
                f"{self.path} is the folder of another sweep, {self._record()['sweep']}: none of its {len(known)} "
                f"points is one of {sweep.file}; name another folder"
            )
        changed = {}
        for name, point in resolved.items():
            folder = self.point(name)
            if folder.started and (difference := config.diff(_text_of(folder.config) or "", point.text)):
                changed[name] = difference
        if changed:
            name, difference = next(iter(changed.items()))
            others = f" (as has the config of {len(changed) - 1} others)" if len(changed) > 1 else ""
            raise InputError(
                f"{self.path / name} has begun with another config{others}; undo the change, or move the folder away "
                f"to run it anew (- begun with, + now):\n{difference}"
            )

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Make the folder, and keep other sweeps out while the context lasts."""
        with told(f"cannot write {self.path}", self.path, expected="a writable folder"):
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            lock = (self.path / _LOCK).open("a+")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                owner = lock.read().strip() or "unknown"
                raise InputError(
                    f"{self.path} is in use by process {owner} on this machine; wait for it, stop it, or name another "
                    "folder"
                ) from None
            lock.truncate(0)
            lock.write(f"{os.getpid()}\n")
            lock.flush()
            yield

    def write(self, sweep: Sweep, resolved: Mapping[str, Resolved]) -> list[str]:
        """Write sweep.json and, for every point, what it is and its config. The runs of points that the sweep's file
        had once stay as they are; returns their names."""
        now = [
            {
                "name": point.name,
                "axes": point.axes,
                "bindings": [*point.bindings, *sweep.overrides],
                "steps": resolved[point.name].steps,
                "fingerprint": resolved[point.name].fingerprint,
            }
            for point in sweep.points
        ]
        names = {point["name"] for point in now}
        gone = [point for point in self.known() if point["name"] not in names]
        common = {
            "sweep": str(sweep.file),
            "question": sweep.question,
            "metric": sweep.metric,
            "best_of": sweep.best_of,
            "order": sweep.order,
        }
        self._put(self.path / _SWEEP, {**common, "evaluate": sweep.evaluate, "points": now, "gone": gone})
        for entry in gone:  # the report reads them too, and the same of the sweep from all points
            file = self.point(entry["name"]).path / POINT
            if (text := _text_of(file)) is not None:
                self._put(file, {**json.loads(text), **{key: common[key] for key in common if key != "order"}})
        for entry in now:
            folder = self.point(entry["name"])
            with told(f"cannot write {folder.path}", folder.path):
                folder.path.mkdir(exist_ok=True)
            self._put(folder.path / POINT, {"name": entry["name"], **common, **entry})
            text = resolved[entry["name"]].text
            if not folder.started and _text_of(folder.config) != text:
                write_file(folder.config, text)
        return [point["name"] for point in gone]

    def _put(self, file: Path, content: Any) -> None:
        text = json.dumps(content, indent=1) + "\n"
        if _text_of(file) != text:
            write_file(file, text)

    def _record(self) -> dict[str, Any]:
        file = self.path / _SWEEP
        if not file.exists():
            return {}
        try:
            return json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {file}: {error}") from error


def _digest(text: str | None) -> str:
    return hashlib.sha256((text or "").encode()).hexdigest()[:16]


def _text_of(file: Path) -> str | None:
    return file.read_text() if file.exists() else None
