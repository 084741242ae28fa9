"""`check`: all that can be known of a job without a network, in a list of what is right, wrong, or to be looked at."""

import os
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import NamedTuple

from gcp.invariants import violations
from gcp.job import Job
from gcp.manifest import jobset
from gcp.plan import backend_of
from gcp.programs import missing
from seqmodels.errors import EXIT_DONE, EXIT_INPUT, InputError

RIGHT, WRONG, LOOK = "ok", "WRONG", "look"


class Finding(NamedTuple):
    mark: str
    text: str


def check(job: Job) -> int:
    """Print the findings; returns 0, or 2 where something is wrong."""
    findings = list(findings_of(job))
    for finding in findings:
        print(f"{finding.mark:<6} {finding.text}", flush=True)
    return EXIT_INPUT if any(finding.mark == WRONG for finding in findings) else EXIT_DONE


def findings_of(job: Job) -> Iterator[Finding]:
    yield Finding(RIGHT, f"the job file; its job is {job.name}, fingerprint {job.fingerprint}")
    yield from _programs(job)
    yield from _slice(job)
    if job.backend == "gke":
        wrong = violations(jobset(job))
        yield from (Finding(WRONG, f"manifest: {x}") for x in wrong)
        if not wrong:
            yield Finding(RIGHT, "the manifest")
    yield from _config(job)
    bucket = job.out.removeprefix("gs://").partition("/")[0]
    region = re.sub(r"-[a-z]$", "", job.location)
    command = f"gcloud storage buckets describe gs://{bucket} --format='value(location)'"
    yield Finding(LOOK, f"the bucket should be in {region}: {command}")
    for folder in job.data.values():
        yield Finding(LOOK, f"the data should be there: gcloud storage ls {folder}")


def _programs(job: Job) -> Iterator[Finding]:
    programs = backend_of(job).programs
    absent = missing(programs)
    yield from (Finding(WRONG, x) for x in absent)
    if not absent:
        yield Finding(RIGHT, f"{', '.join(programs)} on PATH")


def _slice(job: Job) -> Iterator[Finding]:
    kind = job.slice
    name = f"{job.tpu} of GKE and the compiler" if job.backend == "gke" else f"{kind.api_type} of the Cloud TPU API"
    yield Finding(
        RIGHT,
        f"{job.slices} x {name}: {kind.chips} chips in {kind.topology}, {kind.hosts} hosts ({kind.machine_type}), "
        f"{kind.memory_gib:g} GiB for each of {kind.devices} devices",
    )


def _config(job: Job) -> Iterator[Finding]:
    """The config with the job's overrides, on a mesh of as many devices. Takes some seconds, and reads no data."""
    try:
        text, described = _read_config(job)
    except InputError as error:
        yield Finding(WRONG, str(error))
        return
    yield Finding(RIGHT, f"{job.config} with {len(job.overrides)} overrides: {described}")
    for path in sorted(set(re.findall(r"'(/[^'\n]*)'", text))):
        mounted = any(PurePosixPath(path).is_relative_to(mount) for mount in job.data)
        where = "is under a path of [data]" if mounted else "is under no path of [data]: the hosts will not have it"
        yield Finding(RIGHT if mounted else WRONG, f"{path}, of the config, {where}")
    if job.program != "train.py":
        yield Finding(LOOK, f"{job.program} may read the config in another way than train.py, for which it is checked")


def _read_config(job: Job) -> tuple[str, str]:
    """(the bindings, a description of the mesh); raises `InputError`."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from jax.sharding import AbstractMesh, AxisType

    from seqmodels import config
    from seqmodels.constructors import register_constructors
    from seqmodels.parallel.mesh import describe_mesh, mesh_sizes
    from seqmodels.start_up import prepare_jax
    from seqmodels.training import TrainingJob, parameter_shapes

    prepare_jax()
    register_constructors()
    config.parse([job.config], job.overrides)
    trained = TrainingJob()
    axes = {name: getattr(trained.mesh, name) for name in ("data", "fsdp", "seq", "tensor", "slices")}
    sizes = mesh_sizes(job.slices * job.slice.devices, **axes)
    types = (AxisType.Auto,) * len(sizes)
    trained.check_fits(AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types))
    parameter_shapes(trained.model, trained.seq_len)
    config.check_all_used()
    return config.config_text(), f"batches of {trained.batch_size} x {trained.seq_len} on {describe_mesh(sizes)}"
