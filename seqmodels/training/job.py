"""What one training run is: the values that a config file sets under the name `train`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh

from seqmodels.data import Dataset
from seqmodels.data.transforms import Transform
from seqmodels.errors import InputError, nearest
from seqmodels.models import input_shape
from seqmodels.notation import TIME_AXIS
from seqmodels.parallel.mesh import batch_shards, make_mesh
from seqmodels.parallel.partition import PartitionRules
from seqmodels.training.compiler_presets import PRESETS, compiler_options
from seqmodels.training.loss import Loss, loss_sums, squared_error_sums
from seqmodels.training.optimizer import AdamW, Optimizer
from seqmodels.training.state import TrainState, shardings_of
from seqmodels.training.step import TrainStep, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceMesh:
    """How the devices of a job divide its work; see `seqmodels.parallel.mesh`. The numbers are the same on any mesh,
    but for rounding.

    Args:
        data, fsdp, seq, tensor: devices along each axis; one of them may be -1 for those that the others leave.
        slices: groups of devices with a slow network between them, which split `data`.
        rules: a table of (regular expression over a parameter's path, axes of its last dimensions), tried before
            `seqmodels.parallel.partition.DEFAULT_RULES`.
    """

    data: int = -1
    fsdp: int = 1
    seq: int = 1
    tensor: int = 1
    slices: int = 1
    rules: PartitionRules = ()

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """The mesh over these devices, None for all; raises `InputError` where the sizes do not fit."""
        sizes = {name: getattr(self, name) for name in ("data", "fsdp", "seq", "tensor", "slices")}
        try:
            return make_mesh(**sizes, devices=devices)
        except InputError as error:
            raise InputError(f"DeviceMesh: {error}") from None


_POSITIVE = ("batch_size", "seq_len", "steps", "accumulate", "log_every", "keep")
_POSITIVE_OR_NONE = ("eval_every", "eval_batches", "checkpoint_every")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """Everything that decides what a run computes, and when it tells.

    Args:
        model: a linen module; `model.apply(variables, tokens, segment_ids=...)` gives logits `[B, T, V]` and
            a state.
        transforms: what makes training batches of the data's rows; None for the data's own. Evaluation keeps
            to those.
        mesh: how the devices divide the work; all of them split the batch by default.
        batch_size: sequences per update, over all devices and processes.
        seq_len: tokens per sequence.
        steps: updates in the whole run; the schedule ends there.
        start_from: a run directory; its parameters, from the newest checkpoint, are what this run starts with.
            None starts with random ones.
        seed: of the parameters, the order of the data, and what a layer draws in training (dropout).
        accumulate: work a batch off in this many parts, to save memory; the result is the same.
        compiler_preset: options of XLA by name, see `seqmodels.training.compiler_presets`; None for none.
        z_loss: coefficient of the squared log-normaliser; 1e-4 is usual.
        log_every: updates from one row of `metrics.jsonl` to the next.
        eval_every: updates from one evaluation to the next; None evaluates at the end only.
        eval_batches: how many held-out batches an evaluation looks at; None for all.
        goal: a name of what an evaluation reports and a value, such as ('accuracy', 0.99): the run ends early once an
            evaluation has at least that, or of a loss, a perplexity or bits per byte at most.
        checkpoint_every: updates from one checkpoint to the next; None saves at the end, or when stopped.
        keep: how many checkpoints stay.
        profile_steps: the first and the last update to trace into the run directory's `profile` folder.
        sample_prompt: the text that the sample at the end goes on from.
        sample_tokens: the sample's length; 0 for none. Data without a tokeniser has no sample.
    """

    model: nn.Module
    data: Dataset
    transforms: Sequence[Transform] | None = None
    optimizer: Optimizer = dataclasses.field(default_factory=AdamW)
    mesh: DeviceMesh = dataclasses.field(default_factory=DeviceMesh)
    batch_size: int = 8
    seq_len: int = 256
    steps: int = 1000
    start_from: str | None = None
    seed: int = 0
    accumulate: int = 1
    compiler_preset: str | None = None
    z_loss: float = 0.0
    log_every: int = 10
    eval_every: int | None = None
    eval_batches: int | None = 16
    goal: tuple[str, float] | None = None
    checkpoint_every: int | None = 1000
    keep: int = 3
    profile_steps: tuple[int, int] | None = None
    sample_prompt: str = "\n"
    sample_tokens: int = 0

    def __post_init__(self) -> None:
        for name in _POSITIVE + _POSITIVE_OR_NONE:
            value = getattr(self, name)
            if value is None and name in _POSITIVE_OR_NONE:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InputError(f"train.{name} is {value!r}: expected a whole number of at least 1")
        if self.sample_tokens < 0:
            raise InputError(f"train.sample_tokens is {self.sample_tokens}: expected 0 or more")
        preset = self.compiler_preset
        if preset is not None and preset not in PRESETS:
            raise InputError(f"train.compiler_preset is {preset!r}; {nearest(preset, PRESETS)}")
        if self.profile_steps is not None:
            first, last = self.profile_steps
            if not 1 <= first <= last <= self.steps:
                raise InputError(
                    f"train.profile_steps is {self.profile_steps}: expected (first, last) with "
                    f"1 <= first <= last <= {self.steps}, the number of steps"
                )
        if self.goal is not None and self.eval_every is None:
            raise InputError(
                f"train.goal is {self.goal} without train.eval_every: expected a number of updates, or no goal"
            )
        sizes = getattr(self.model, "input_size", None), self.data.input_size
        if sizes[0] != sizes[1]:
            model, data = ("ids" if size is None else f"{size} numbers at each position" for size in sizes)
            raise InputError(
                f"the model {type(self.model).__name__} reads {model}, but the data {type(self.data).__name__} are "
                f"{data}: expected the same"
            )
        if self.z_loss and self.data.input_size is not None:
            raise InputError(f"train.z_loss is {self.z_loss} with data of numbers: expected 0, they have no logits")
        if self.model.vocab_size < self.data.vocab_size:
            raise InputError(
                f"the model's vocab_size is {self.model.vocab_size}, but the data has tokens up to "
                f"{self.data.vocab_size - 1}: expected at least {self.data.vocab_size}"
            )

    @property
    def loss(self) -> Loss:
        """What is minimised: the cross entropy of ids, the squared error of numbers."""
        return loss_sums if self.data.input_size is None else squared_error_sums

    def compiler_options(self, mesh: Mesh) -> dict[str, Any]:
        """Options of XLA for the training step on this mesh."""
        return compiler_options(self.compiler_preset, mesh)

    def train_step(self, mesh: Mesh, state: TrainState) -> TrainStep:
        """The training step on this mesh, for states that lie like `state` (shapes will do)."""
        return make_train_step(
            self.model,
            self.optimizer,
            self.steps,
            mesh=mesh,
            state_shardings=shardings_of(state),
            loss=self.loss,
            z_loss=self.z_loss,
            accumulate=self.accumulate,
            compiler_options=self.compiler_options(mesh),
        )

    def check_fits(self, mesh: Mesh) -> None:
        """Raise `InputError` if the batch, its length or the heads of the model cannot be split evenly over the mesh
        and the accumulation. Nothing is compiled."""
        shards, n_time = batch_shards(mesh), mesh.shape[TIME_AXIS]
        if self.batch_size % (shards * self.accumulate):
            raise InputError(
                f"train.batch_size is {self.batch_size}: expected a multiple of {shards * self.accumulate} "
                f"({shards} device{'s' if shards > 1 else ''} that split the batch, times train.accumulate = "
                f"{self.accumulate})"
            )
        if self.seq_len % n_time:
            raise InputError(
                f"train.seq_len is {self.seq_len}: expected a multiple of {n_time}, the devices that split time "
                "(DeviceMesh.seq)"
            )
        if mesh.size > 1:
            tokens = input_shape(self.model, self.batch_size, self.seq_len)
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                jax.eval_shape(self.model.init, jax.random.key(0), tokens)
