"""Loss on held-out data."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from seqmodels.data.metrics import Metric
from seqmodels.errors import InputError
from seqmodels.notation import SOWN
from seqmodels.parallel.mesh import must_take_turns, place_batch, replicated
from seqmodels.training.loss import Loss, bits_per_byte, loss_sums


def make_evaluator(
    model: nn.Module,
    batches: Callable[[], Iterable[dict[str, np.ndarray]]],
    *,
    mesh: Mesh,
    max_batches: int | None = None,
    bytes_per_token: float | None = None,
    loss: Loss = loss_sums,
    metrics: Sequence[Metric] = (),
) -> Callable[[Any], dict[str, float]]:
    """A function from parameters to `loss` (of `loss`, per unit of weight), `accuracy` where that is defined, with
    `bytes_per_token` `bits_per_byte`, and what the `metrics` say. Every call sees the same batches, the first
    `max_batches` of what `batches()` yields, and weighs every position by its weight, so that it does not matter how
    they are cut into batches.

    Raises `InputError` when there is nothing to evaluate on.
    """

    sows = any(metric.reads_sown for metric in metrics)

    def outputs(params, batch):
        options = {"mutable": [SOWN]} if sows else {}
        made = model.apply({"params": params}, batch["tokens"], segment_ids=batch.get("segment_ids"), **options)
        return (made[0][0], made[1]) if sows else (made[0], {})

    def sums(params, batch):
        logits, sown = outputs(params, batch)
        own = [metric.sums(logits, batch, sown) for metric in metrics]
        return loss(logits, batch["targets"], batch["weights"]), own

    sums = jax.jit(sums, out_shardings=replicated(mesh))

    def evaluate(params: Any) -> dict[str, float]:
        total, previous = None, None
        for batch in islice(batches(), max_batches):
            current = sums(params, place_batch(batch, mesh))
            if must_take_turns(mesh.devices.flat):
                jax.block_until_ready(current)
            # The host adds up one batch late, in float64: the device is never idle, and never more than one
            # ahead.
            total, previous = _add(total, previous), current
        total = _add(total, previous)
        if total is None or not total[0].weight > 0:
            raise InputError(
                "the held-out data has no batch with a position that counts: use more data, or a smaller "
                "train.batch_size or train.seq_len"
            )
        totals, of_metrics = total
        result = {name: float(value) for name, value in totals.means(totals.weight).items()}
        if bytes_per_token:
            result["bits_per_byte"] = bits_per_byte(result["loss"], bytes_per_token)
        for metric, own in zip(metrics, of_metrics):
            result |= metric.values(own)
        return result

    return evaluate


def _add(total: Any, more: Any) -> Any:
    if more is None:
        return total
    more = jax.tree.map(lambda x: np.asarray(x, np.float64), more)
    return more if total is None else jax.tree.map(np.add, total, more)
