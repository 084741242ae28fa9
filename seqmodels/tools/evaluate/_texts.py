"""What the suites share that let a language model read texts of several lengths."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from seqmodels.data.tokenizers import Tokenizer
from seqmodels.errors import InputError
from seqmodels.models import LanguageModel
from seqmodels.tools._runs import TrainedRun


def require_text(run: TrainedRun, suite: str) -> Tokenizer:
    """The run's tokenizer. Raises `InputError` where it has none, or its model is no language model."""
    data, model = run.job.data, run.job.model
    if data.tokenizer is None:
        raise InputError(
            f"{suite} reads text, but the run was trained on {type(data).__name__}, whose tokens stand for none; "
            "expected a run on text, or --suite recall"
        )
    if not isinstance(model, LanguageModel):
        raise InputError(f"{suite} needs a LanguageModel; the run's model is a {type(model).__name__}")
    return data.tokenizer


def require_positive(**options: int | Sequence[int] | None) -> None:
    """Raise `InputError` for an option with a number below 1."""
    for name, given in options.items():
        for number in [given] if isinstance(given, int) else given or []:
            if number < 1:
                raise InputError(f"--{name} has {number}; expected whole numbers of at least 1")


def rows_at_once(run: TrainedRun, length: int, rows: int, span: int) -> int:
    """How many of `rows` texts are read together: as many as have the tokens of a training batch, or of a span where
    that is more."""
    tokens = max(span, run.job.batch_size * run.job.seq_len)
    return min(rows, max(1, tokens // length))


def batches_of(rows: Mapping[str, np.ndarray], size: int) -> Iterator[dict[str, np.ndarray]]:
    """The rows in batches of one size; the last is filled up with rows without weight."""
    count = len(rows["tokens"])
    for first in range(0, count, size):
        part = {name: array[first : first + size] for name, array in rows.items()}
        missing = size - len(part["tokens"])
        yield {name: np.pad(array, [(0, missing), (0, 0)]) for name, array in part.items()}


def perplexity_of(loss: float) -> float:
    """exp, with infinity for what has no other number."""
    return math.exp(loss) if loss < 700 else math.inf
