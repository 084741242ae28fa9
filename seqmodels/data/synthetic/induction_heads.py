"""Induction heads."""

import dataclasses

import numpy as np

from seqmodels.data.synthetic._task import Row, SyntheticTask, same_position_row
from seqmodels.errors import InputError


@dataclasses.dataclass(frozen=True)
class InductionHeads(SyntheticTask):
    """Induction heads, Dao et al. 2022 (H3), arXiv 2212.14052: what came after the prefix when it came before?

    Tokens are uniform over 0 .. V - 2. The prefix, id V - 1, stands at one uniform place before the last two, and at
    the last place, where the target is the token that followed it. H3 has V = 20 and 30 tokens; Mamba (Gu and Dao 2023,
    arXiv 2312.00752) trains V = 16 on 256 tokens and tests on 64 to 1,048,576.

    vocab_size: V.
    """

    vocab_size: int = 16

    def __post_init__(self):
        if self.vocab_size < 2:
            raise InputError(
                f"InductionHeads: vocab_size is {self.vocab_size}; expected 2 or more, the prefix and a token"
            )
        super().__post_init__()

    def check_length(self, seq_len: int) -> None:
        self.require_length(seq_len, 3, "the prefix, what follows it, and the prefix again")

    def example(self, seq_len: int, random: np.random.Generator) -> Row:
        prefix = self.vocab_size - 1
        tokens = random.integers(prefix, size=seq_len)
        place = random.integers(seq_len - 2)
        tokens[[place, -1]] = prefix
        return same_position_row(tokens, np.array([seq_len - 1]), tokens[place + 1])
