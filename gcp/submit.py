"""`up` and `down`: a job is sent once, whatever is run how often, and is taken down without a trace of its own left."""

import sys

from gcp.invariants import violations
from gcp.job import Job, difference
from gcp.job_text import is_same_job, is_same_run, job_of_text
from gcp.manifest import jobset
from gcp.plan import backend_of, cost, place_of
from gcp.programs import ProgramError, missing
from gcp.run_folder import RECORD, RunFolder
from gcp.states import AlreadyThere, Phase, State
from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, EXIT_INPUT, InputError


def up(job: Job, *, resume: bool = False, again: bool = False) -> int:
    """Send the job, unless it is there or done.

    Args:
        resume: the job file has changed on purpose, in nothing that decides what is trained.
        again: where the job is there and has failed, delete it and send it again; the job file may have changed as for
            `resume`.

    Returns the exit code; raises `InputError` where nothing could be sent.
    """
    refuse_impossible(job)
    backend, folder = backend_of(job), RunFolder(job)
    recorded = folder.read(RECORD)
    _refuse_a_second(job, recorded)
    state = backend.observe()
    if state.phase is not Phase.ABSENT:
        if not (again and _may_replace(job, state)):
            return _there(job, state)
        print(f"{job.name} is {state}; deleting it to send it again")
        backend.delete()
        resume = True

    if recorded is not None and not is_same_job(recorded, job.text()):
        code = _other_job(job, recorded, folder, resume)
        if code is not None:
            return code
    done = folder.finished()
    if done is not None:
        print(f"{job.name} is finished, at step {done.get('step', 'unknown')}: {job.run_dir}; nothing sent")
        return EXIT_DONE

    print(f"{job.name}: {job.chips} chips, {job.hosts} hosts; {cost(job)}", flush=True)
    folder.write(RECORD, job.text())  # before it is sent, to learn now whether the bucket can be written to
    try:
        backend.send()
    except AlreadyThere:
        state = backend.observe()
        if state.text is not None and not is_same_job(state.text, job.text()):
            folder.write(RECORD, state.text)
        return _there(job, state)
    print(f"{job.name} is sent. `python -m gcp status JOB.toml` says how it is, `down` takes it down")
    if job.backend == "queued_resources":
        print("a preemption ends it, unless `python -m gcp watch JOB.toml` runs somewhere and makes it again")
        print("when it has ended it goes on costing money, until `down` deletes it, or a `watch` that runs does")
    return EXIT_DONE


def down(job: Job, *, yes: bool = False) -> int:
    """Delete the job, wait until it is gone, and say what still costs money. The run directory stays.

    Where the job was sent last to another place than the job file has now, it is deleted there, too.
    """
    _take_down(job, yes)
    try:
        sent = sent_elsewhere(job, RunFolder(job).read(RECORD))
    except ProgramError as error:
        print(f"whether it was sent to another place before is not known: {error}", file=sys.stderr)
        return EXIT_DONE
    if sent is not None and _of_this_run(job, backend_of(sent).observe()):
        _take_down(sent, yes)
    return EXIT_DONE


def _take_down(job: Job, yes: bool) -> None:
    backend, place = backend_of(job), place_of(job)
    state = backend.observe()
    if state.phase is Phase.ABSENT:
        print(f"{job.name} is not there, in {place}; nothing to take down")
    elif state.text is None:
        raise InputError(f"{job.name} is there, and was not made by `up`: whoever made it may take it down")
    else:
        _confirm(f"{job.name} is {state}, in {place}. Take it down? The run directory {job.run_dir} stays.", yes)
        backend.delete()
        print(f"{job.name} is gone; {job.run_dir} is as it was")
    print("\n".join(backend.still_billed()))


def sent_elsewhere(job: Job, recorded: str | None) -> Job | None:
    """The job as it was sent last, if that was to another place than it would go to now."""
    if recorded is None:
        return None
    try:
        sent = job_of_text(recorded)
    except InputError as error:
        says = f"it says where {job.name} was sent: remove it if that is nowhere"
        raise InputError(f"{job.run_dir}/{RECORD}: {error}; {says}") from None
    return None if place_of(sent) == place_of(job) else sent


def refuse_impossible(job: Job) -> None:
    """Raise `InputError` for what can be known offline and at once: programs that are not there, a wrong manifest."""
    problems = missing(backend_of(job).programs)
    if job.backend == "gke":
        problems += violations(jobset(job))
    if problems:
        raise InputError("; ".join(problems))


def _of_this_run(job: Job, state: State) -> bool:
    """Whether what is there, under the job's name, writes the job's run directory."""
    return state.text is not None and job_of_text(state.text).run_dir == job.run_dir


def _refuse_a_second(job: Job, recorded: str | None) -> None:
    """Raise `InputError` where the job is in another place than the job file has now: two would write one run."""
    sent = sent_elsewhere(job, recorded)
    if sent is None:
        return
    backend, place = backend_of(sent), place_of(sent)
    try:
        state = backend.observe()
    except InputError as error:
        raise InputError(
            f"{job.name} was last sent to {place}, and whether it is there cannot be seen: {error}; if that place is "
            f"gone for good, remove {job.run_dir}/{RECORD}; nothing sent"
        ) from error
    if state.phase not in (Phase.ABSENT, *backend.over) and _of_this_run(job, state):
        raise InputError(
            f"{job.name} is in {place}: {state}; two jobs must not write {job.run_dir}: "
            "`python -m gcp down JOB.toml`, with this job file, takes it down there; nothing sent"
        )


_REPLACED = (Phase.FAILED, Phase.SUSPENDED)  # by --again


def _may_replace(job: Job, state: State) -> bool:
    return state.phase in _REPLACED and state.text is not None and is_same_run(state.text, job.text())


def _there(job: Job, state: State) -> int:
    """The job's name is taken: by this job, or by another."""
    if state.text is None:
        raise InputError(f"{job.name} is there, and was not made by `up`: take another name; nothing sent")
    if not is_same_job(state.text, job.text()):
        if _may_replace(job, state):
            way = "`up --again` deletes it, and goes on with the run as the job file has it"
        elif is_same_run(state.text, job.text()):
            way = "`down` first, then `up --resume` goes on with the run as the job file has it"
        else:
            way = "take another name"
        return _refuse(job, state.text, f"{job.name} is there ({state}) with another job file; {way}")
    print(f"{job.name} is already there: {state}; nothing sent")
    if state.phase in _REPLACED:
        print("`up --again` deletes it and sends it again; it goes on from its last checkpoint")
        return EXIT_DEFECT
    return EXIT_DONE


def _other_job(job: Job, recorded: str, folder: RunFolder, resume: bool) -> int | None:
    """The bucket has a run of that name from another job file: the exit code, or None to go on."""
    if folder.read("config.gin") is None:
        return None  # Nothing was trained.
    same = is_same_run(recorded, job.text())
    if resume and same:
        print(f"{job.run_dir} goes on with other values (- so far, + now):\n{difference(recorded, job.text())}")
        return None
    way = "`up --resume` goes on with it" if same else "take another name, or undo the change"
    return _refuse(job, recorded, f"{job.run_dir} is a run of another job file; {way}")


def _refuse(job: Job, recorded: str, why: str) -> int:
    print(f"error: {why}; nothing sent (- there, + this file):\n{difference(recorded, job.text())}", file=sys.stderr)
    return EXIT_INPUT


def _confirm(question: str, yes: bool) -> None:
    if yes:
        return
    try:
        answer = input(f"{question} [y/N] ")
    except EOFError:
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise InputError("not taken down; answer y, or give --yes")
