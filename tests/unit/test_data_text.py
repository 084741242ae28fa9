"""Rows and batches of text: what is in them, in which order, on which process, and after a restart."""

import collections
import itertools
import json
import random
import shutil
import time
from pathlib import Path

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from seqmodels.data import MQAR, TextData, mask_inputs, next_token_targets
from seqmodels.data.sources import HELD_OUT, TRAIN
from seqmodels.errors import InputError
from seqmodels.tools.tokenize_corpus import tokenize_corpus

SEPARATOR, MASK = 256, 257


def write_corpus(folder, documents, seed=0):
    """Documents of 0 to 200 bytes, some longer, no two alike."""
    folder.mkdir()
    rng = random.Random(seed)
    for index in range(documents):
        length = rng.choice([0, 1, 5, 30, 60, 200]) if index % 20 else 1500
        (folder / f"{index:04d}.txt").write_text(f"{index}:" + "".join(rng.choices("abcdefgh \n", k=length)))
    return str(folder)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text") / "corpus", 203)


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory, corpus):
    folder = str(tmp_path_factory.mktemp("tokenized") / "tokens")
    tokenize_corpus([corpus], folder, held_out_fraction=0.2, shard_tokens=8192)
    return folder


MODES = list(itertools.product(("memory", "disk"), ("concatenate", "pack")))


@pytest.fixture(params=MODES, ids="-".join)
def data(request, corpus, tokenized):
    where, packing = request.param
    if where == "memory":
        return TextData(corpus, packing=packing, held_out_fraction=0.2)
    return TextData(tokenized, packing=packing)


def take(batches, count):
    return list(itertools.islice(batches, count))


def same(first, second):
    return first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)


def documents_of(data, side):
    tokens = data.splits[side]
    ids = tokens.read(0, len(tokens))
    assert ids[0] == ids[-1] == SEPARATOR
    starts = np.flatnonzero(ids == SEPARATOR)
    assert (starts == tokens.separators).all()
    return [bytes(ids[a + 1 : b].astype(np.uint8)) for a, b in itertools.pairwise(starts)]


# ---- what a batch is ----


def test_batches_keep_their_contract(data):
    for batches in (data.train_batches(4, 32, seed=0), data.evaluation_batches(4, 32)):
        batch = next(batches)
        keys = ["tokens", "targets", "weights"] + ["segment_ids"] * data.packed
        assert list(batch) == keys
        assert [batch[key].shape for key in keys] == [(4, 32)] * len(keys)
        assert [batch[key].dtype for key in keys] == [np.int32, np.int32, np.float32, np.int32][: len(keys)]
        assert batch["tokens"].min() >= 0 and batch["targets"].max() < data.vocab_size == 258


def test_corpus_on_disk_equals_corpus_in_memory(corpus, tokenized):
    for packing in ("concatenate", "pack"):
        memory = TextData(corpus, packing=packing, held_out_fraction=0.2)
        disk = TextData(tokenized, packing=packing)
        assert memory.bytes_per_token == disk.bytes_per_token
        for first, second in zip(
            take(memory.train_batches(4, 48, seed=5), 50), disk.train_batches(4, 48, seed=5)
        ):
            assert same(first, second)


def test_corpus_is_whole_and_split_without_overlap(data, corpus):
    files = [file.read_bytes() for file in Path(corpus).iterdir()]
    assert sorted(documents_of(data, TRAIN) + documents_of(data, HELD_OUT)) == sorted(files)
    assert len(documents_of(data, HELD_OUT)) in range(25, 60)


def test_every_token_is_a_target_once_in_an_epoch(data):
    """The held-out split is an epoch of its own; the rows of a batch that is not full count nothing."""
    documents = documents_of(data, HELD_OUT)
    expected = collections.Counter(itertools.chain(*documents, [SEPARATOR] * len(documents)))
    counted = collections.Counter()
    for batch in data.evaluation_batches(8, 48):
        counted.update(batch["targets"][batch["weights"] > 0].tolist())
    assert counted == expected
    text_bytes = sum(map(len, documents))
    assert data.bytes_per_token == text_bytes / counted.total()


def test_targets_are_the_next_tokens(data):
    for batch in take(data.train_batches(8, 48, seed=0), 20):
        follows = batch["weights"][:, :-1] > 0
        assert (batch["targets"][:, :-1] == batch["tokens"][:, 1:])[follows].all()


def test_windows_tile_the_corpus(corpus):
    data = TextData(corpus, held_out_fraction=0.2)
    tokens = data.splits[TRAIN]
    ids = tokens.read(0, len(tokens))
    rows = -(-(len(ids) - 1) // 48)
    epoch = take(data.train_batches(1, 48, seed=0), rows)
    windows = {batch["tokens"].tobytes() for batch in epoch}
    padded = np.zeros(rows * 48 + 1, np.int32)
    padded[: len(ids)] = ids
    assert windows == {row.tobytes() for row in padded[:-1].reshape(rows, 48)}
    assert sum(batch["weights"].sum() for batch in epoch) == len(ids) - 1


# ---- packed documents ----


@pytest.fixture(params=["memory", "disk"])
def packed(request, corpus, tokenized):
    if request.param == "memory":
        return TextData(corpus, packing="pack", held_out_fraction=0.2)
    return TextData(tokenized, packing="pack")


def segments_of(batch):
    """Each segment's inputs, targets and weights."""
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segment_ids"][row].max() + 1):
            inside = batch["segment_ids"][row] == segment
            yield tuple(batch[key][row][inside] for key in ("tokens", "targets", "weights"))


def test_segments_are_numbered_from_one_and_padding_is_last(packed):
    for batch in take(packed.train_batches(8, 48, seed=0), 20):
        for ids, weights in zip(batch["segment_ids"], batch["weights"]):
            real = ids[ids > 0]
            assert (ids[: len(real)] == real).all() and not weights[ids == 0].any()
            assert (np.unique(real) == np.arange(1, real.max() + 1)).all() and (np.diff(real) >= 0).all()


def test_no_target_crosses_a_document(packed):
    """Every counted target is the next token of the same piece of the same document."""
    for side, batches in (
        (TRAIN, take(packed.train_batches(8, 48, seed=0), 20)),
        (HELD_OUT, packed.evaluation_batches(8, 48)),
    ):
        pieces = set()
        for document in documents_of(packed, side):
            ids = [SEPARATOR, *document, SEPARATOR]
            pieces |= {tuple(ids[start : start + 49]) for start in range(0, len(ids) - 1, 48)}
        crossings = 0
        for tokens, targets, weights in itertools.chain.from_iterable(map(segments_of, batches)):
            # Every target counts but that of a piece's last token, which only a full row has no room for.
            full = len(tokens) == 48 and weights.all()
            assert full or (weights[:-1].all() and weights[-1] == 0) or weights.all()
            spoken = tuple(tokens[:1]) + tuple(targets[weights > 0])
            assert spoken in pieces
            crossings += int(weights[-1] == 0)
        assert crossings > 10


def test_short_documents_are_not_cut(packed):
    """Whatever fits a row is in one segment, from separator to separator."""
    short = {document for document in documents_of(packed, HELD_OUT) if len(document) <= 47}
    found = [
        bytes(targets[weights > 0][:-1].astype(np.uint8))
        for batch in packed.evaluation_batches(8, 48)
        for _, targets, weights in segments_of(batch)
        if targets[weights > 0][-1] == SEPARATOR
    ]
    assert len(short) > 10 and all(found.count(document) == 1 for document in short)


def test_packing_fills_the_rows(packed):
    batches = take(packed.train_batches(8, 256, seed=0), 30)
    assert np.mean([batch["segment_ids"] > 0 for batch in batches]) > 0.9


# ---- order ----


def test_order_follows_the_seed_alone(data):
    first, again, other = (take(data.train_batches(4, 48, seed=seed), 30) for seed in (1, 1, 2))
    assert all(map(same, first, again))
    assert not any(map(same, first, other))


def test_every_epoch_has_every_row_in_another_order(corpus):
    data = TextData(corpus, held_out_fraction=0.2)
    tokens = data.splits[TRAIN]
    rows = -(-(len(tokens) - 1) // 48)
    stream = [batch["tokens"].tobytes() for batch in take(data.train_batches(1, 48, seed=0), 3 * rows)]
    epochs = [stream[start : start + rows] for start in range(0, 3 * rows, rows)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    # Neighbouring seeds do not share epochs.
    other = [batch["tokens"].tobytes() for batch in take(data.train_batches(1, 48, seed=1), rows)]
    assert other not in epochs


def test_evaluation_is_always_the_same(data):
    first, again = (list(data.evaluation_batches(4, 48)) for _ in range(2))
    assert len(first) > 3 and all(map(same, first, again))


# ---- processes ----


def part_of(batch, index, count):
    """The rows of the i-th of n processes: one part of the batch after the other."""
    return {key: np.split(array, count)[index] for key, array in batch.items()}


@pytest.mark.parametrize("process_count", [2, 3])
@pytest.mark.parametrize("mask", [False, True])
def test_shards_of_windows_make_up_the_global_batch(corpus, process_count, mask):
    """Also across epochs, which no number of processes divides here, and down to the masked tokens."""
    data = TextData(corpus, held_out_fraction=0.2)
    transforms = (next_token_targets, *[mask_inputs(0.15)] * mask)
    whole = data.train_batches(6, 48, seed=0, transforms=transforms)
    shards = [
        data.train_batches(6, 48, 0, index, process_count, transforms) for index in range(process_count)
    ]
    steps = 3 * len(data.splits[TRAIN]) // (6 * 48)
    for batch, *parts in take(zip(whole, *shards), steps):
        for index, part in enumerate(parts):
            assert same(part, part_of(batch, index, process_count))


def test_shards_of_mqar_make_up_the_global_batch():
    for examples in (None, 25):
        task = MQAR(vocab_size=64, num_train_examples=examples)
        shards = [task.train_batches(6, 64, 0, index, 2) for index in range(2)]
        for batch, *parts in take(zip(task.train_batches(6, 64, 0), *shards), 20):
            for index, part in enumerate(parts):
                assert same(part, part_of(batch, index, 2))


@pytest.mark.parametrize("process_count", [2, 4])
def test_shards_of_packed_documents_make_up_the_global_batch(tmp_path, process_count):
    """Every process packs all documents, so a row does not depend on how many there are."""
    data = TextData(write_corpus(tmp_path / "corpus", 1501), packing="pack")
    shards = [data.train_batches(8, 64, 0, index, process_count) for index in range(process_count)]
    for batch, *parts in take(zip(data.train_batches(8, 64, 0), *shards), 40):
        for index, part in enumerate(parts):
            assert same(part, part_of(batch, index, process_count))


def test_packed_documents_are_seen_equally_often(tmp_path):
    """None is seen twice in an epoch, and in the end all as often."""
    data = TextData(write_corpus(tmp_path / "corpus", 1501), packing="pack")
    short = {document for document in documents_of(data, TRAIN) if len(document) < 40}
    steps_per_epoch = len(data.splits[TRAIN]) // (32 * 64)
    early, seen = collections.Counter(), collections.Counter()
    for step, batch in enumerate(take(data.train_batches(32, 64, 0), 4 * steps_per_epoch)):
        spoken = [targets[weights > 0] for _, targets, weights in segments_of(batch)]
        whole = [bytes(ids[:-1].astype(np.uint8)) for ids in spoken if ids[-1] == SEPARATOR]
        seen.update(whole)
        early.update(whole if step < 0.8 * steps_per_epoch else [])
    assert len(short) > 300
    early_counts, counts = ([counter[document] for document in short] for counter in (early, seen))
    assert max(early_counts) == 1 and sum(early_counts) > len(short) / 2
    assert max(counts) - min(counts) <= 2 and min(counts) >= 2


@pytest.mark.parametrize("process_count", [2, 4])
def test_evaluation_shards_make_up_the_whole(data, process_count):
    whole = list(data.evaluation_batches(8, 48))
    shards = [
        list(data.evaluation_batches(8, 48, None, index, process_count)) for index in range(process_count)
    ]
    for index, shard in enumerate(shards):
        assert len(shard) == len(whole)
        for batch, part in zip(whole, shard):
            assert same(part, part_of(batch, index, process_count))


# ---- restart ----

RESUMED = {
    **{f"{where}-{packing}": (where, packing) for where, packing in MODES},
    "mqar-endless": None,
    "mqar-finite": 25,
}


@pytest.mark.parametrize("mode", RESUMED)
@pytest.mark.parametrize("process", [(0, 1), (1, 2)], ids=["alone", "second-of-two"])
def test_restart_continues_with_the_next_batch(corpus, tokenized, mode, process):
    """From states taken at the start, within epochs and beyond several of them, through JSON."""

    def batches():
        if mode.startswith("mqar"):
            return MQAR(vocab_size=64, num_train_examples=RESUMED[mode]).train_batches(4, 64, 0, *process)
        where, packing = RESUMED[mode]
        data = TextData(tokenized if where == "disk" else corpus, packing=packing)
        return data.train_batches(4, 64, 0, *process, transforms=(next_token_targets, mask_inputs(0.15)))

    steps = 160
    uninterrupted, states = [], []
    stream = batches()
    for _ in range(steps):
        states.append(json.dumps(stream.get_state()))
        uninterrupted.append(next(stream))
    for stop in (0, 1, 17, 63, steps - 5):
        resumed = batches()
        resumed.set_state(json.loads(states[stop]))
        assert json.dumps(resumed.get_state()) == states[stop]
        assert all(map(same, uninterrupted[stop : stop + 5], resumed))
        # An iterator that is under way can be set back as well.
        resumed.set_state(json.loads(states[3]))
        assert same(next(resumed), uninterrupted[3])


@pytest.mark.parametrize("packing", ["concatenate", "pack"])
def test_restart_through_orbax(corpus, tmp_path, packing):
    data = TextData(corpus, packing=packing)
    stream = data.train_batches(4, 64, seed=0)
    take(stream, 23)
    with ocp.CheckpointManager(tmp_path / "run") as manager:
        manager.save(23, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(stream)))
        manager.wait_until_finished()
        resumed = TextData(corpus, packing=packing).train_batches(4, 64, seed=0)
        manager.restore(23, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed)))
    assert all(map(same, take(stream, 10), take(resumed, 10)))


# ---- transforms ----


def test_masking_hides_the_fraction_and_nothing_else(data):
    plain = take(data.train_batches(8, 48, seed=0), 100)
    masked = take(data.train_batches(8, 48, 0, transforms=(next_token_targets, mask_inputs(0.15))), 100)
    hidden = 0
    for before, after in zip(plain, masked):
        changed = before["tokens"] != after["tokens"]
        assert (after["tokens"][changed] == MASK).all()
        assert same(before | {"tokens": after["tokens"]}, after)
        hidden += changed.sum()
    # A binomial count: five standard deviations around the mean.
    total = 100 * 8 * 48
    assert abs(hidden - 0.15 * total) < 5 * (total * 0.15 * 0.85) ** 0.5


def test_masks_differ_between_rows_epochs_and_seeds(tmp_path):
    (tmp_path / "x.txt").write_text("the same row in every epoch " * 4)
    data = TextData(str(tmp_path))
    transforms = (next_token_targets, mask_inputs(0.5))
    rows = [
        (batch["tokens"] == MASK).tobytes()
        for seed in (0, 1)
        for batch in take(data.train_batches(1, 200, seed, transforms=transforms), 10)
    ]
    assert len(set(rows)) == 20


def test_misplaced_transforms_are_refused(corpus):
    data = TextData(corpus)
    for transforms, message in {
        (mask_inputs(0.1), next_token_targets): "mask_inputs comes after next_token_targets",
        (next_token_targets, next_token_targets): "has targets already",
        (): "begin with next_token_targets",
    }.items():
        with pytest.raises(InputError, match=message):
            next(data.train_batches(2, 16, 0, transforms=transforms))
        with pytest.raises(InputError, match=message):
            next(data.evaluation_batches(2, 16, transforms))
    with pytest.raises(InputError, match="no mask token"):
        next(MQAR(vocab_size=64).train_batches(2, 64, 0, transforms=(mask_inputs(0.1),)))
    with pytest.raises(InputError, match="expected 0 to 1"):
        mask_inputs(15)


# ---- the smallest and the wrong ----


def test_reading_ahead_is_bounded(tokenized):
    """A few batches: Grain's default of 500 would hold gigabytes of long sequences."""
    data = TextData(tokenized)
    reads = []

    class Counted:
        def __len__(self):
            return len(tokens)

        def read(self, start, stop):
            reads.append(start)
            return tokens.read(start, stop)

    tokens, data.splits = data.splits[TRAIN], {TRAIN: Counted()}
    take(data.train_batches(2, 16, seed=0), 3)
    time.sleep(0.3)  # for the readers to get as far as they will
    assert 3 * 2 <= len(reads) <= (3 + 2 * data.reader_threads) * 2


def test_standard_library_by_default():
    data = TextData()
    batch = next(data.train_batches(2, 256, seed=0))
    text = data.tokenizer.decode(batch["tokens"][0])
    assert len(text) > 200 and 0.99 < data.bytes_per_token < 1.0
    assert not set(documents_of(data, TRAIN)) & (set(documents_of(data, HELD_OUT)) - {b""})


def test_vocabulary_is_known_without_reading():
    assert TextData("/nowhere/at/all").vocab_size == 258


@pytest.mark.parametrize("packing", ["concatenate", "pack"])
def test_corpus_smaller_than_a_row(tmp_path, packing):
    (tmp_path / "x.txt").write_text("tiny corpus")
    data = TextData(str(tmp_path), packing=packing, held_out_fraction=0.3)
    for batch in take(data.train_batches(2, 100, seed=0), 3):
        assert batch["tokens"].shape == (2, 100) and batch["weights"].any(axis=1).all()
    (batch,) = data.evaluation_batches(4, 100)
    assert batch["weights"].sum() == len(documents_of(data, HELD_OUT)[0]) + 1


def test_bad_inputs_are_refused(corpus, tmp_path):
    data = TextData(corpus)
    (tmp_path / "empty.txt").write_text("")
    for make, message in {
        lambda: data.train_batches(7, 16, 0, 0, 2): "batch_size 7 is not divisible by the 2 processes.* 8",
        lambda: data.evaluation_batches(7, 16, None, 0, 2): "not divisible",
        lambda: data.train_batches(0, 16, 0): "at least 1",
        lambda: data.train_batches(2, 0, 0): "at least 1",
        lambda: data.train_batches(2, 16, -1): "data seed is -1",
        lambda: data.train_batches(2, 16, 2**32): "data seed",
        lambda: data.train_batches(2, 16, 0, 2, 2): "process_index is 2",
        lambda: TextData(corpus, packing="packed"): "packing is 'packed'; did you mean 'pack'",
        lambda: TextData(corpus, tokenizer="bites"): "did you mean 'bytes'",
        lambda: TextData(corpus, held_out_fraction=1.0): "less than 1",
        lambda: TextData(corpus, held_out_fraction=0.0): "more than 0",
        lambda: TextData(str(tmp_path)).train_batches(2, 16, 0): "corpus is empty",
        lambda: TextData([]).train_batches(2, 16, 0): "no paths",
        lambda: TextData(corpus + "s").bytes_per_token: "no such file",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            make()
        assert "\n" not in str(error.value)


def test_the_fingerprint_is_of_the_tokens(corpus, tmp_path):
    """The same for the same texts, in memory and on disk; another when a byte of them changes, the length does not."""
    other = shutil.copytree(corpus, tmp_path / "other")
    file = sorted(file for file in other.iterdir() if file.stat().st_size > 1000)[0]
    file.write_text(file.read_text()[:-1] + "!")
    found = []
    for texts in (corpus, corpus, str(other)):
        folder = str(tmp_path / f"tokens-{len(found)}")
        tokenize_corpus([texts], folder, held_out_fraction=0.2, shard_tokens=8192)
        found.append([TextData(texts, held_out_fraction=0.2).fingerprint, TextData(folder).fingerprint])
    assert found[0] == found[1]
    assert all(before != after for before, after in zip(found[1], found[2]))
