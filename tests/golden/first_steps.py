"""What the first two updates of a shipped experiment compute, and where it is written down."""

import json
from pathlib import Path

import jax

from seqmodels import config
from seqmodels.constructors import register_constructors
from seqmodels.data import TextData
from seqmodels.parallel.mesh import make_mesh, place_batch
from seqmodels.training import TrainingJob, create_state, make_train_step, parameter_shapes
from tests import experiments
from tests.program.programs import write_texts

CONFIGS = [experiments.CONFIGS / "quickstart.gin", *experiments.RUNS]
GOLDEN = Path(__file__).parent
METRICS = ("loss", "gradient_norm", "update_norm")
STEPS = 2

Measured = dict[str, list[float]]


def golden_file(experiment: Path) -> Path:
    """The file with the numbers of an experiment's config."""
    return GOLDEN / f"{experiment.stem}.json"


def read_golden(experiment: Path) -> Measured | None:
    """The numbers written down for an experiment; None when there are none yet."""
    file = golden_file(experiment)
    return json.loads(file.read_text()) if file.exists() else None


def measure(experiment: Path, folder: Path) -> Measured:
    """Each metric of each of the first updates. Text comes from files made in `folder`, whatever the config says:
    the standard library is another text in every version of Python."""
    register_constructors()
    try:
        config.parse([experiment])
        return _measure_job(TrainingJob(), folder)
    finally:
        # Not before: the layers read their bindings when the model is first called.
        config.clear()


def _measure_job(job: TrainingJob, folder: Path) -> Measured:
    data = TextData(str(write_texts(folder / "texts"))) if isinstance(job.data, TextData) else job.data
    batches = data.train_batches(job.batch_size, job.seq_len, job.seed, transforms=job.transforms)
    mesh = make_mesh(devices=jax.devices()[:1])
    transform = job.optimizer.build(parameter_shapes(job.model, job.seq_len), job.steps)
    step = make_train_step(
        job.model, job.optimizer, job.steps, mesh=mesh, z_loss=job.z_loss, accumulate=job.accumulate
    )
    measured: Measured = {name: [] for name in METRICS}
    with jax.set_mesh(mesh):
        state = create_state(job.model, transform, seq_len=job.seq_len, seed=job.seed, mesh=mesh)
        for _ in range(STEPS):
            state, result = step(state, place_batch(next(batches), mesh))
            for name in METRICS:
                measured[name].append(float(result.metrics[name]))
    return measured
