"""What every synthetic task shares: example `i` is a function of the seed, of the stream and of `i` alone."""

import abc
import dataclasses
import sys
from collections.abc import Iterator

import grain
import numpy as np

from seqmodels.data.dataset import Dataset
from seqmodels.errors import InputError

TRAIN_STREAM, TEST_STREAM = 0, 1

Row = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticTask(Dataset):
    """A task whose examples are made up as they are needed. A new one writes `check_length` and `example`.

    num_train_examples: that many, reshuffled every epoch; None: always new ones.
    num_test_examples: held-out examples, the same for every training seed.
    seed: chooses the examples.
    """

    num_train_examples: int | None = None
    num_test_examples: int = 3000
    seed: int = 0

    def __post_init__(self):
        if self.num_test_examples < 1 or (self.num_train_examples is not None and self.num_train_examples < 1):
            raise InputError(
                f"{type(self).__name__}: num_train_examples is {self.num_train_examples} and num_test_examples"
                f" {self.num_test_examples}; expected at least 1 (the former also None: endless)"
            )
        self.require(seed=0)

    @abc.abstractmethod
    def check_length(self, seq_len: int) -> None:
        """Raise `InputError` where no example has this length."""

    @abc.abstractmethod
    def example(self, seq_len: int, random: np.random.Generator) -> Row:
        """One sequence: `tokens` and `targets`, int32 [seq_len], and `weights`, float32 [seq_len]."""

    def test_example(self, seq_len: int, random: np.random.Generator) -> Row:
        """As `example`, for evaluation, where that is another thing."""
        return self.example(seq_len, random)

    def training_rows(self, seq_len: int, seed: int) -> grain.MapDataset | grain.IterDataset:
        if self.num_train_examples is None:
            return grain.MapDataset.source(_Examples(self, seq_len, (TRAIN_STREAM, seed + 1), sys.maxsize))
        source = _Examples(self, seq_len, (TRAIN_STREAM, 0), self.num_train_examples)
        order_seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        return grain.MapDataset.source(source).shuffle(order_seed).repeat()

    def evaluation_rows(self, seq_len: int) -> Iterator[Row]:
        examples = _Examples(self, seq_len, (TEST_STREAM, 0), self.num_test_examples)
        return (examples[index] for index in range(len(examples)))

    def require(self, **least: int) -> None:
        """Raise `InputError` for a field below its least value."""
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"{type(self).__name__}: {name} is {getattr(self, name)}; expected {bound} or more")

    def require_length(self, seq_len: int, least: int, reason: str) -> None:
        """Raise `InputError` for a length below the least that has room for an example."""
        if seq_len < least:
            raise InputError(f"{type(self).__name__}: seq_len is {seq_len}; {reason} need at least {least}")


class _Examples:
    """`length` examples of a task; `stream` tells them from those of the other split and of other runs."""

    def __init__(self, task: SyntheticTask, seq_len: int, stream: tuple[int, int], length: int):
        task.check_length(seq_len)
        self._make = task.test_example if stream[0] == TEST_STREAM else task.example
        self._task, self._seq_len, self._stream, self._length = task, seq_len, stream, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Row:
        return self._make(self._seq_len, random_of(self._task, self._stream, index))


def random_of(task: SyntheticTask, stream: tuple[int, int], index: int) -> np.random.Generator:
    """What decides an example."""
    # Always four numbers: NumPy takes (a, b) and (a, b, 0) for the same seed.
    return np.random.default_rng((task.seed, *stream, index))


def next_token_row(sequence: np.ndarray, seq_len: int, counted: np.ndarray) -> Row:
    """The first `seq_len` tokens of a sequence and, one ahead of them, their targets.

    counted: bool, of the sequence's length: whether a token counts as a target. A token that nothing follows has
    weight 0.
    """
    targets, weights = np.zeros(seq_len, np.int32), np.zeros(seq_len, np.float32)
    following = sequence[1 : seq_len + 1]
    targets[: len(following)], weights[: len(following)] = following, counted[1 : seq_len + 1]
    return {"tokens": sequence[:seq_len].astype(np.int32), "targets": targets, "weights": weights}


def same_position_row(tokens: np.ndarray, places: np.ndarray, answers: np.ndarray) -> Row:
    """Tokens of which those at `places` have the targets `answers`; no others count."""
    targets, weights = np.zeros(len(tokens), np.int32), np.zeros(len(tokens), np.float32)
    targets[places], weights[places] = answers, 1.0
    return {"tokens": tokens.astype(np.int32), "targets": targets, "weights": weights}
