"""The folder of one training run: what it holds, who may write to it, and when it is refused.

    config.gin               the resolved bindings this run was started with; another config is refused
    operative_config.gin     the bindings that were in fact used, defaults included
    costs.json               parameters, FLOPs and bytes of state, see `seqmodels.models.accounting.model_costs`
    environment.json         one entry per start: time, command line, source revision, versions, platform, devices
    metrics.jsonl            one JSON object per line, each with its step
    tensorboard/             event files
    checkpoints/             see `seqmodels.training.checkpoint`
    point.json               of a point of a sweep, see `seqmodels.tools.sweep`, which writes it before the run begins;
    FAILED                   what became of such a point, JSON with the reason
    evaluations/             results of `seqmodels.tools.evaluate`, and evaluated.json, which of them a sweep asked for
    logs/                    what the program printed on every host, of `gcp.entry`, which begins before the program
    DONE                     JSON with the last step and the final metrics; there once the run has finished

`config.gin` is the first that a run writes, so a folder without it is not a run. Whole files are replaced as a whole: a
kill leaves the old file or the new one. On a disk they are written under a temporary name, flushed and renamed. In a
bucket a file is one object, and what grows is put as a whole from time to time, see `seqmodels.files.GrowingFile`.
"""

import datetime
import difflib
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import seqmodels
from seqmodels.errors import InputError
from seqmodels.files import TEMPORARY, GrowingFile, in_bucket, list_folder, to_path, told, write_file
from seqmodels.machine import usable_cores

if TYPE_CHECKING:
    from etils import epath

LOGS, POINT, DONE, FAILED = "logs", "point.json", "DONE", "FAILED"
EVALUATIONS, EVALUATED = "evaluations", "evaluated.json"
_LOCK = ".lock"
_BEFORE = (_LOCK, LOGS, POINT)


class RunDirectory:
    """A run's folder, on this machine's file system or in a bucket. Nothing is touched before `open`.

    In a bucket nothing keeps a second program out: there the name of a job does, of which a cluster has one at a time.

    Args:
        path: the folder; it and its parents are created when missing. gs://BUCKET/... is one in a bucket.
        writer: whether this process writes. In a job of several processes the first one does; in the others
            every call succeeds and writes nothing.
    """

    def __init__(self, path: str | os.PathLike, *, writer: bool = True):
        self.path = to_path(path)
        self.writer = writer
        self._lock: TextIO | None = None
        self._rows: GrowingFile | None = None

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except InputError as lost:
            if error is None:
                raise
            error.add_note(str(lost))

    @property
    def checkpoints(self) -> "epath.Path":
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> "epath.Path":
        return self.path / "tensorboard"

    @property
    def metrics(self) -> "epath.Path":
        return self.path / "metrics.jsonl"

    @property
    def finished(self) -> dict[str, Any] | None:
        """What `mark_finished` wrote, {"step": ..., "metrics": {...}}; None for a run that goes on."""
        with told(f"cannot read the run directory {self.path}", self.path):
            try:
                return json.loads((self.path / DONE).read_text())
            except (FileNotFoundError, NotADirectoryError):
                return None

    def open(self, config: str, devices: str | None = None) -> None:
        """Create the folder or continue in it, and keep other programs on this machine out until `close`.

        The kernel ends the lock with the process, however it ends. A bucket has none. Each call adds an entry to
        `environment.json`.

        Args:
            config: the resolved bindings. A run that exists must have been started with the same ones;
                comments and blank lines do not count.
            devices: what the run computes on, for `environment.json`.

        Raises:
            InputError: the config is another one (the message goes on with a diff), the folder is something
                else's, cannot be written, or is in use. Nothing has been overwritten then.
        """
        if not self.writer:
            return
        try:
            with told(f"cannot write the run directory {self.path}", self.path, expected="a writable folder"):
                self._open(config, devices)
        except InputError as error:
            self.close()
            if isinstance(error.__cause__, FileExistsError | NotADirectoryError):
                parts = (self.path, *self.path.parents)
                file = next((part for part in parts if part.is_file()), error.__cause__.filename)
                raise InputError(f"{file} is a file; the run directory {self.path} needs a folder there") from error
            raise

    def _open(self, config: str, devices: str | None) -> None:
        on_disk = not in_bucket(self.path)
        if on_disk:
            self.path.mkdir(parents=True, exist_ok=True)
        names = [entry.name for entry in list_folder(self.path)]
        strangers = sorted(name for name in names if name not in _BEFORE and not name.endswith(TEMPORARY))
        if strangers and "config.gin" not in names:
            raise InputError(
                f"{self.path} is not a run directory: it holds {strangers[0]!r} and no config.gin; "
                "name an empty or a new folder"
            )
        if on_disk:
            self._take_lock()
        self._settle_config(config)
        if on_disk:
            self.tensorboard.mkdir(exist_ok=True)
            self.checkpoints.mkdir(exist_ok=True)
        history = self.path / "environment.json"
        starts = json.loads(history.read_text()) if history.exists() else []
        write_file(history, json.dumps([*starts, {**environment(), "devices": devices}], indent=1) + "\n")

    def check(self, config: str) -> None:
        """Raise `InputError` if the run was started with another config; writes nothing."""
        file = self.path / "config.gin"
        if not file.exists():
            raise InputError(f"{self.path} is not a whole run directory: it holds no config.gin")
        self._refuse_other_config(file.read_text(), config)

    def close(self) -> None:
        """Store what is not stored yet, and let other programs in."""
        try:
            if self._rows is not None:
                self._rows.close()
        finally:
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def write_operative_config(self, text: str) -> None:
        """Write `operative_config.gin`; known only once everything has been constructed."""
        if self.writer:
            write_file(self.path / "operative_config.gin", text)

    def cut_metrics(self, step: int) -> None:
        """Cut off the rows of `metrics.jsonl` behind `step`, and a line torn by a kill.

        What is then appended makes the file of a run that was never stopped, as long as every row up to a
        checkpoint's step was appended, and `store_metrics` called, before that checkpoint was saved.
        """
        if self.writer:
            if self._rows is not None:
                self._rows.close()
            kept = [row for row in read_metrics(self.metrics) if row["step"] <= step]
            write_file(self.metrics, "".join(json.dumps(row) + "\n" for row in kept))

    def append_metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one row, {"step": step, **values}. On a disk no kill of this process can lose it once this returns, in
        a bucket once `store_metrics` does."""
        if not self.writer:
            return
        if self._rows is None:
            self._rows = GrowingFile(self.metrics)
        self._rows.write(json.dumps({"step": step, **values}) + "\n")

    def store_metrics(self) -> None:
        """Return once every row is in the run directory, wherever that is."""
        if self._rows is not None:
            self._rows.flush()

    def mark_finished(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write `DONE`: from now on this run has nothing left to do."""
        if self.writer:
            write_file(self.path / DONE, json.dumps({"step": step, "metrics": dict(metrics)}, indent=1) + "\n")

    def _take_lock(self) -> None:
        file = Path(self.path) / _LOCK
        self._lock = file.open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            raise InputError(
                f"{self.path} is in use by process {owner} on this machine; "
                "wait for it, stop it, or name another run directory"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()

    def _settle_config(self, config: str) -> None:
        """Write `config.gin`, or find that it says the same."""
        file = self.path / "config.gin"
        if not file.exists():
            write_file(file, config)
            return
        self._refuse_other_config(file.read_text(), config)

    def _refuse_other_config(self, own: str, config: str) -> None:
        saved, given = _bindings(own), _bindings(config)
        if saved != given:
            lines = difflib.unified_diff(saved, given, "this run", "given", n=0, lineterm="")
            difference = [line for line in lines if not line.startswith(("--- ", "+++ ", "@@ "))]
            raise InputError(
                f"{self.path} is a run with another config; name another run directory to start a new run, "
                f"or use the config in {self.path / 'config.gin'} to continue this one (- this run's, + yours):\n"
                + "\n".join(difference)
            )


def _bindings(config: str) -> list[str]:
    return [line for line in config.splitlines() if line.strip() and not line.startswith("#")]


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, in order; none when there is no file. A torn last line is left out.

    Raises:
        InputError: another line is not one JSON object with a step; the message has its number.
    """
    path = to_path(path)
    with told(f"cannot read {path}", path):
        if not path.exists():
            return []
        lines = path.read_bytes().decode(errors="replace").split("\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}, line {number}: expected a JSON object with a step, found {line[:60]!r}"
            ) from error
        rows.append(row)
    return rows


def environment() -> dict[str, Any]:
    """What this program runs on: time, command line, source revision, package versions, platform, processor."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [sys.executable, *sys.argv],
        "source": source_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": usable_cores(),
        "packages": dict(sorted((d.name, d.version) for d in importlib.metadata.distributions())),
    }


def source_revision() -> dict[str, Any] | None:
    """{"revision": commit, "changed": [changed files]}. Where the code is not in a git checkout, as in a container,
    {"revision": $SEQMODELS_REVISION}; None where that is not set."""
    root = Path(seqmodels.__file__).resolve().parent.parent
    git = shutil.which("git")

    def ask(*arguments: str) -> str | None:
        answer = subprocess.run(
            [git, "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
        return answer.stdout.rstrip("\n") if answer.returncode == 0 else None

    # An installed package may lie inside some other repository, whose revision says nothing about it.
    if git is None or ask("rev-parse", "--show-toplevel") != str(root):
        revision = os.environ.get("SEQMODELS_REVISION")
        return {"revision": revision} if revision else None
    changed = ask("status", "--porcelain") or ""
    return {"revision": ask("rev-parse", "--verify", "--quiet", "HEAD"), "changed": changed.splitlines()}


def _processor() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
