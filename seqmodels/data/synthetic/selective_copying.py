"""Selective copying."""

import dataclasses

import numpy as np

from seqmodels.data.metrics import ExampleAccuracy
from seqmodels.data.synthetic._task import Row, SyntheticTask, same_position_row
from seqmodels.errors import InputError


@dataclasses.dataclass(frozen=True)
class SelectiveCopying(SyntheticTask):
    """Selective copying, Gu and Dao 2023 (Mamba), arXiv 2312.00752: data at random places, to be said in their order.

        data      M = `num_tokens` uniform ids of 1 .. V - 2, at uniform places among the first seq_len - M
        blanks    0, at the other ones of these
        markers   V - 1 at the last M positions, where the targets are the data, in order

    The paper has 4,096 positions before the markers, V = 16 and M = 16. MAD's task of this name, `MADSelectiveCopying`,
    has other ids and a copy token.

    vocab_size: V.
    """

    vocab_size: int = 16
    num_tokens: int = 16

    metrics = (ExampleAccuracy(),)

    def __post_init__(self):
        self.require(num_tokens=1)
        if self.vocab_size < 3:
            raise InputError(
                f"SelectiveCopying: vocab_size is {self.vocab_size}; expected 3 or more, a blank, a marker and data"
            )
        super().__post_init__()

    def check_length(self, seq_len: int) -> None:
        self.require_length(seq_len, 2 * self.num_tokens, f"{self.num_tokens} tokens and their markers")

    def example(self, seq_len: int, random: np.random.Generator) -> Row:
        data = random.integers(1, self.vocab_size - 1, size=self.num_tokens)
        before = seq_len - self.num_tokens
        tokens = np.zeros(seq_len, np.int32)
        tokens[np.sort(random.choice(before, self.num_tokens, replace=False))] = data
        tokens[before:] = self.vocab_size - 1
        return same_position_row(tokens, np.arange(before, seq_len), data)
