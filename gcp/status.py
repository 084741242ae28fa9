"""`status` and `logs`: what a job does, why it waits, and what it has written so far."""

import datetime
from collections.abc import Iterator

from gcp.job import Job
from gcp.job_text import is_same_job
from gcp.plan import backend_of, place_of
from gcp.programs import ProgramError, stream
from gcp.run_folder import METRICS, RECORD, RunFolder
from gcp.states import Phase, State
from gcp.submit import sent_elsewhere
from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, EXIT_INPUT, InputError


def status(job: Job) -> int:
    """Print one screen. Returns 0; 1 for a job that has failed, 2 for one that is not there and not finished."""
    backend = backend_of(job)
    state = backend.observe()
    run = _Run(job)
    lines = [*_machine_facts(job, state, backend.billed), *_elsewhere(job, state), *run.facts()]
    print("\n".join(f"{name:<13}{text}" for name, text in lines))
    if run.finished:
        return EXIT_DONE
    return {Phase.FAILED: EXIT_DEFECT, Phase.ABSENT: EXIT_INPUT}.get(state.phase, EXIT_DONE)


def logs(job: Job, *, follow: bool = False, slice: int = 0, host: int = 0) -> int:
    """Print what one host writes."""
    for name, value, count in (("slice", slice, job.slices), ("host", host, job.slice.hosts)):
        if not 0 <= value < count:
            raise InputError(f"--{name} is {value}: expected 0 to {count - 1}")
    backend = backend_of(job)
    state = backend.observe()
    where = f"all hosts' logs, of all attempts: gcloud storage ls {job.run_dir}/logs/"
    if state.phase in (Phase.ABSENT, Phase.WAITING):
        raise InputError(f"{job.name} is {state}, and has no log to show; {where}")
    print(where)
    return stream(backend.logs_command(follow=follow, slice=slice, host=host))


def _machine_facts(job: Job, state: State, billed: str) -> Iterator[tuple[str, str]]:
    yield "job", f"{job.name}: {job.slices} x {job.tpu} ({job.capacity}), {job.chips} chips"
    yield "state", state.phase.value + (f", since {state.since} ({_ago(state.since)})" if state.since else "")
    if state.why:
        yield "why", state.why
    if state.remedy:
        yield "what to do", state.remedy
    if state.phase is Phase.ABSENT:
        return
    yield "hosts", ", ".join(f"{count} {phase}" for phase, count in state.pods.items()) or "none yet"
    yield "made", f"{state.made} ({_ago(state.made)})"
    yield "restarts", f"{state.restarts} of {job.max_restarts} used; attempt {state.attempt}"
    yield "costs money", billed
    if state.text is None:
        yield "note", "it was not made by `up`"
    elif not is_same_job(state.text, job.text()):
        yield "note", "it was made from another job file than this one: `up` shows what differs, and sends nothing"


def _elsewhere(job: Job, state: State) -> Iterator[tuple[str, str]]:
    if state.phase is not Phase.ABSENT:
        return
    try:
        sent = sent_elsewhere(job, RunFolder(job).read(RECORD))
    except InputError:
        return  # A bucket that cannot be read is told of by the facts of the run.
    if sent is not None:
        yield "note", f"it was last sent to {place_of(sent)}; `down` takes it down there, too"


class _Run:
    """What the bucket says; a bucket that cannot be read is one of the facts."""

    def __init__(self, job: Job):
        self.path, self.error = job.run_dir, ""
        self.done = self.row = self.written = self.checkpoint = None
        folder = RunFolder(job)
        try:
            self.done = folder.finished()
            self.row, self.checkpoint = folder.last_metrics(), folder.newest_checkpoint()
            self.written = folder.written(METRICS) if self.row else None
        except ProgramError as error:
            self.error = str(error)

    @property
    def finished(self) -> bool:
        return self.done is not None

    def facts(self) -> Iterator[tuple[str, str]]:
        yield "run", self.path
        if self.error:
            yield "", f"it cannot be read: {self.error}"
            return
        if self.done is not None:
            yield "done", f"at step {self.done.get('step', 'unknown')}"
        yield "trained", self._trained()
        yield "checkpoint", f"of step {self.checkpoint}" if self.checkpoint is not None else "none yet"

    def _trained(self) -> str:
        if self.row is None:
            return "no metrics yet"
        written = f", written {_ago(self.written)} ago" if self.written else ""
        return f"to step {self.row['step']}, loss {self.row['loss']:.4g}{written}"


def _ago(time: str) -> str:
    """How long ago a time in the way of Kubernetes and Google was; "?" where it is none."""
    try:
        seconds = (datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(time)).total_seconds()
    except (ValueError, TypeError):
        return "?"
    minutes = max(int(seconds // 60), 0)
    days, hours = minutes // (24 * 60), minutes // 60 % 24
    return f"{days} d {hours} h" if days else f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"
