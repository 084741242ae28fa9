"""What would be sent, for a person to read: nothing here runs a program, and the same job gives the same text."""

import textwrap
from collections.abc import Iterator

from gcp.gke import Gke
from gcp.job import ATTEMPT, Job
from gcp.queued import Queued
from gcp.states import Backend

BACKENDS = {"gke": Gke, "queued_resources": Queued}
_KEPT = {"gke": "Kubernetes secret {0}, key {1}", "queued_resources": "Secret Manager's {0}"}
_WHERE = {
    "gke": "the cluster {cluster} in {location}, namespace {namespace}",
    "queued_resources": "a queued resource in {location}",
}


def backend_of(job: Job, shown: bool = True) -> Backend:
    return BACKENDS[job.backend](job, shown)


def place_of(job: Job) -> str:
    """Where it goes, in words: the same for jobs that meet there by their names."""
    return f"{_WHERE[job.backend].format_map(vars(job))}, project {job.project}"


def plan(job: Job) -> str:
    """Summary, environment, what is sent, and how."""
    backend = backend_of(job)
    parts = [("job", summary(job)), ("environment", environment(job)), *backend.documents()]
    parts.append(("`up` runs", "\n".join(backend.send_commands())))
    return "\n".join(f"{title}:\n{textwrap.indent(text.rstrip(), '  ')}\n" for title, text in parts)


def summary(job: Job) -> str:
    """What it takes and where it goes, a line each."""
    return "\n".join(f"{name:<13}{text}" for name, text in _facts(job))


def cost(job: Job) -> str:
    """In chip hours; in dollars only where the job file has a price."""
    hours = [(1, "an hour"), *([(job.hours, f"in {job.hours:g} hours")] if job.hours else [])]
    text = ", ".join(f"{job.chips * n:,g} chip hours {when}{_dollars(job, n)}" for n, when in hours)
    return text if job.usd_per_chip_hour else f"{text} (no usd_per_chip_hour in the job file: no sum of money)"


def environment(job: Job) -> str:
    """Variables of the program: value and origin. Of secrets only where they are kept."""
    plain = {name: "job file" if name in job.env else "default" for name in job.environment}
    lines = {name: f"{name} = {job.environment[name]}  ({origin})" for name, origin in plain.items()}
    for name, place in job.secrets.items():
        lines[name] = f"{name} = ***  (masked; from {_KEPT[job.backend].format(*place.split(':'))})"
    own = f"{ATTEMPT}: how often the job has started before"
    places = "TPU_*, MEGASCALE_*: a host's place in its slices, set on each host by Google's side"
    return "\n".join([*(lines[name] for name in sorted(lines)), own, places])


def _facts(job: Job) -> Iterator[tuple[str, str]]:
    kind = job.slice
    yield "name", job.name
    yield "trains", " ".join([job.config, *job.overrides])
    yield "on", f"{job.slices} x {job.tpu} ({job.capacity}), in {_WHERE[job.backend].format_map(vars(job))}"
    yield "slice", f"{kind.chips} chips in {kind.topology}, {kind.hosts} x {kind.machine_type}"
    yield "in all", f"{job.chips} chips, {job.hosts} hosts"
    yield "costs", cost(job)
    yield "restarts", f"at most {job.max_restarts}{_uncounted(job)}"
    yield "image", job.image
    for path, folder in sorted(job.data.items()):
        yield "data", f"{path} is {folder}"
    yield "run", job.run_dir
    yield "curves", f"tensorboard --logdir {job.run_dir}/tensorboard"
    yield "fingerprint", job.fingerprint


def _uncounted(job: Job) -> str:
    if job.backend == "gke":
        return "; a preemption that GKE announces need not count"
    return "; after a preemption `watch` makes it again, as long as that runs"


def _dollars(job: Job, hours: float) -> str:
    return f" (${job.chips * hours * job.usd_per_chip_hour:,.2f})" if job.usd_per_chip_hour else ""
