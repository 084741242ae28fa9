"""What every data set gives the trainer: batches without end to train on, a fixed set to be judged by.

A batch is a dictionary of arrays. `B` is this process's share of the global batch, `T` the sequence length.

    tokens        int32    [B, T]   the model's input
    targets       int32    [B, T]   what it should say at each position
    weights       float32  [B, T]   how much a position counts in the loss; 0 if it has nothing to predict
    segment_ids   int32    [B, T]   only where documents are packed: 1, 2, ... along the row, 0 for padding

Data that are numbers and not ids (`Dataset.input_size` is F) have tokens float32 [B, T, F] and targets float32 [B, T];
the loss is then the squared error, and there is no accuracy.

Rows flow through one pipeline, whatever they are made from:

    rows (shuffled, repeated)  ->  batches, of which a process takes its part  ->  transforms  ->  the keys above

The pipeline is a Grain one, without worker processes, so its whole position is a small JSON-able state. Rows and
batches are those of the whole job, however many processes share them: the position of one job is that of another with
more or fewer processes. A process reads its own rows alone, but where documents are packed: what a row holds then
depends on all before it, and every process packs all.
"""

import abc
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from seqmodels.data.metrics import Metric
from seqmodels.data.tokenizers import Tokenizer
from seqmodels.data.transforms import Batch, Transform
from seqmodels.errors import InputError

BATCH_DTYPES = {"tokens": np.int32, "targets": np.int32, "weights": np.float32, "segment_ids": np.int32}
NUMBER_DTYPES = BATCH_DTYPES | {"tokens": np.float32, "targets": np.float32}
MAX_SEED = 2**32 - 1


class Dataset(abc.ABC):
    """A source of batches. A new one says what its rows are; batching, sharding and resuming are here."""

    tokenizer: Tokenizer | None = None
    """Turns text into ids and back; None where the ids stand for no text."""

    default_transforms: tuple[Transform, ...] = ()
    """What makes a batch out of its rows when the caller names no transforms."""

    reader_threads: int = 0
    """Threads that read batches ahead; 0 for what is in memory, where they would only get in the way."""

    packed: bool = False
    """Whether its batches have segment_ids."""

    input_size: int | None = None
    """Numbers at each position of the input; None where the input is ids."""

    metrics: tuple[Metric, ...] = ()
    """What evaluation reports beside loss and accuracy."""

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of ids that a model of this data needs. Does not read the data."""

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of held-out text per counted target; loss / ln 2 / bytes_per_token is bits per byte."""
        return None

    @property
    def fingerprint(self) -> str:
        """One line that is another where the training rows are: what a run that goes on checks."""
        return type(self).__name__

    @abc.abstractmethod
    def training_rows(self, seq_len: int, seed: int) -> grain.MapDataset | grain.IterDataset:
        """Rows without end, shuffled anew every epoch."""

    @abc.abstractmethod
    def evaluation_rows(self, seq_len: int) -> Iterator[dict[str, np.ndarray]]:
        """Every held-out row once, always in the same order, which is a fair sample from its first row on."""

    @property
    def dtypes(self) -> Mapping[str, type]:
        """Of the arrays that a batch may have, by name."""
        return BATCH_DTYPES if self.input_size is None else NUMBER_DTYPES

    def batch_shapes(self, batch_size: int, seq_len: int) -> dict[str, tuple[int, ...]]:
        """Of the arrays that a batch has, by name. Does not read the data."""
        names = [name for name in BATCH_DTYPES if name != "segment_ids" or self.packed]
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names, (batch_size, seq_len))
        if self.input_size is not None:
            shapes["tokens"] += (self.input_size,)
        return shapes

    def train_batches(
        self,
        batch_size: int,
        seq_len: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        transforms: Sequence[Transform] | None = None,
    ) -> grain.DatasetIterator:
        """Batches without end.

        The iterator's `get_state()` is JSON-able, and an iterator made by the same call that is given it with
        `set_state()` continues with the very batch that would have come next; so does
        `grain.checkpoint.CheckpointSave` with Orbax.

        batch_size: rows of the global batch.
        process_index, process_count: take the i-th of n equal parts of every batch, `batch_size // n` rows in a row.
        seed: 0 to 2**32 - 1; fixes the order.
        transforms: applied to each batch in order; None means `default_transforms`.
        """
        _check_shard(batch_size, seq_len, process_index, process_count)
        if not 0 <= seed <= MAX_SEED:
            raise InputError(f"the data seed is {seed}; expected 0 to {MAX_SEED}")
        transforms = self._transforms(transforms)
        rows, size = self.training_rows(seq_len, seed), batch_size // process_count
        first = process_index * size
        if isinstance(rows, grain.MapDataset):
            rows = rows if process_count == 1 else _PartsOfBatches(rows, batch_size, first, size)
            batches = rows.batch(size, drop_remainder=True)
        else:
            batches = rows.batch(batch_size, drop_remainder=True)
            batches = batches.map(lambda batch: {key: array[first : first + size] for key, array in batch.items()})
        batches = batches.map(lambda batch: apply_transforms(batch, transforms, self.dtypes))
        if isinstance(batches, grain.MapDataset):
            batches = batches.to_iter_dataset(read_ahead(self.reader_threads))
        return iter(batches)

    def evaluation_batches(
        self,
        batch_size: int,
        seq_len: int,
        transforms: Sequence[Transform] | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> Iterator[Batch]:
        """The held-out rows, once, always in the same order; arguments as in `train_batches`.

        Every process gets equally many batches of one shape: the last is filled up with rows of zeros, which
        have no weight.
        """
        _check_shard(batch_size, seq_len, process_index, process_count)
        transforms = self._transforms(transforms)
        return self._evaluation_batches(batch_size, seq_len, transforms, process_index, process_count)

    # A generator of its own, so that what is wrong is said at the call and not at the first batch.
    def _evaluation_batches(
        self,
        batch_size: int,
        seq_len: int,
        transforms: Sequence[Transform],
        process_index: int,
        process_count: int,
    ) -> Iterator[Batch]:
        rows = self.evaluation_rows(seq_len)
        while group := list(itertools.islice(rows, batch_size)):
            batch = {key: np.stack([row[key] for row in group]) for key in group[0]}
            batch = apply_transforms(batch, transforms, self.dtypes)
            missing, size = batch_size - len(group), batch_size // process_count
            own = slice(process_index * size, (process_index + 1) * size)
            yield {key: _pad_rows(array, missing)[own] for key, array in batch.items()}

    def _transforms(self, transforms: Sequence[Transform] | None) -> tuple[Transform, ...]:
        return self.default_transforms if transforms is None else tuple(transforms)


class _PartsOfBatches(grain.MapDataset):
    """Of every `batch_size` rows those from place `first` on, `size` of them."""

    def __init__(self, rows: grain.MapDataset, batch_size: int, first: int, size: int):
        super().__init__(rows)
        self._batch_size, self._first, self._size = batch_size, first, size

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * self._size

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, place = divmod(index, self._size)
        return self._parent[batch * self._batch_size + self._first + place]


def apply_transforms(
    batch: Batch, transforms: Iterable[Transform], dtypes: Mapping[str, type] = BATCH_DTYPES
) -> Batch:
    """Apply `transforms` in order and keep what the batch's contract names, in its dtypes."""
    for transform in transforms:
        batch = transform(batch)
    for key in ("tokens", "targets", "weights"):
        if key not in batch:
            raise InputError(
                f"a batch has no {key!r} after its transforms; for text, begin with next_token_targets"
            )
    return {key: batch[key].astype(dtype, copy=False) for key, dtype in dtypes.items() if key in batch}


def _pad_rows(array: np.ndarray, missing: int) -> np.ndarray:
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))


def read_ahead(threads: int) -> grain.ReadOptions:
    """Two batches ahead per thread. Grain's own default holds 500, which is gigabytes of long sequences."""
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)


def _check_shard(batch_size: int, seq_len: int, process_index: int, process_count: int) -> None:
    if batch_size < 1 or seq_len < 1:
        raise InputError(f"batch_size is {batch_size} and seq_len is {seq_len}; both must be at least 1")
    if not 0 <= process_index < process_count:
        raise InputError(
            f"process_index is {process_index}; expected 0 to process_count - 1 = {process_count - 1}"
        )
    if batch_size % process_count:
        raise InputError(
            f"batch_size {batch_size} is not divisible by the {process_count} processes;"
            f" the nearest that is: {max(1, round(batch_size / process_count)) * process_count}"
        )
