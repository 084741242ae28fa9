"""Tasks that are made up as they are needed: example `i` is a function of the seed and of `i`."""

import dataclasses
import sys
from collections.abc import Iterator

import grain
import numpy as np

from seqmodels.data.dataset import Dataset
from seqmodels.errors import InputError

TRAIN_STREAM, TEST_STREAM = 0, 1


@dataclasses.dataclass(frozen=True)
class MQAR(Dataset):
    """Multi-query associative recall, Arora et al. 2023 (Zoology), arXiv 2312.04927.

    A sequence first lists D = `num_kv_pairs` pairs, k1 v1 k2 v2 ..., and later asks for each key once:

        keys     D different ones of 1 .. V/2 - 1
        values   D different ones of V/2 .. V - 1
        queries  key i stands at position 2 D + 2 g_i, where its target is value i; the g_i are different,
                 drawn one after the other with probability proportional to (g + 1) ** (power_a - 1)
        else     uniform over the vocabulary, or 0 if not `random_non_queries` (as in the paper's figure 2)

    Only the queries have weight, so accuracy over weighted positions is the paper's.

    vocab_size: V, even.
    num_train_examples: that many, reshuffled every epoch, as in the paper (100,000); None: always new ones.
    num_test_examples: held-out examples, the same for every training seed.
    seed: chooses the examples.
    """

    vocab_size: int = 8192
    num_kv_pairs: int = 8
    power_a: float = 0.01
    random_non_queries: bool = True
    num_train_examples: int | None = None
    num_test_examples: int = 3000
    seed: int = 0

    def __post_init__(self):
        if self.vocab_size % 2 or self.num_kv_pairs < 1 or self.num_kv_pairs >= self.vocab_size // 2:
            raise InputError(
                f"MQAR: vocab_size {self.vocab_size} does not fit num_kv_pairs {self.num_kv_pairs};"
                f" expected at least 1 pair, and an even vocab_size of at least 2 * num_kv_pairs + 2"
            )
        if self.num_test_examples < 1 or (
            self.num_train_examples is not None and self.num_train_examples < 1
        ):
            raise InputError(
                f"MQAR: num_train_examples is {self.num_train_examples} and num_test_examples"
                f" {self.num_test_examples}; expected at least 1 (the former also None: endless)"
            )
        if self.seed < 0:
            raise InputError(f"MQAR: seed is {self.seed}; expected 0 or more")

    def training_rows(self, seq_len: int, seed: int) -> grain.MapDataset | grain.IterDataset:
        if self.num_train_examples is None:
            return grain.MapDataset.source(_Examples(self, seq_len, (TRAIN_STREAM, seed + 1), sys.maxsize))
        source = _Examples(self, seq_len, (TRAIN_STREAM, 0), self.num_train_examples)
        order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        return grain.MapDataset.source(source).shuffle(order_seed).repeat()

    def evaluation_rows(self, seq_len: int) -> Iterator[dict[str, np.ndarray]]:
        examples = _Examples(self, seq_len, (TEST_STREAM, 0), self.num_test_examples)
        return (examples[index] for index in range(len(examples)))

    def example(self, seq_len: int, random: np.random.Generator) -> dict[str, np.ndarray]:
        """One sequence: `tokens` and `targets`, int32 [seq_len], and `weights`, float32 [seq_len]."""
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
        targets, weights = np.zeros(seq_len, np.int32), np.zeros(seq_len, np.float32)
        targets[queries], weights[queries] = values, 1.0
        return {"tokens": tokens, "targets": targets, "weights": weights}


class _Examples:
    """`length` examples of a task; `stream` tells them from those of the other split and of other runs."""

    def __init__(self, task: MQAR, seq_len: int, stream: tuple[int, int], length: int):
        if seq_len % 2 or seq_len < 4 * task.num_kv_pairs:
            raise InputError(
                f"MQAR: seq_len is {seq_len}; {task.num_kv_pairs} pairs and their queries need an even number"
                f" of at least {4 * task.num_kv_pairs}"
            )
        self._task, self._seq_len, self._stream, self._length = task, seq_len, stream, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        # Always four numbers: NumPy takes (a, b) and (a, b, 0) for the same seed.
        return self._task.example(
            self._seq_len, np.random.default_rng((self._task.seed, *self._stream, index))
        )
