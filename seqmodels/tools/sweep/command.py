"""python -m seqmodels.tools.sweep: from the file to points that have been run."""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence

import jax
from tqdm import tqdm

from seqmodels.errors import EXIT_DEFECT, EXIT_DONE, InputError, nearest
from seqmodels.start_up import has_nvidia_driver, has_tpu_chips
from seqmodels.tools.sweep.check import Resolved, check, check_evaluations, fits_here, reads_here
from seqmodels.tools.sweep.folder import PointFolder, SweepFolder
from seqmodels.tools.sweep.points import Point, Sweep, read_sweep
from seqmodels.tools.sweep.progress import Progress
from seqmodels.tools.sweep.run import ROOT, failures, programs_left, run_points
from seqmodels.training import TrainingJob


def run(options: argparse.Namespace, overrides: Sequence[str]) -> int:
    """What the command line asks for; returns the exit code."""
    # Points are looked at in shapes. An accelerator belongs to the programs that run them.
    jax.config.update("jax_platforms", "cpu")
    if not (ROOT / "train.py").is_file():
        raise InputError(
            f"{ROOT / 'train.py'} is not there; expected the package to stand in a checkout of its repository"
        )
    if options.jobs < 1:
        raise InputError(f"--jobs is {options.jobs}: expected at least 1")
    environment = environment_of(options.jobs)
    if options.sweep_dir is None and not options.dry_run:
        raise InputError("--sweep_dir is missing: expected the folder that the points go to")
    if options.up and options.pod is None:
        raise InputError("--up is given without --pod: expected the job file that those of the points are made from")
    template = None
    if options.pod is not None:
        sys.path.append(str(ROOT))  # gcp is beside train.py, and is not installed
        from gcp.job import read_job
        from seqmodels.tools.sweep import pods

        template = read_job(options.pod)
        overrides = [*overrides, *template.gin]
    sweep = read_sweep(options.file, overrides)
    chosen = choose(sweep, options.only)
    folder = None if options.sweep_dir is None else SweepFolder(options.sweep_dir)
    if options.dry_run:
        list_points(chosen, folder, sweep.evaluate)
    check_evaluations(sweep)
    if template is not None:
        fits = pods.fits(template)
    else:
        fits = reads_here if has_accelerators() else fits_here
    resolved = _check(sweep, folder, fits, keep=template is None)
    jobs = pods.pod_jobs(options.pod, chosen, resolved) if template is not None else []
    if options.dry_run:
        print(f"{len(chosen)} of {len(sweep.points)} points; nothing is wrong with them; nothing was run")
        return EXIT_DONE
    with folder.open():
        gone = folder.write(sweep, resolved)
        if gone:
            print(f"no longer in {sweep.file}, left as they are: {', '.join(gone)}")
        if jobs:
            pods.write_jobs(jobs, sweep, folder)
            return pods.send_jobs(jobs, folder) if options.up else EXIT_DONE
        return _run(sweep, [(folder.point(x.name), resolved[x.name].steps) for x in chosen], options, environment)


def _check(
    sweep: Sweep, folder: SweepFolder | None, fits: Callable[[TrainingJob], None], *, keep: bool
) -> dict[str, Resolved]:
    """keep: do not look again at points that the folder says have been looked at, here."""
    shape = "checking {n_fmt}/{total_fmt} points [{elapsed}<{remaining}]"
    with tqdm(total=len(sweep.points), bar_format=shape, leave=False, disable=not sys.stderr.isatty()) as bar:
        resolved = check(sweep, folder.checked(sweep) if folder and keep else {}, lambda name: bar.update(), fits)
    if folder is not None:
        folder.check(sweep, resolved)
    return resolved


def _run(
    sweep: Sweep, points: list[tuple[PointFolder, int]], options: argparse.Namespace, environment: Mapping[str, str]
) -> int:
    to_run, refused = [], []
    for folder, _ in points:
        failed, left = folder.failed, programs_left(folder, sweep.evaluate)
        if failed is not None and left and not options.retry:
            refused.append(folder)
            continue
        if failed is not None:
            if left:
                print(f"retrying {folder.name}, which failed: {failed['reason']}")
            folder.forget_failure()
        if left:
            to_run.append(folder)
    skipped = len(points) - len(to_run) - len(refused)
    print(
        f"{len(points)} points: {skipped} done, {len(refused)} failed before, {len(to_run)} to run"
        f"{f', {options.jobs} at a time' if options.jobs > 1 else ''}",
        flush=True,
    )
    with Progress(points, sweep.metric, len(to_run)) as progress:
        outcome = run_points(to_run, sweep.evaluate, options.jobs, progress, environment=environment)
    for line in failures([folder for folder, _ in points]):
        print(line)
    if refused:
        print(f"failed before, and not tried again: {_names(refused)}; --retry does")
    if outcome.stopped:
        print(f"not finished: {len(outcome.stopped)} points; the same command goes on with them")
    if refused and outcome.exit_code == EXIT_DONE:
        return EXIT_DEFECT
    return outcome.exit_code


def choose(sweep: Sweep, filters: Sequence[str]) -> list[Point]:
    """The points that fulfil all filters, each AXIS=LABEL or a part of a name. Raises `InputError`."""
    chosen = sweep.points
    for text in filters:
        axis, equals, label = text.partition("=")
        if equals and axis in sweep.order:
            labels = [*map(str, sweep.order[axis])]
            if label not in labels:
                raise InputError(f"--only {text}: axis {axis!r} has no {label!r}; {nearest(label, labels)}")
            chosen = [point for point in chosen if str(point.axes[axis]) == label]
        elif equals and "=" not in "".join(point.name for point in sweep.points):
            raise InputError(f"--only {text}: the sweep has no axis {axis!r}; {nearest(axis, sweep.order)}")
        else:
            chosen = [point for point in chosen if text in point.name]
    if not chosen:
        names = [point.name for point in sweep.points]
        raise InputError(f"--only {' '.join(filters)}: no point is left; {nearest(filters[-1], names)}")
    return chosen


def _state(folder: PointFolder, evaluations: Sequence[str]) -> str:
    if not programs_left(folder, evaluations):
        return "done"
    return "failed" if folder.failed else "begun" if folder.started else ""


def list_points(points: Sequence[Point], folder: SweepFolder | None, evaluations: Sequence[str]) -> None:
    """A line each: name, what has become of it, bindings."""
    for point in points:
        state = "" if folder is None else _state(folder.point(point.name), evaluations)
        print(f"{point.name}{f' ({state})' if state else ''}: {'; '.join(point.bindings)}")


def environment_of(jobs: int) -> dict[str, str]:
    """What points that run at a time need beside this program's environment. Raises `InputError`."""
    if jobs == 1 or not has_accelerators():
        return {}
    if has_tpu_chips():
        raise InputError(f"--jobs is {jobs}: expected 1, the TPUs of a machine belong to one program at a time")
    # Otherwise each takes most of the GPU's memory at its start.
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / jobs:.2f}"}


def has_accelerators() -> bool:
    """Whether the programs of this machine run on other than its CPU."""
    return os.environ.get("JAX_PLATFORMS") != "cpu" and (has_tpu_chips() or has_nvidia_driver())


def _names(folders: Sequence[PointFolder]) -> str:
    return ", ".join(folder.name for folder in folders)
