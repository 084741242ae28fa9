"""The six tasks of mechanistic architecture design (MAD), Poli et al. 2024, arXiv 2403.17844.

Ids of data come first, then those of noise, then the special ones. Length, vocabulary and number of training examples
are the knobs by which the paper makes them harder. The paper's score of a task is macro accuracy, `macro_accuracy` in
an evaluation; `accuracy` is the share of positions. Where the authors' generators (athms/mad-lab) have defects, these
differ, and the class says so.
"""

import abc
import dataclasses

import numpy as np

from seqmodels.data.metrics import MacroAccuracy
from seqmodels.data.synthetic._task import Row, SyntheticTask, next_token_row, same_position_row
from seqmodels.errors import InputError

MAP_SEED = 12_345


@dataclasses.dataclass(frozen=True, kw_only=True)
class MADTask(SyntheticTask):
    """What the six share: the sizes of the paper's data sets, and its metric."""

    num_train_examples: int | None = 12_800
    num_test_examples: int = 1_280

    metrics = (MacroAccuracy(),)

    @property
    @abc.abstractmethod
    def data_ids(self) -> int:
        """Ids 0 .. data_ids - 1 are of data."""

    def require_data_ids(self, least: int, reason: str) -> None:
        if self.data_ids < least:
            raise InputError(
                f"{type(self).__name__}: vocab_size is {self.vocab_size}, of which {self.data_ids} are ids of data;"
                f" {reason} need at least {least}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoisyMADTask(MADTask):
    """What those share in which a part may be noise: with probability `noise`, of `noise_vocab_size` ids of its own."""

    noise_vocab_size: int = 0
    noise: float = 0.0

    def __post_init__(self):
        if not 0.0 <= self.noise < 1.0:
            raise InputError(f"{type(self).__name__}: noise is {self.noise}; expected at least 0 and less than 1")
        self.require(noise_vocab_size=1 if self.noise else 0)
        super().__post_init__()


@dataclasses.dataclass(frozen=True)
class MADInContextRecall(NoisyMADTask):
    """In-context recall: pairs k v k v ..., where a key that comes again has the value that it had.

        keys     uniform over the first half of the ids of data, drawn anew for each pair
        values   every sequence draws one for each key, uniform over the second half
        last     the key of the last pair is uniform over those that came before
        noise    a slot of two tokens is, with probability `noise`, two uniform ids of noise in place of a pair

    Training counts every next token, most of which are chance; evaluation counts the values of keys that came before.
    A row is made of (seq_len + 1) // 2 slots. The paper's N is the length of the sequence: 128 is seq_len = 127.

    vocab_size: ids of data and of noise.
    noise_vocab_size: ids of noise, the last of all.
    """

    vocab_size: int = 16

    def __post_init__(self):
        self.require_data_ids(2, "keys and values")
        super().__post_init__()

    @property
    def data_ids(self) -> int:
        return self.vocab_size - self.noise_vocab_size

    def check_length(self, seq_len: int) -> None:
        self.require_length(seq_len, 3, "two pairs")

    def example(self, seq_len: int, random: np.random.Generator) -> Row:
        sequence, _ = self.sequence(seq_len, random)
        return next_token_row(sequence, seq_len, np.ones(len(sequence), bool))

    def test_example(self, seq_len: int, random: np.random.Generator) -> Row:
        return next_token_row(*self.masked(*self.sequence(seq_len, random), seq_len))

    def sequence(self, seq_len: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """The slots one after the other, and for each slot whether its key has come before."""
        slots, half = (seq_len + 1) // 2, self.data_ids // 2
        values = random.integers(half, self.data_ids, size=half)
        keys = random.integers(half, size=slots)
        noisy = random.random(slots) < self.noise
        noisy[-1] = False
        if noisy[:-1].all():  # the last key needs one before it
            noisy[0] = False
        keys[-1] = random.choice(np.unique(keys[:-1][~noisy[:-1]]))

        pairs = np.stack([keys, values[keys]], axis=1)
        if noisy.any():
            pairs[noisy] = random.integers(self.data_ids, self.vocab_size, size=(noisy.sum(), 2))
        seen = ~noisy
        first = np.flatnonzero(~noisy)[np.unique(keys[~noisy], return_index=True)[1]]
        seen[first] = False
        return pairs.ravel(), seen

    @staticmethod
    def masked(sequence: np.ndarray, seen: np.ndarray, seq_len: int) -> tuple[np.ndarray, int, np.ndarray]:
        """Arguments of `next_token_row` that count the values of keys which came before."""
        counted = np.zeros(len(sequence), bool)
        counted[1::2] = seen
        return sequence, seq_len, counted


@dataclasses.dataclass(frozen=True)
class MADNoisyRecall(MADInContextRecall):
    """Noisy recall: `MADInContextRecall` with 16 of 32 ids for noise, in a fifth of the slots."""

    vocab_size: int = 32
    noise_vocab_size: int = 16
    noise: float = 0.2


@dataclasses.dataclass(frozen=True)
class MADFuzzyRecall(MADTask):
    """Fuzzy recall: keys and values are motifs, several tokens each.

        motif    1 .. motif_size different ids in uniform order, of a uniform length; in evaluation, keys all have the
                 greatest length, so that it is certain where a key ends
        keys     of the first half of the ids of data; values of the second half
        pairs    key, value, key, value ...; a key that comes again has its value again
        probe    at the end, one of the keys that came before, uniform, and its value

    The padding id, the last of all, fills what is free at the left. Training counts every next token but padding,
    evaluation those of the probe's value.

    vocab_size: ids of data, and one for padding.
    motif_size: greatest length of a key and of a value.
    """

    vocab_size: int = 16
    motif_size: int = 3

    def __post_init__(self):
        self.require(motif_size=1)
        self.require_data_ids(2 * self.motif_size, f"motifs of {self.motif_size} different keys, or values,")
        super().__post_init__()

    @property
    def data_ids(self) -> int:
        return self.vocab_size - 1

    def check_length(self, seq_len: int) -> None:
        self.require_length(seq_len, 4 * self.motif_size - 1, "a pair and a probe")

    def example(self, seq_len: int, random: np.random.Generator) -> Row:
        sequence, _ = self.sequence(seq_len, random, shortest_key=1)
        return next_token_row(sequence, seq_len, sequence != self.data_ids)

    def test_example(self, seq_len: int, random: np.random.Generator) -> Row:
        sequence, answer = self.sequence(seq_len, random, shortest_key=self.motif_size)
        return next_token_row(sequence, seq_len, np.arange(seq_len + 1) > seq_len - answer)

    def sequence(self, seq_len: int, random: np.random.Generator, shortest_key: int) -> tuple[np.ndarray, int]:
        """seq_len + 1 tokens, and how many of them, at the end, are the probe's value."""
        half, longest = self.data_ids // 2, self.motif_size
        values: dict[tuple[int, ...], tuple[int, ...]] = {}
        tokens: list[int] = []
        while True:
            key = self._motif(random, 0, half, shortest_key)
            value = values.get(key) or self._motif(random, half, self.data_ids, 1)
            if len(tokens) + len(key) + len(value) > seq_len + 1 - 2 * longest:
                break
            values[key] = value
            tokens += key + value
        keys = list(values)
        probe = keys[random.integers(len(keys))]
        tokens += probe + values[probe]
        padding = [self.data_ids] * (seq_len + 1 - len(tokens))
        return np.array(padding + tokens), len(values[probe])

    def _motif(self, random: np.random.Generator, start: int, stop: int, shortest: int) -> tuple[int, ...]:
        size = random.integers(shortest, self.motif_size + 1)
        return tuple((start + random.choice(stop - start, size, replace=False)).tolist())


@dataclasses.dataclass(frozen=True)
class MADMemorization(MADTask):
    """Memorization: a map from keys to values that is the same in every sequence, and stands in none.

    A sequence is k, insert, k, insert, ...: keys uniform over the first half of the ids of data, and at each place of
    the insert token, the last id, its target is the key's value. The map takes each key to a value of its own, of the
    second half.

    vocab_size: ids of data, and one for the insert token.
    map_seed: chooses the map.
    """

    vocab_size: int = 256
    map_seed: int = MAP_SEED
    num_train_examples: int | None = dataclasses.field(default=256, kw_only=True)

    def __post_init__(self):
        self.require(map_seed=0)
        self.require_data_ids(2, "keys and values")
        super().__post_init__()

    @property
    def data_ids(self) -> int:
        return self.vocab_size - 1

    @property
    def values(self) -> np.ndarray:
        """The value of each key, int64 [keys]."""
        half = self.data_ids // 2
        return half + np.random.default_rng(self.map_seed).permutation(self.data_ids - half)[:half]

    def check_length(self, seq_len: int) -> None:
        self.require_length(seq_len, 2, "a key and its insert token")

    def example(self, seq_len: int, random: np.random.Generator) -> Row:
        values = self.values
        keys = random.integers(len(values), size=(seq_len + 1) // 2)
        tokens = np.full(seq_len, self.data_ids)
        tokens[0::2] = keys
        places = np.arange(1, seq_len, 2)
        return same_position_row(tokens, places, values[keys[: len(places)]])


@dataclasses.dataclass(frozen=True)
class MADCompression(NoisyMADTask):
    """Compression: random tokens, then the compression token, where the model must know all of them.

    For `seqmodels.models.Autoencoder`, which says every token from what it knows at the last position: the target at a
    position is the token there. Data are uniform; with probability `noise` a position has a uniform id of noise
    instead. Noise and the compression token, the last id, have no weight; in the authors' generator they count.

    vocab_size: ids of data and of noise, and one for the compression token.
    noise_vocab_size: ids of noise, after those of data.
    """

    vocab_size: int = 16

    def __post_init__(self):
        self.require_data_ids(1, "tokens")
        super().__post_init__()

    @property
    def data_ids(self) -> int:
        return self.vocab_size - self.noise_vocab_size - 1

    def check_length(self, seq_len: int) -> None:
        self.require_length(seq_len, 2, "a token and the compression token")

    def example(self, seq_len: int, random: np.random.Generator) -> Row:
        tokens = random.integers(self.data_ids, size=seq_len)
        noisy = random.random(seq_len) < self.noise
        # At least one token is left to say.
        noisy[0] &= not noisy[:-1].all()
        if noisy.any():
            tokens[noisy] = random.integers(self.data_ids, self.vocab_size - 1, size=noisy.sum())
        tokens[-1], noisy[-1] = self.vocab_size - 1, True
        return same_position_row(tokens, np.flatnonzero(~noisy), tokens[~noisy])


@dataclasses.dataclass(frozen=True)
class MADSelectiveCopying(MADTask):
    """Selective copying: data among blanks, the copy token, and blanks at which the data are said in their order.

        data     `num_tokens` uniform ids of data, at uniform places before the copy token, in order
        blanks   id V - 2, everywhere else; the last `num_tokens` positions have the data as targets
        copy     id V - 1

    The authors' generator draws from NumPy's global generator, and so that data right before the copy token are
    certain; here every choice of places is equally likely.

    vocab_size: V: ids of data and two special ones.
    """

    vocab_size: int = 16
    num_tokens: int = 16

    def __post_init__(self):
        self.require(num_tokens=1)
        self.require_data_ids(1, "tokens")
        super().__post_init__()

    @property
    def data_ids(self) -> int:
        return self.vocab_size - 2

    def check_length(self, seq_len: int) -> None:
        self.require_length(seq_len, 2 * self.num_tokens + 1, f"{self.num_tokens} tokens and their copy")

    def example(self, seq_len: int, random: np.random.Generator) -> Row:
        data = random.integers(self.data_ids, size=self.num_tokens)
        before = seq_len - self.num_tokens - 1
        tokens = np.full(seq_len, self.vocab_size - 2)
        tokens[np.sort(random.choice(before, self.num_tokens, replace=False))] = data
        tokens[before] = self.vocab_size - 1
        return same_position_row(tokens, np.arange(before + 1, seq_len), data)
