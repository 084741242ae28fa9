"""One update: gradients, clipping, optimizer, and the numbers worth watching, in one compiled program."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from seqmodels.parallel.mesh import replicated
from seqmodels.training.loss import Loss, loss_sums
from seqmodels.training.optimizer import Hyperparameters, Optimizer
from seqmodels.training.state import TrainState

Batch = dict[str, jax.Array]


class StepResult(NamedTuple):
    """What a step reports; float32.

    metrics: scalars by name. `loss` is per unit of weight, without the z term: the cross entropy in nats, or what
        else is minimised.
    gradient_norms: `[P]`, the norm of each parameter's gradient before clipping, in the order of
        `parameter_paths`.
    """

    metrics: dict[str, jax.Array]
    gradient_norms: jax.Array


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """One update, `state, result = step(state, batch)`. It consumes (donates) the state that it is given.

    program: the jitted function of a state, a batch and the optimizer's numbers.
    hyperparameters: these numbers.
    """

    program: jax.stages.Wrapped
    hyperparameters: Hyperparameters

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepResult]:
        return self.program(state, batch, self.hyperparameters)

    def trace(self, state: TrainState, batch: Batch) -> jax.stages.Traced:
        """Of arrays or shapes, as `jax.jit(...).trace`."""
        return self.program.trace(state, batch, self.hyperparameters)

    def lower(self, state: TrainState, batch: Batch) -> jax.stages.Lowered:
        return self.trace(state, batch).lower()


def make_train_step(
    model: nn.Module,
    optimizer: Optimizer,
    steps: int,
    *,
    mesh: Mesh,
    state_shardings: TrainState | None = None,
    z_loss: float = 0.0,
    accumulate: int = 1,
    loss: Loss = loss_sums,
    compiler_options: Mapping[str, Any] | None = None,
) -> TrainStep:
    """The training step, of a state made for `optimizer.build(parameters, steps)`.

    Args:
        steps: updates in the whole run, for the schedule of the learning rate.
        state_shardings: where the arrays of the state lie, before and after; None for whole on every device.
        z_loss: coefficient of the squared log-normaliser in what is minimised.
        accumulate: the batch is worked off in this many parts, one after the other, for the memory of one
            part. The result is that of the whole batch, whatever weight each part has. The batch size must be
            a multiple of `accumulate` times the number of batch shards.
        loss: what is minimised, of the model's outputs, targets and weights.
        compiler_options: of XLA, for the devices of the mesh.
    """

    def objective(params, batch, key, total_weight):
        logits, _ = model.apply(
            {"params": params}, batch["tokens"], segment_ids=batch.get("segment_ids"), rngs={"dropout": key}
        )
        sums = loss(logits, batch["targets"], batch["weights"])
        return (sums.nll + z_loss * sums.z) / total_weight, sums

    gradient = jax.grad(objective, has_aux=True)

    def accumulated_gradient(params, batch, key, total_weight):
        def add_part(total, numbered_part):
            number, part = numbered_part
            more = gradient(params, part, jax.random.fold_in(key, number), total_weight)
            return jax.tree.map(jnp.add, total, more), None

        # Row i goes to part i % accumulate: so every device's rows are split evenly and stay where they are.
        parts = {
            name: rows.reshape(-1, accumulate, *rows.shape[1:]).swapaxes(0, 1) for name, rows in batch.items()
        }
        # Sums are scalars, and which there are does not depend on the size of what is summed.
        one = [jnp.zeros((1, 1, 1)), jnp.zeros((1, 1), batch["targets"].dtype), jnp.zeros((1, 1))]
        start = jax.tree.map(jnp.zeros_like, (params, jax.eval_shape(loss, *one)))
        return jax.lax.scan(add_part, start, (jnp.arange(accumulate), parts))[0]

    def train_step(
        state: TrainState, batch: Batch, hyperparameters: Hyperparameters
    ) -> tuple[TrainState, StepResult]:
        tuned = optimizer.with_hyperparameters(hyperparameters)
        transform, learning_rates = tuned.build(state.params, steps), tuned.learning_rates(steps)
        key = jax.random.fold_in(state.key, state.step)
        total_weight = jnp.sum(batch["weights"])
        total_weight = jnp.where(total_weight > 0, total_weight, 1.0)
        compute = gradient if accumulate == 1 else accumulated_gradient
        gradients, sums = compute(state.params, batch, key, total_weight)

        updates, opt_state = transform.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)

        gradient_norms = jnp.stack(
            [jnp.sqrt(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(gradients)]
        )
        metrics = {
            **sums.means(total_weight),
            "gradient_norm": jnp.linalg.norm(gradient_norms),
            "update_norm": optax.tree.norm(updates),
            "learning_rate": jnp.asarray(learning_rates(state.step), jnp.float32),
        }
        if z_loss:
            metrics["z_loss"] = z_loss * sums.z / total_weight
        new_state = TrainState(state.step + 1, params, opt_state, state.key)
        return new_state, StepResult(metrics, gradient_norms)

    everywhere = replicated(mesh)
    of_state = everywhere if state_shardings is None else state_shardings
    program = jax.jit(
        train_step,
        donate_argnums=0,
        out_shardings=(of_state, everywhere),
        compiler_options=dict(compiler_options or {}),
    )
    return TrainStep(program, optimizer.hyperparameters)
