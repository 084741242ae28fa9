"""Loss on held-out data."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from seqmodels.errors import InputError
from seqmodels.parallel.mesh import must_take_turns, place_batch, replicated
from seqmodels.training.loss import LossSums, bits_per_byte, loss_sums


def make_evaluator(
    model: nn.Module,
    batches: Callable[[], Iterable[dict[str, np.ndarray]]],
    *,
    mesh: Mesh,
    max_batches: int | None = None,
    bytes_per_token: float | None = None,
) -> Callable[[Any], dict[str, float]]:
    """A function from parameters to `loss` (nats per unit of weight), `accuracy` and, with `bytes_per_token`,
    `bits_per_byte`. Every call sees the same batches, the first `max_batches` of what `batches()` yields, and
    weighs every position by its weight, so that it does not matter how they are cut into batches.

    Raises `InputError` when there is nothing to evaluate on.
    """

    def sums(params, batch):
        logits, _ = model.apply({"params": params}, batch["tokens"], segment_ids=batch.get("segment_ids"))
        return loss_sums(logits, batch["targets"], batch["weights"])

    sums = jax.jit(sums, out_shardings=replicated(mesh))

    def evaluate(params: Any) -> dict[str, float]:
        total, previous = LossSums(0.0, 0.0, 0.0, 0.0), None
        for batch in islice(batches(), max_batches):
            current = sums(params, place_batch(batch, mesh))
            if must_take_turns(mesh.devices.flat):
                jax.block_until_ready(current)
            # The host adds up one batch late, in float64: the device is never idle, and never more than one
            # ahead.
            total, previous = _add(total, previous), current
        total = _add(total, previous)
        if not total.weight > 0:
            raise InputError(
                "the held-out data has no batch with a position that counts: use more data, or a smaller "
                "train.batch_size or train.seq_len"
            )
        loss = total.nll / total.weight
        result = {"loss": loss, "accuracy": total.correct / total.weight}
        if bytes_per_token:
            result["bits_per_byte"] = bits_per_byte(loss, bytes_per_token)
        return result

    return evaluate


def _add(total: LossSums, more: LossSums | None) -> LossSums:
    return total if more is None else LossSums(*(a + float(b) for a, b in zip(total, more)))
