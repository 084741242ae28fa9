"""A sweep's points as jobs of their own on pods: job files for `python -m gcp`, made from one."""

import hashlib
import json
import re
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh, AxisType

from gcp.job import LONGEST_NAME, Job, make_job, read_job
from gcp.plan import cost
from gcp.programs import ProgramError
from gcp.run_folder import RunFolder
from gcp.submit import up
from seqmodels import config
from seqmodels.errors import EXIT_DONE, InputError
from seqmodels.files import told, write_file
from seqmodels.parallel.mesh import mesh_sizes
from seqmodels.tools.sweep.check import Resolved
from seqmodels.tools.sweep.folder import SweepFolder
from seqmodels.tools.sweep.points import Point, Sweep
from seqmodels.tools.sweep.run import ROOT
from seqmodels.training import TrainingJob
from seqmodels.training.run_directory import POINT


class PodJob(NamedTuple):
    """A point, its job, and the text of the job's file."""

    point: Point
    job: Job
    text: str


def fits(template: Job) -> Callable[[TrainingJob], None]:
    """Raises `InputError` where a job cannot be split over the template's slices."""

    def fit(job: TrainingJob) -> None:
        axes = {name: getattr(job.mesh, name) for name in ("data", "fsdp", "seq", "tensor")}
        sizes = mesh_sizes(template.slices * template.slice.devices, **axes, slices=template.slices)
        types = (AxisType.Auto,) * len(sizes)
        job.check_fits(AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=types))

    return fit


def pod_jobs(template: Path, points: Sequence[Point], resolved: Mapping[str, Resolved]) -> list[PodJob]:
    """The points as jobs. Each has the template's name with the point's behind it, and as overrides of the template's
    config all in which the point differs from that.

    resolved: the points' configs, the overrides of the template among them.

    Raises `InputError` where two points would be one job, or the template's config binds what a point does not.
    """
    read_job(template)
    values = tomllib.loads(template.read_text())
    base = _text_of(ROOT / values["config"])
    jobs, runs, names = [], {}, {}
    for point in points:
        wanted = resolved[point.name].text
        gin = [line.replace(" = ", "=", 1) for line in _lines(wanted) if line not in _lines(base)]
        if _text_of(ROOT / values["config"], gin) != wanted:
            extra = next(name for name in map(_binding, _lines(base)) if name not in map(_binding, _lines(wanted)))
            raise InputError(
                f"{template}: its config {values['config']} binds {extra}, which {point.name} does not: expected one "
                "that binds no more than every point, as configs/base.gin"
            )
        ours = {**values, "name": _name(values["name"], point.name), "gin": gin}
        for seen, key, what in ((runs, wanted, "one run"), (names, ours["name"], f"one name, {ours['name']}")):
            if seen.setdefault(key, point) is not point:
                raise InputError(f"{template}: the jobs of {seen[key].name} and {point.name} would have {what}")
        jobs.append(PodJob(point, make_job(ours), _toml(ours)))
    return jobs


def write_jobs(jobs: Sequence[PodJob], sweep: Sweep, folder: SweepFolder) -> None:
    """DIR/jobs/NAME.toml of each, and lines for a person on what they take."""
    files = folder.path / "jobs"
    with told(f"cannot write {files}", files):
        files.mkdir(exist_ok=True)
    for x in jobs:
        write_file(files / f"{x.point.name}.toml", x.text)
        print(f"{x.job.name}: {x.job.chips} chips, {x.job.hosts} hosts, {x.job.run_dir}")
    chips = sum(x.job.chips for x in jobs)
    print(
        f"{len(jobs)} jobs, {chips:,} chips if all run at once; each {cost(jobs[0].job)}; the job files are in {files}"
    )
    if sweep.evaluate:
        print("sweep.evaluate is not of the jobs: seqmodels.tools.evaluate takes run directories in buckets, too")


def send_jobs(jobs: Sequence[PodJob], folder: SweepFolder) -> int:
    """`python -m gcp up` of each: what is there already is left as it is. Returns the worst exit code."""
    worst, refused = EXIT_DONE, []
    for x in jobs:
        try:
            code = up(x.job)
            if code == EXIT_DONE:
                _put_point(x, folder)
        except InputError as error:
            print(f"error: {x.job.name}: {error}", file=sys.stderr)
            code = error.exit_code
            if isinstance(error, ProgramError) and not error.passing:
                raise InputError(f"{x.job.name}: {error}; the jobs behind it were not sent") from error
        if code != EXIT_DONE:
            refused.append(x.job.name)
        worst = max(worst, code)
    if refused:
        print(f"not sent, or failed: {', '.join(refused)}", file=sys.stderr)
    return worst


def _put_point(x: PodJob, folder: SweepFolder) -> None:
    """point.json into the run directory in the bucket, for the report."""
    text = (folder.path / x.point.name / POINT).read_text()
    there = RunFolder(x.job)
    if there.read(POINT) != text:
        there.write(POINT, text)


def _text_of(file: Path, overrides: Sequence[str] = ()) -> str:
    """The config that a file and overrides come to."""
    try:
        config.parse([file], overrides)
        return config.config_text()
    finally:
        config.clear()


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def _binding(line: str) -> str:
    return line.partition(" = ")[0]


def _name(template: str, point: str) -> str:
    """A job's name, which has to be short."""
    plain = re.sub(r"[^a-z0-9]+", "-", point.lower()).strip("-")
    name = f"{template}-{plain}"
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 7].rstrip('-')}-{hashlib.sha256(point.encode()).hexdigest()[:6]}"


def _toml(values: dict[str, Any]) -> str:
    """A TOML file of a job's keys: tables last, as TOML wants it."""
    plain = [f"{key} = {_value(value)}\n" for key, value in values.items() if not isinstance(value, dict)]
    tables = [
        f"\n[{key}]\n" + "".join(f"{json.dumps(name)} = {_value(element)}\n" for name, element in value.items())
        for key, value in values.items()
        if isinstance(value, dict)
    ]
    return "".join(plain + tables)


def _value(value: Any) -> str:
    if isinstance(value, list):
        return "[\n" + "".join(f"    {_value(element)},\n" for element in value) + "]" if value else "[]"
    # JSON's strings, numbers and truth values are those of TOML, but for one character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
