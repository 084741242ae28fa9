"""Bigram-Backcopy."""

import dataclasses
import functools
import zlib
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from seqmodels.data.metrics import Arrays, AttentionSink, LossWhere, Metric
from seqmodels.data.sources import find_files, read_documents
from seqmodels.data.synthetic._task import Row, SyntheticTask, next_token_row
from seqmodels.errors import InputError
from seqmodels.notation import Array

BYTES = 256


@dataclasses.dataclass(frozen=True)
class BigramBackcopy(SyntheticTask):
    """Bigram-Backcopy, Guo et al. 2024, arXiv 2410.13835: bigrams of a text, but for what follows a trigger.

        x_0        the start token, id C = `num_characters`
        x_1        from the characters' frequencies, without the triggers
        x_i+1      x_i-1 if x_i is a trigger, else from P(. | x_i)

    Characters are the bytes of the text, numbered by their frequency: 0 is the most frequent. Triggers are the first
    `num_triggers`. P is counted in the text, within its documents, of which rarer bytes are left out. No two triggers
    follow each other. Every next token counts.

    Evaluation reports the loss at triggers, `trigger_loss`, of which the best is 0; at all others, `bigram_loss`, and
    what of it is more than P's own, `bigram_excess`; and the attention that queries other than triggers give to the
    start token, see `AttentionSink`.

    paths: the text, see `seqmodels.data.sources.find_files`; the paper has Tiny Shakespeare. None: the sources of
        Python's standard library.
    """

    paths: str | Sequence[str] | None = None
    num_characters: int = 64
    num_triggers: int = 3

    def __post_init__(self):
        if not 1 <= self.num_triggers < self.num_characters <= BYTES:
            raise InputError(
                f"BigramBackcopy: num_triggers is {self.num_triggers} and num_characters {self.num_characters};"
                f" expected at least one trigger, more characters than triggers, and no more than {BYTES}"
            )
        super().__post_init__()

    @property
    def vocab_size(self) -> int:
        return self.num_characters + 1

    @property
    def fingerprint(self) -> str:
        return f"{type(self).__name__}, bigrams with checksum {zlib.crc32(self.probabilities.tobytes()):08x}"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        def at_trigger(batch: Arrays) -> Array:
            return batch["tokens"] < self.num_triggers

        def elsewhere(batch: Arrays) -> Array:
            return ~at_trigger(batch)

        with np.errstate(divide="ignore"):
            entropies = -np.log(self.probabilities).astype(np.float32)

        def of_bigrams(batch: Arrays) -> Array:
            return jnp.asarray(entropies)[batch["tokens"], batch["targets"]]

        return (
            LossWhere("trigger_loss", at_trigger),
            LossWhere("bigram_loss", elsewhere),
            LossWhere("bigram_excess", elsewhere, of_bigrams),
            AttentionSink(elsewhere),
        )

    @functools.cached_property
    def probabilities(self) -> np.ndarray:
        """What follows each id that is no trigger, float64 [vocab_size, vocab_size]; the start token is last."""
        size = self.num_characters
        counts, pairs = np.zeros(BYTES, np.int64), np.zeros((BYTES, BYTES), np.int64)
        texts = [np.frombuffer(document.text, np.uint8) for document in read_documents(find_files(self.paths))]
        for text in texts:
            counts += np.bincount(text, minlength=BYTES)
        kept = np.argsort(-counts, kind="stable")[:size]
        is_kept = np.isin(np.arange(BYTES), kept)
        for text in texts:
            text = text[is_kept[text]].astype(np.int64)
            pairs += np.bincount(text[:-1] * BYTES + text[1:], minlength=BYTES**2).reshape(BYTES, BYTES)

        if not counts[kept[self.num_triggers :]].any():
            raise InputError(
                f"BigramBackcopy: the text has {np.count_nonzero(counts)} different bytes; expected more than"
                f" num_triggers = {self.num_triggers}"
            )
        weights = np.zeros((size + 1, size + 1))
        weights[:size, :size] = pairs[np.ix_(kept, kept)]
        # What nothing follows, at the end of a text, is followed by anything.
        weights[:size, :size][weights[:size, :size].sum(axis=1) == 0] = counts[kept]
        weights[size, self.num_triggers : size] = counts[kept[self.num_triggers :]]
        return weights / weights.sum(axis=1, keepdims=True)

    @functools.cached_property
    def _cumulative(self) -> np.ndarray:
        return np.cumsum(self.probabilities, axis=1)

    def check_length(self, seq_len: int) -> None:
        self.require_length(seq_len, 2, "the start token and a character")

    def example(self, seq_len: int, random: np.random.Generator) -> Row:
        cumulative = self._cumulative
        tokens = [self.num_characters]
        for draw in random.random(seq_len):
            last = tokens[-1]
            if last < self.num_triggers:
                tokens.append(tokens[-2])
            else:
                row = cumulative[last]
                tokens.append(int(np.searchsorted(row, draw * row[-1], side="right")))
        return next_token_row(np.array(tokens), seq_len, np.ones(seq_len + 1, bool))
