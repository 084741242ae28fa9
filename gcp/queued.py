"""A job as a queued resource of the Cloud TPU API: runs the commands of `gcp.queued_commands`.

The machines start a program that ends with 42 again by themselves. One that is taken back suspends the whole queued
resource, which never comes back: `python -m gcp watch` deletes it and creates it again.
"""

import collections
import datetime
import json
import re
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gcp import queued_commands as api
from gcp.job import Job
from gcp.job_text import job_of_text
from gcp.programs import Answer, ProgramError, run
from gcp.run_folder import RECORD, RunFolder
from gcp.states import MEND, AlreadyThere, Phase, State

# In the run directory: the number of the first attempt, and whether the job is being made again.
_RECORD = "logs/queued_resource.json"
# What the API says of requests that another one, a little later, may fare better than.
_NO_CAPACITY = (
    r"(?i)no more capacity|insufficient capacity|insufficient reserved|stockout|out of capacity|unavailable"
    r"|internal error"
)
_WATCH = "`watch` deletes it and makes it again, as long as that runs"
_ENDS = {
    0: "it ended, and left no DONE in the run directory",
    1: "a defect: the program's log ends with a traceback",
    2: "a wrong input: the program's log ends with a line that says which",
}


class Queued:
    """See `gcp.states.Backend`. shown: print what asks, too."""

    programs = ("gcloud",)
    over = ()  # Machines stay, and may boot again.
    billed = "its machines, from when they are there until it is suspended or deleted"

    def __init__(self, job: Job, shown: bool = True):
        self.job = job
        self.shown = shown
        self.folder = RunFolder(job, shown)

    def observe(self) -> State:
        answer = self._gcloud(api.describe_command(self.job), shown=self.shown, absent=True)
        if answer.absent:
            return self._absent()
        found = json.loads(answer.out)
        word = api.state(found)
        state = State(
            Phase.WAITING,
            why=api.why(found),
            made=found.get("createTime", ""),
            attempt=api.attempt_of(found),
            text=api.job_text_of(found),
        )
        if word == "ACTIVE":
            return self._active(state)
        if state.attempt:
            state = state._replace(restarts=state.attempt - self._first_attempt())
        if word == "SUSPENDED":
            by_user = found["state"].get("stateInitiator") == "USER"
            return state._replace(phase=Phase.SUSPENDED, lost=not by_user, remedy="" if by_user else _WATCH)
        if word == "FAILED":
            lost = no_capacity(state.why) or (self._was_not_served(found) and not exhausted(state.why))
            remedy = _WATCH if lost else "another request fares no better until that is mended"
            return state._replace(phase=Phase.FAILED, lost=lost, remedy=remedy)
        return state

    def reports(self) -> list[api.HostReport]:
        """Where every host stood when it last said so, of machines that are gone, too."""
        return api.host_reports(self._gcloud(api.hosts_command(self.job), shown=self.shown, absent=True).out)

    def send(self) -> None:
        # Before anything is asked for: a bucket that cannot be written to shows here.
        first = api.next_attempt(self.reports())
        self._record(first, replacing=False)
        self._create(first)

    def replace(self) -> None:
        """Delete what there is, and make the job again as its next attempt. Where this is killed half way the state
        says so, and the same call goes on. Raises `AlreadyThere`."""
        first = self._first_attempt()
        self._record(first, replacing=True)
        self._delete()
        self._create(api.next_attempt(self.reports()))
        self._record(first, replacing=False)

    def restarts(self) -> int:
        """Attempts since `send`, those on the same machines too. A request that got no machines is none."""
        return max(api.next_attempt(self.reports()) - 1 - self._first_attempt(), 0)

    def delete(self) -> None:
        self._delete()
        if self._recorded().get("replacing"):
            self._record(self._first_attempt(), replacing=False)

    def logs_command(self, *, follow: bool, slice: int, host: int) -> list[str]:
        return api.logs_command(self.job, follow=follow, slice=slice, host=host)

    def send_commands(self) -> list[str]:
        return [shlex.join(api.create_command(self.job, "STARTUP_SCRIPT", "JOB_TEXT"))]

    def documents(self) -> list[tuple[str, str]]:
        return [("startup script", api.startup_script(self.job)), ("job text", self.job.text())]

    def still_billed(self) -> list[str]:
        where = f"--zone={self.job.location} --project={self.job.project}"
        return [
            "the queued resource and its machines are gone, and cost nothing. What else there is in the zone:",
            f"  gcloud compute tpus queued-resources list {where}",
            f"  gcloud compute tpus tpu-vm list {where}",
        ]

    def _delete(self) -> None:
        self._gcloud(api.delete_command(self.job), absent=True, seconds=900)
        for _ in range(60):
            if self._gcloud(api.describe_command(self.job), shown=False, absent=True).absent:
                return
            time.sleep(10)
        raise ProgramError(f"{self.job.name} is still being deleted after ten minutes; the same command waits on")

    def _was_not_served(self, found: dict[str, Any]) -> bool:
        """Whether a request failed after the time for which it was valid. What the API says of that is not known."""
        if "createTime" not in found:
            return False
        made = datetime.datetime.fromisoformat(found["createTime"])
        return datetime.datetime.now(datetime.UTC) - made >= datetime.timedelta(hours=self.job.valid_hours)

    def _first_attempt(self) -> int:
        """The number of the attempt that `send` made."""
        return int(self._recorded().get("first", 0))

    def _create(self, attempt: int) -> None:
        with tempfile.TemporaryDirectory(prefix="seqmodels-") as folder:
            files = {"startup.sh": api.startup_script(self.job), "job.txt": self.job.text()}
            for name, text in files.items():
                Path(folder, name).write_text(text)
            paths = [str(Path(folder, name)) for name in files]
            answer = self._gcloud(api.create_command(self.job, *paths, attempt=attempt), present=True, seconds=180)
        if answer.present:
            raise AlreadyThere

    def _record(self, first: int, replacing: bool) -> None:
        self.folder.write(_RECORD, json.dumps({"first": first, "replacing": replacing}) + "\n")

    def _recorded(self) -> dict[str, Any]:
        return json.loads(self.folder.read(_RECORD) or "{}")

    def _absent(self) -> State:
        if not self._recorded().get("replacing"):
            return State(Phase.ABSENT)
        text = self.folder.read(RECORD)
        if text is None or not self._meets(job_of_text(text)):
            return State(Phase.ABSENT)
        return State(Phase.RESTARTING, why="it is deleted, to be made again", remedy=_WATCH, text=text, lost=True)

    def _meets(self, other: Job) -> bool:
        """Whether a job is to be in this one's place."""
        return all(getattr(other, key) == getattr(self.job, key) for key in ("backend", "project", "location"))

    def _active(self, state: State) -> State:
        """The machines are there; what they do stands in the bucket."""
        own = [x for x in self.reports() if x.attempt >= state.attempt]
        attempt = max((x.attempt for x in own), default=state.attempt)
        said = collections.Counter("stopped" if x.stopped else "ended" if x.code else _word(x) for x in own)
        said["silent"] = max(self.job.hosts - len(own), 0)
        state = state._replace(
            phase=Phase.RUNNING,
            why="",
            attempt=attempt,
            restarts=attempt - self._first_attempt() if attempt else 0,
            pods={word: count for word, count in sorted(said.items()) if count},
        )
        stopped = [x for x in own if x.stopped]
        # Those whose program was at fault before those that stopped for want of a peer.
        bad = sorted((x for x in stopped if x.code != 0), key=lambda x: x.code not in (1, 2))
        if bad:
            why = f"{bad[0].text}: {_ENDS.get(bad[0].code, 'it has used its restarts')}"
            return state._replace(phase=Phase.FAILED, why=why, remedy=MEND)
        if stopped:
            if self.folder.finished() is not None:
                return state._replace(phase=Phase.FINISHED)
            if len(stopped) == self.job.hosts:
                return state._replace(phase=Phase.FAILED, why=_ENDS[0], remedy=MEND)
        ended = [x for x in own if x.code is not None and not x.stopped and x.attempt == attempt]
        if ended:
            return state._replace(phase=Phase.RESTARTING, why=ended[0].text)
        if said["running"] < self.job.hosts and not stopped:
            return state._replace(
                phase=Phase.WAITING,
                why=f"the machines are there; the program runs on {said['running']} of {self.job.hosts}",
            )
        return state

    def _gcloud(
        self, command: Sequence[str], *, absent: bool = False, present: bool = False, shown: bool = True, **options: Any
    ) -> Answer:
        answer = run(command, shown=shown, **options)
        if answer.code == 0 or (absent and answer.absent) or (present and answer.present):
            return answer
        raise answer.error()


def no_capacity(text: str) -> bool:
    """Whether an error of the API says that there are no free machines now, or nothing at all."""
    return re.search(_NO_CAPACITY, text) is not None and not re.search(r"(?i)quota", text)


def exhausted(text: str) -> bool:
    """Whether an error says that machines or quota are used up now. Those of a job that ran are free again in time."""
    return no_capacity(text) or re.search(r"(?i)quota|RESOURCE_EXHAUSTED", text) is not None


def _word(report: api.HostReport) -> str:
    return report.text.rpartition(": ")[2]
