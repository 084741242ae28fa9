"""How well a model predicts every position of a long text, which it reads span by span.

By the split law a text that goes through the state in spans gets the predictions of one that is read as a whole. So the
memory is that of a span, however long the text: but for attention without a window, whose cache holds all of it.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from seqmodels.models import LanguageModel
from seqmodels.notation import Array
from seqmodels.training.loss import loss_sums

SPAN = 2048


class PositionScores(NamedTuple):
    """Of a span of rows, each [rows, span]; 0 and False where a position has no weight.

    nll      float32, -log probability of the target, in nats, times the weight
    correct  bool, whether the target is the likeliest token
    """

    nll: np.ndarray | Array
    correct: np.ndarray | Array


Reader = Callable[[Any, Mapping[str, np.ndarray]], Iterator[PositionScores]]


def make_reader(model: LanguageModel, *, span: int = SPAN) -> Reader:
    """A function from parameters and a batch (see `seqmodels.data.dataset`) to the scores of its spans, in order, of
    `span` positions each but for the last, which has what remains."""

    def scores_of(params: Any, batch: Mapping[str, np.ndarray]) -> Iterator[PositionScores]:
        rows, length = batch["tokens"].shape
        state = _begin(model, rows, length)
        for start in range(0, length, span):
            part = {name: array[:, start : start + span] for name, array in batch.items()}
            scores, state = read_span(params, part, state, model=model)
            yield PositionScores(*map(np.asarray, scores))

    return scores_of


@functools.partial(jax.jit, static_argnames=("model", "rows", "length"))
def _begin(model: LanguageModel, rows: int, length: int) -> Any:
    return model.initial_state(rows, capacity=length)


# A cache is written in its place, not copied.
@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def read_span(
    params: Any, batch: Mapping[str, Array], state: Any, *, model: LanguageModel
) -> tuple[PositionScores, Any]:
    """The scores of a span that goes on from `state` (None: a text's beginning), and the state after it."""
    logits, state = model.apply({"params": params}, batch["tokens"], state, batch.get("segment_ids"))
    scores = jax.vmap(jax.vmap(loss_sums))(logits, batch["targets"], batch["weights"])
    return PositionScores(scores.nll, scores.correct > 0), state
