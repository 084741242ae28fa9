"""`watch`: tell what happens to a job until it ends, and make queued resources again that were taken back.

On GKE the cluster restarts jobs, and watching is only for people. A queued resource that is suspended never comes back:
there this loop is what restarts the job, and it does so only while it runs. It keeps nothing to itself: killed at any
moment and started again, here or on another machine, it goes on from what the API and the bucket say.
"""

import datetime
import functools
import time

from gcp.job import Job
from gcp.job_text import is_same_job
from gcp.plan import backend_of
from gcp.programs import ProgramError
from gcp.queued import Queued, exhausted
from gcp.run_folder import RunFolder
from gcp.states import AlreadyThere, Phase, State
from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, EXIT_INPUT, InputError

_LONGEST_PAUSE = 30 * 60
_MADE_AGAIN = """\
this loop is what makes the job again when its machines are taken back: only while it runs, so with a laptop that is
closed there is no restart. It can be ended and started again at any time, anywhere that gcloud is logged in"""


def watch(job: Job, *, every: float = 30, keep: bool = False) -> int:
    """Poll until the job ends.

    Args:
        every: seconds from one look to the next.
        keep: leave the queued resource of a job that has failed, which goes on costing money.

    Returns 0 where the job is finished, 1 where it has failed, 2 where it is not there.
    """
    backend = backend_of(job, shown=False)
    tell = _Teller()
    act = functools.partial(_ends, folder=RunFolder(job, shown=False))
    if isinstance(backend, Queued):
        print(_MADE_AGAIN)
        act = _Restarter(job, backend, tell, every, keep).act
    while True:
        try:
            state = backend.observe()
            tell(str(state))
            code = act(state)
            if code is not None:
                return code
        except ProgramError as error:
            if not error.passing:
                raise
            tell(f"no answer, trying on: {error}")
        time.sleep(every)


class _Teller:
    """Prints, with the time, what differs from what was printed last."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, text: str) -> None:
        if text != self._last:
            now = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            print(f"{now}  {text}", flush=True)
        self._last = text


def _ends(state: State, folder: RunFolder) -> int | None:
    """An exit code ends the loop."""
    # A JobSet that is finished is removed after a while.
    if state.phase is Phase.ABSENT and folder.finished() is not None:
        return EXIT_DONE
    return {Phase.FINISHED: EXIT_DONE, Phase.FAILED: EXIT_DEFECT, Phase.ABSENT: EXIT_INPUT}.get(state.phase)


class _Restarter:
    """What to do about a queued resource in each of its states. An exit code ends the loop."""

    def __init__(self, job: Job, backend: Queued, tell: _Teller, every: float, keep: bool):
        self.job, self.backend, self.tell, self.every, self.keep = job, backend, tell, every, keep
        self.pause = every  # before the next request, while there is no capacity

    def act(self, state: State) -> int | None:
        if state.phase is not Phase.ABSENT and (state.text is None or not is_same_job(state.text, self.job.text())):
            raise InputError(f"{self.job.name} is there, and was not made from this job file; `up` shows what differs")
        if state.phase is Phase.RUNNING:
            self.pause = self.every
        if state.lost:
            return self._make_again(state)
        if state.phase is Phase.FINISHED:
            return self._end(f"done: {self.job.run_dir}", EXIT_DONE)
        if state.phase is Phase.FAILED:
            return self._end("not made again: another start would end the same way", EXIT_DEFECT)
        if state.phase is Phase.SUSPENDED:
            return self._end("not made again: that was a person's doing", EXIT_DEFECT)
        return _ends(state, self.backend.folder)

    def _make_again(self, state: State) -> int | None:
        if self.backend.folder.finished() is not None:
            return self._end(f"done: {self.job.run_dir}", EXIT_DONE)
        if self.backend.restarts() >= self.job.max_restarts:
            return self._end(f"not made again: all {self.job.max_restarts} restarts are used", EXIT_DEFECT)
        if state.phase is Phase.FAILED:
            self._wait_for_capacity()
        # It may have been taken down, or made again by another watch, while this one waited.
        while self.backend.observe().lost:
            self.tell("deleting it, and making it again")
            try:
                self.backend.replace()
                return None
            except AlreadyThere:
                return None  # Another watch was quicker.
            except ProgramError as error:
                if not exhausted(str(error)):
                    raise
                self.tell(f"refused: {error}")
                self._wait_for_capacity()
        return None

    def _wait_for_capacity(self) -> None:
        self.tell(f"asking again in {self.pause:.0f} seconds")
        time.sleep(self.pause)
        self.pause = min(2 * self.pause, _LONGEST_PAUSE)

    def _end(self, why: str, code: int) -> int:
        self.tell(why)
        if code and self.keep:
            print(f"the queued resource {self.job.name} is still there, and may cost money: `down` deletes it")
            return code
        self.backend.delete()
        print("\n".join(self.backend.still_billed()))
        return code
