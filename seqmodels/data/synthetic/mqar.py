"""Multi-query associative recall."""

import dataclasses

import numpy as np

from seqmodels.data.synthetic._task import Row, SyntheticTask, same_position_row
from seqmodels.errors import InputError


@dataclasses.dataclass(frozen=True)
class MQAR(SyntheticTask):
    """Multi-query associative recall, Arora et al. 2023 (Zoology), arXiv 2312.04927.

    A sequence first lists D = `num_kv_pairs` pairs, k1 v1 k2 v2 ..., and later asks for each key once:

        keys     D different ones of 1 .. V/2 - 1
        values   D different ones of V/2 .. V - 1
        queries  key i stands at position 2 D + 2 g_i, where its target is value i; the g_i are different,
                 drawn one after the other with probability proportional to (g + 1) ** (power_a - 1)
        else     uniform over the vocabulary, or 0 if not `random_non_queries` (as in the paper's figure 2)

    Only the queries have weight, so accuracy over weighted positions is the paper's.

    vocab_size: V, even.
    num_train_examples, num_test_examples, seed: see `SyntheticTask`; the paper trains on 100,000 examples.
    """

    vocab_size: int = 8192
    num_kv_pairs: int = 8
    power_a: float = 0.01
    random_non_queries: bool = True

    def __post_init__(self):
        if self.vocab_size % 2 or self.num_kv_pairs < 1 or self.num_kv_pairs >= self.vocab_size // 2:
            raise InputError(
                f"MQAR: vocab_size {self.vocab_size} does not fit num_kv_pairs {self.num_kv_pairs};"
                f" expected at least 1 pair, and an even vocab_size of at least 2 * num_kv_pairs + 2"
            )
        super().__post_init__()

    def check_length(self, seq_len: int) -> None:
        if seq_len % 2 or seq_len < 4 * self.num_kv_pairs:
            raise InputError(
                f"MQAR: seq_len is {seq_len}; {self.num_kv_pairs} pairs and their queries need an even number"
                f" of at least {4 * self.num_kv_pairs}"
            )

    def example(self, seq_len: int, random: np.random.Generator) -> Row:
        pairs, half = self.num_kv_pairs, self.vocab_size // 2
        context = 2 * pairs
        keys = 1 + random.choice(half - 1, pairs, replace=False)
        values = half + random.choice(half, pairs, replace=False)

        # The first D of independent exponential clocks with rates p are D draws from p without replacement.
        slots = (seq_len - context) // 2
        rates = np.arange(1, slots + 1) ** (self.power_a - 1.0)
        gaps = np.argsort(random.exponential(size=slots) / rates)[:pairs]
        queries = context + 2 * gaps

        if self.random_non_queries:
            tokens = random.integers(self.vocab_size, size=seq_len, dtype=np.int32)
        else:
            tokens = np.zeros(seq_len, np.int32)
        tokens[0:context:2], tokens[1:context:2], tokens[queries] = keys, values, keys
        return same_position_row(tokens, queries, values)
