"""python -m gcp preflight: compile the job's own training step for its slices, on this machine and without a TPU."""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gcp.job import Job, read_job
from seqmodels.errors import InputError
from seqmodels.tools.compile_check import command

DESCRIPTION = """\
Compile the training step of a job for its slices, on any Linux machine and without a TPU: whether it fits the memory of
a chip, what travels between chips, which kernels are used, and how long the compiler takes. Config and overrides are
those of the job file; no data is read and no bucket is asked. Needs the compiler: pip install -e '.[tpu]'."""

EPILOG = """\
example:
  python -m gcp preflight gcp/examples/v5e_256.toml --json preflight.json

exit codes:
  0   compiles and fits
  1   does not fit, or the compiler refuses it: its reason stands in the report; or a defect
  2   an input is wrong; one line says which"""

# What the images of gcp/Dockerfile install, NAME==VERSION a line, and what of it decides how a step is compiled.
CONSTRAINTS = Path(__file__).with_name("constraints.txt")
COMPILING = ("jax", "jaxlib", "libtpu", "flax", "optax")
# What else does, from the environment.
COMPILER_VARIABLES = ("LIBTPU_INIT_ARGS", "XLA_FLAGS", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_ENABLE_X64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("job", metavar="JOB.toml", type=Path, help="the job file")
    command.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    job = read_job(arguments.job)
    _take_environment(job)
    several = f"{job.slices} x " if job.slices > 1 else ""
    print(f"{job.name}: {job.config} on {several}{job.tpu}, {job.chips} chips", flush=True)
    try:
        found = command.reports_of(arguments, [job.config], job.overrides, [job.slice.check_name], job.slices)
    except InputError as error:
        # Overrides, which are arguments of a command line on the hosts, stand in the job file.
        raise InputError(str(error).replace("command line:", f"{arguments.job}: gin:")) from error
    (report,) = found.reports
    print(f"  preset       {report.preset or 'none'} (train.compiler_preset)")
    for name in sorted(set(COMPILER_VARIABLES) & set(job.env)):
        print(f"  environment  {name}={job.env[name]}")
    print(f"  compiled by  {found.versions}; source {_source(found.conditions['source'])}")
    if arguments.json is not None:
        of_job = {"name": job.name, "fingerprint": job.fingerprint, "tpu": job.tpu}
        command.write_json(arguments.json, found, {"job": of_job})
    for warning in _warnings(job, found.conditions["packages"]):
        print(f"warning: {warning}", file=sys.stderr)
    return found.exit_code


def _take_environment(job: Job) -> None:
    """The compiler's variables are the job's own, whatever this shell has."""
    if "jax" in sys.modules:
        return  # and has read them
    for name in COMPILER_VARIABLES:
        os.environ.pop(name, None)
        if name in job.env:
            os.environ[name] = job.env[name]


def _source(source: dict[str, Any] | None) -> str:
    if source is None:
        return "not in a git checkout"
    changed = len(source["changed"])
    return f"{(source['revision'] or 'without a commit')[:12]}, {changed or 'no'} file{'s' * (changed != 1)} changed"


def _warnings(job: Job, packages: Mapping[str, str]) -> Iterator[str]:
    """In what the step on the hosts may be another."""
    installed = CONSTRAINTS.read_text() if CONSTRAINTS.exists() else ""
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)", installed, re.MULTILINE))
    for name in COMPILING:
        if name in pinned and pinned[name] != packages.get(name):
            here = packages.get(name, "none")
            yield f"{name} is {pinned[name]} in images of gcp/Dockerfile (gcp/{CONSTRAINTS.name}), and {here} here"
    yield (
        "this holds for these versions and this source; what is in the image cannot be seen from here, and may "
        f"differ: {job.image}"
    )
    if job.program != "train.py":
        yield f"this is the step of train.py; {job.program} may train otherwise"
