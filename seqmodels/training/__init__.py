"""Training: state, step, loss, optimizer, checkpoints, metrics, evaluation, loop. `train.py` puts them
together."""

from seqmodels.training.checkpoint import Checkpointer, restore_parameters
from seqmodels.training.evaluation import make_evaluator
from seqmodels.training.in_flight import NonFiniteError
from seqmodels.training.job import DeviceMesh, TrainingJob
from seqmodels.training.loop import training_loop
from seqmodels.training.metrics import Report, say
from seqmodels.training.optimizer import SGD, Adafactor, AdamW, Lion, Optimizer
from seqmodels.training.run_directory import RunDirectory
from seqmodels.training.state import TrainState, create_state, parameter_shapes, shardings_of, state_shapes
from seqmodels.training.step import make_train_step

__all__ = [
    "SGD",
    "Adafactor",
    "AdamW",
    "Checkpointer",
    "DeviceMesh",
    "Lion",
    "NonFiniteError",
    "Optimizer",
    "Report",
    "RunDirectory",
    "TrainState",
    "TrainingJob",
    "create_state",
    "make_evaluator",
    "make_train_step",
    "parameter_shapes",
    "restore_parameters",
    "say",
    "shardings_of",
    "state_shapes",
    "training_loop",
]
