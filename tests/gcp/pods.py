"""What the tests of jobs share: job files, and pods on this machine that are watched while they run."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from gcp.job import Job, make_job
from tests.program.programs import REPOSITORY

PATIENCE = 240.0


def tiny_job(config: Path, program: Path | str = "train.py", **more) -> Job:
    """A job that nobody sends."""
    return make_job(
        {
            "name": "tiny",
            "config": str(config),
            "program": str(program),
            "tpu": "v5e-16",
            "project": "project",
            "location": "us-west4",
            "cluster": "cluster",
            "image": "image@sha256:" + "0" * 64,
            "out": "gs://bucket/runs",
            **more,
        }
    )


def write_job(file: Path, job: Job) -> Path:
    """Its job file."""
    lines = (line.split(" = ", 1) for line in job.text().splitlines())
    file.write_text("".join(f"{key} = {value}\n" for key, value in lines if value != "null"))
    return file


class LocalPod:
    """`python -m gcp local`, running. Does not outlive the context."""

    def __init__(
        self, job_file: Path, run_dir: Path | str, *arguments: str, env: dict[str, str], processes: int = 2
    ) -> None:
        command = [sys.executable, "-m", "gcp", "local", str(job_file), "--run_dir", str(run_dir), "--processes"]
        self.process = subprocess.Popen(
            [*command, str(processes), *arguments],
            cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.lines: list[tuple[float, str]] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def __enter__(self) -> "LocalPod":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self._reader.join()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.lines.append((time.monotonic(), line.rstrip("\n")))

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, f"nothing happens\n{self.text}"
            time.sleep(0.02)

    def wait_for_line(self, pattern: str) -> re.Match:
        """The first line that has it, as soon as it is there."""
        self.wait_for(lambda: re.search(pattern, self.text, re.MULTILINE) is not None)
        return re.search(pattern, self.text, re.MULTILINE)

    def wait_for_step(self, step: int, attempt: int) -> None:
        """Until an attempt has done a step."""
        self.wait_for_line(rf"(?s)host-0, attempt {attempt}: process.*\] step +{step}/")

    def entry(self, host: str, attempt: int) -> int:
        """The process number of a host's entry."""
        return int(self.wait_for_line(rf"^\[{host}\] .* attempt {attempt}: process (\d+)")[1])

    def when(self, pattern: str) -> float:
        """The time of the last line that has it."""
        return [time for time, line in self.lines if re.search(pattern, line)][-1]

    def ended(self) -> int:
        code = self.process.wait(PATIENCE)
        self._reader.join()
        return code


def log_of(run_dir: Path, host: str, attempt: int = 0) -> str:
    return (run_dir / "logs" / f"attempt-{attempt}" / f"{host}.log").read_text()
