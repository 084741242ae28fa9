"""What is wrong with a sweep's points, found before any of them runs: each is built in shapes, on the CPU.

Many points differ in what no model and no data depends on, as the learning rate or the seed. Of those only the first is
traced; of the others everything else is looked at.
"""

import contextlib
import hashlib
import io
import re
import shlex
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels import config
from seqmodels.constructors import register_constructors
from seqmodels.errors import InputError, nearest
from seqmodels.tools.sweep.points import Point, Sweep
from seqmodels.training import SGD, Adafactor, AdamW, Lion, TrainingJob, parameter_shapes

_OPTIMIZERS = "|".join(x.__name__ for x in (AdamW, Lion, Adafactor, SGD))
# Values of these change neither shapes nor what is constructed, nor whether the data can be read.
_WITHOUT_SHAPE = re.compile(
    rf"^((?:[\w/]*/)?(?:{_OPTIMIZERS})\.\w+|train\.(?:steps|\w+_every|eval_batches|keep|z_loss)) = .*$"
    r"|^(train\.seed) = \d{1,9}$",
    re.MULTILINE,
)


class Resolved(NamedTuple):
    """A point as it runs: its whole config, with nothing left to include, and its number of updates."""

    text: str
    steps: int

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def check(
    sweep: Sweep,
    known: Mapping[str, tuple[str, int]],
    progress: Callable[[str], None],
    fits: Callable[[TrainingJob], None],
) -> dict[str, Resolved]:
    """The points as they run, by name.

    Args:
        known: fingerprint and steps of points that have been checked before, by name; those with the same config are
            not built again.
        progress: told the name of each point that has been looked at.
        fits: raises `InputError` where a job does not fit the machine that it is for.

    Raises `InputError`: a line for each cause, which names its points.
    """
    register_constructors()
    traced: dict[str, Any] = {}
    resolved, wrong = {}, {}
    for point in sweep.points:
        try:
            config.parse([sweep.file], sweep.overrides, texts=point.texts, apart="sweep")
            text = config.config_text()
            fingerprint, steps = known.get(point.name, ("", 0))
            found = Resolved(text, steps)
            if found.fingerprint != fingerprint:
                found = Resolved(text, _build(sweep, text, traced, fits).steps)
            resolved[point.name] = found
        except InputError as error:
            wrong.setdefault(str(error), []).append(point)
        except Exception as error:  # of whatever library the model or the data uses
            wrong.setdefault(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", []).append(point)
        finally:
            config.clear()
        progress(point.name)
    if wrong:
        raise InputError("\n".join(_told(error, points, len(sweep.points)) for error, points in wrong.items()))
    return resolved


def _build(sweep: Sweep, text: str, traced: dict[str, Any], fits: Callable[[TrainingJob], None]) -> TrainingJob:
    """The job of the config that has been read, after everything of it has been made that needs no memory."""
    job = TrainingJob()
    kind = _WITHOUT_SHAPE.sub(r"\1\2", text)
    shapes = traced.get(kind)
    if shapes is None:
        fits(job)
        shapes = parameter_shapes(job.model, job.seq_len)
    job.optimizer.build(shapes, job.steps)
    if kind not in traced:
        config.check_all_used()
        traced[kind] = shapes
    _check_metric(sweep, job)
    return job


def _check_metric(sweep: Sweep, job: TrainingJob) -> None:
    """What an evaluation reports of this data, as far as that is known without one."""
    data = job.data
    names = {"loss", *(["accuracy"] if data.input_size is None else [])}
    if data.tokenizer is not None:
        names.add("bits_per_byte")
    asked = {sweep.metric, *([job.goal[0]] if job.goal else [])}
    if asked <= names or any(metric.reads_sown for metric in data.metrics):
        return
    shapes, vocab_size = data.batch_shapes(job.batch_size, job.seq_len), job.model.vocab_size
    batch = {name: jax.ShapeDtypeStruct(shape, data.dtypes[name]) for name, shape in shapes.items()}
    logits = jax.ShapeDtypeStruct((job.batch_size, job.seq_len, vocab_size), np.float32)
    for metric in data.metrics:
        sums = jax.eval_shape(lambda metric=metric: metric.sums(*_zeros((logits, batch)), {}))
        names |= metric.values(jax.tree.map(lambda x: np.ones(x.shape, x.dtype), sums)).keys()
    if sweep.metric not in names:
        raise InputError(f"{sweep.metric_place}: sweep.metric is {sweep.metric!r}; {nearest(sweep.metric, names)}")
    if job.goal and job.goal[0] not in names:
        raise InputError(f"train.goal is {job.goal}, but no evaluation has that: {nearest(job.goal[0], names)}")


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def check_evaluations(sweep: Sweep) -> None:
    """Raise `InputError` where tools.evaluate would refuse the arguments of an evaluation."""
    if not sweep.evaluate:
        return
    from seqmodels.tools.evaluate.command import read_arguments

    for text in sweep.evaluate:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                _, options = read_arguments(["RUN", "--suite", *shlex.split(text)])
            if options.step is None:
                continue
            reason = f"--step is {options.step}: expected none, a point is evaluated at its last step"
        except InputError as error:
            reason = str(error)
        except SystemExit:  # of argparse, which has printed why
            reason = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise InputError(f"{sweep.evaluate_place}: sweep.evaluate has {text!r}: {reason}")


def _told(error: str, points: list[Point], count: int) -> str:
    others = len(points) - 1
    if others == count - 1:
        rest = {0: "", 1: " and the other point"}.get(others, f" and the {others} other points")
    else:
        rest = f" and {others} more of {count} points" if others else ""
    return f"{points[0].name}{rest}: {error}"


def fits_here(job: TrainingJob) -> None:
    """Raise `InputError` where this machine cannot read the job's data, or split its batches over the CPU's devices."""
    job.check_fits(job.mesh.build())
    reads_here(job)


def reads_here(job: TrainingJob) -> None:
    """Raise `InputError` where this machine cannot read the job's data."""
    next(job.data.train_batches(job.batch_size, job.seq_len, job.seed, transforms=job.transforms))
