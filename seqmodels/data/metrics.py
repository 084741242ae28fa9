"""What an evaluation can report beside loss and accuracy.

A data set names its own in `Dataset.metrics`. Each is a function of sums over the rows of all batches: what the
evaluation reports does not depend on how the rows are cut into batches, or on how many processes read them.

    logits  float32  [B, T, V]      batch   as in `seqmodels.data.dataset`, on the device
    sown    what the model's layers have set aside (`seqmodels.notation.SOWN`): {} unless `reads_sown`

Positions count with their weight, which is 0 or 1 in every task that has metrics.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from seqmodels.notation import FIRST_WEIGHT, Array, Logits

Arrays = Mapping[str, Array]
SINK_THRESHOLD = 0.3


class Metric(abc.ABC):
    """One or several numbers about held-out data."""

    reads_sown: bool = False
    """Whether it reads what layers sow; only then is that computed."""

    @abc.abstractmethod
    def sums(self, logits: Logits, batch: Arrays, sown: Mapping[str, Any]) -> Arrays:
        """What is added up over batches, by name; traced under jit. The names are the same for every batch."""

    @abc.abstractmethod
    def values(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        """The numbers, by name, from the sums over all batches, float64. What has no example is left out."""


def _correct(logits: Logits, batch: Arrays) -> Array:
    return jnp.argmax(logits, axis=-1) == batch["targets"]


def _ratio(name: str, total: np.ndarray, count: np.ndarray) -> dict[str, float]:
    return {name: float(total / count)} if count > 0 else {}


@dataclasses.dataclass(frozen=True)
class MacroAccuracy(Metric):
    """Mean, over the classes, of the share of a class's positions that are recognised.

    A class is an id that is a target or a prediction at a position that counts; one that is predicted but is no
    target has share 0. So does torchmetrics' MulticlassAccuracy by default, which is what MAD reports (Poli et al.
    2024, arXiv 2403.17844), there as a mean over batches.
    """

    def sums(self, logits: Logits, batch: Arrays, sown: Mapping[str, Any]) -> Arrays:
        ids, weights = jnp.arange(logits.shape[-1]), batch["weights"]
        predictions, targets = jnp.argmax(logits, axis=-1), batch["targets"]

        def count(of: Array, weights: Array) -> Array:
            return jnp.sum((of[..., None] == ids) * weights[..., None], axis=(0, 1))

        return {
            "recognised": count(targets, weights * (predictions == targets)),
            "targets": count(targets, weights),
            "predictions": count(predictions, weights),
        }

    def values(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        classes = (sums["targets"] > 0) | (sums["predictions"] > 0)
        shares = sums["recognised"] / np.maximum(sums["targets"], 1.0)
        return _ratio("macro_accuracy", shares[classes].sum(), classes.sum())


@dataclasses.dataclass(frozen=True)
class ExampleAccuracy(Metric):
    """Share of the rows in which every position that counts is right.

    Where the counted targets are one stretch of text, it is the share of rows that greedy decoding answers exactly:
    as long as it is right, it reads what is read here.
    """

    def sums(self, logits: Logits, batch: Arrays, sown: Mapping[str, Any]) -> Arrays:
        counted = batch["weights"] > 0
        rows = counted.any(axis=1)
        right = rows & (_correct(logits, batch) | ~counted).all(axis=1)
        return {"right": jnp.sum(right, dtype=jnp.float32), "rows": jnp.sum(rows, dtype=jnp.float32)}

    def values(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        return _ratio("example_accuracy", sums["right"], sums["rows"])


@dataclasses.dataclass(frozen=True)
class LossWhere(Metric):
    """Mean loss, in nats, over the positions of one kind.

    name: what it is called.
    where: batch to bool [B, T], the positions.
    baseline: batch to float32 [B, T], the loss of a reference that is taken off; None for none.
    """

    name: str
    where: Callable[[Arrays], Array]
    baseline: Callable[[Arrays], Array] | None = None

    def sums(self, logits: Logits, batch: Arrays, sown: Mapping[str, Any]) -> Arrays:
        is_target = jnp.arange(logits.shape[-1]) == batch["targets"][..., None]
        loss = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        weights = jnp.where(self.where(batch), batch["weights"], 0.0)
        if self.baseline is not None:
            # Where nothing counts the reference may be infinite.
            loss -= jnp.where(weights > 0, self.baseline(batch), 0.0)
        return {"loss": jnp.sum(loss * weights), "weight": jnp.sum(weights)}

    def values(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        return _ratio(self.name, sums["loss"], sums["weight"])


@dataclasses.dataclass(frozen=True)
class AttentionSink(Metric):
    """How much of their attention the queries of one kind give to the first token.

    `sink_mass` is the mean over queries, heads and layers (Guo et al. 2024, arXiv 2410.13835). `sink_rate` is the share
    of heads whose mean over queries is more than 0.3 (Gu et al. 2024, arXiv 2410.10781; there over all queries). A
    model without a layer that sows `FIRST_WEIGHT` has neither.

    where: batch to bool [B, T], the queries.
    """

    where: Callable[[Arrays], Array]

    reads_sown = True

    def sums(self, logits: Logits, batch: Arrays, sown: Mapping[str, Any]) -> Arrays:
        weights = jnp.where(self.where(batch), batch["weights"], 0.0)
        found = [x for path, x in jax.tree.leaves_with_path(sown) if FIRST_WEIGHT in jax.tree_util.keystr(path)]
        # Scanned layers are stacked in front: [layers, B, T, heads].
        heads = [jnp.einsum("...bth,bt->...h", x, weights).ravel() for x in found]
        return {"mass": jnp.concatenate([jnp.zeros(0), *heads]), "queries": jnp.sum(weights)}

    def values(self, sums: Mapping[str, np.ndarray]) -> dict[str, float]:
        if not sums["mass"].size or not sums["queries"] > 0:
            return {}
        mass = sums["mass"] / sums["queries"]
        return {"sink_mass": float(mass.mean()), "sink_rate": float((mass > SINK_THRESHOLD).mean())}
