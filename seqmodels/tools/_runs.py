"""Opening a run directory to use what was trained in it."""

import os
from typing import Any, NamedTuple

import jax

from seqmodels import config
from seqmodels.constructors import register_constructors
from seqmodels.errors import InputError
from seqmodels.files import on_disk
from seqmodels.training import TrainingJob, parameter_shapes
from seqmodels.training.checkpoint import restore_parameters
from seqmodels.training.run_directory import RunDirectory


class TrainedRun(NamedTuple):
    """A run's job, and the parameters of one of its checkpoints."""

    job: TrainingJob
    params: Any
    step: int


def open_run(path: str | os.PathLike, step: int | None = None) -> TrainedRun:
    """The run in a directory, here or in a bucket, with the parameters of checkpoint `step` (None: the newest)."""
    run = RunDirectory(path, writer=False)
    with on_disk(run.path / "config.gin") as file:
        if not file.is_file():
            raise InputError(
                f"{path} is not a run directory: it has no config.gin; expected what train.py --run_dir made"
            )
        register_constructors()
        config.parse([str(file)])
    job = TrainingJob()
    restored = restore_parameters(run.checkpoints, parameter_shapes(job.model, job.seq_len), step=step)
    return TrainedRun(job, jax.tree.map(jax.numpy.asarray, restored.state), restored.step)
