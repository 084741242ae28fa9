"""What stands in a job's run directory in its bucket, read and written with `gcloud storage`."""

import json
from typing import Any

from gcp.job import Job
from gcp.programs import run

# The job's text, as it was sent. A folder that holds anything but logs is no place for a run to begin in.
RECORD = "logs/job.txt"
METRICS = "metrics.jsonl"
_TAIL = 8192


class RunFolder:
    """The run directory of a job. What cannot be read, for want of rights or of a network, is a `ProgramError`."""

    def __init__(self, job: Job, shown: bool = True):
        self.path = job.run_dir
        self.shown = shown

    def read(self, name: str, *flags: str) -> str | None:
        """A file's text; None where there is none. flags: of `gcloud storage cat`."""
        answer = run(["gcloud", "storage", "cat", f"{self.path}/{name}", *flags], shown=self.shown)
        if answer.absent:
            return None
        if answer.code != 0:
            raise answer.error()
        return answer.out

    def write(self, name: str, text: str) -> None:
        answer = run(["gcloud", "storage", "cp", "-", f"{self.path}/{name}"], text=text)
        if answer.code != 0:
            raise answer.error()

    def finished(self) -> dict[str, Any] | None:
        """Step and metrics of a run that is done; None for one that is not."""
        text = self.read("DONE")
        if text is None:
            return None
        try:
            return dict(json.loads(text))
        except ValueError:
            return {}

    def last_metrics(self) -> dict[str, Any] | None:
        """The newest row of metrics.jsonl that has a loss; None where there is none yet."""
        text = self.read(METRICS, f"--range=-{_TAIL}")
        if text == "":  # of files that are shorter than the range
            text = self.read(METRICS)
        for line in reversed((text or "").splitlines()):
            try:
                row = json.loads(line)
            except ValueError:
                continue  # cut by the range, or half written
            if isinstance(row, dict) and "loss" in row:
                return row
        return None

    def written(self, name: str) -> str | None:
        """When a file was written last, as Google writes times; None where there is none."""
        url = f"{self.path}/{name}"
        # Objects are made anew whenever they are written.
        command = ["gcloud", "storage", "objects", "describe", url, "--format=value(creation_time)"]
        answer = run(command, shown=self.shown)
        if answer.absent:
            return None
        if answer.code != 0:
            raise answer.error()
        return answer.out.strip()

    def newest_checkpoint(self) -> int | None:
        """Its step. What has no such file is still being written, or never was to the end."""
        answer = run(["gcloud", "storage", "ls", f"{self.path}/checkpoints/*/commit_success.txt"], shown=self.shown)
        if answer.absent:
            return None
        if answer.code != 0:
            raise answer.error()
        names = [line.split("/")[-2] for line in answer.out.split()]
        return max((int(x) for x in names if x.isdecimal()), default=None)
