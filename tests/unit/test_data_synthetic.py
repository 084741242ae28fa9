"""MQAR: what every example must satisfy, and what the distribution of its queries is."""

import itertools

import numpy as np
import pytest

from seqmodels.data import MQAR
from seqmodels.errors import InputError


def examples(task, seq_len, count):
    return next(task.train_batches(count, seq_len, seed=0))


def rows_of(batches):
    """The rows that count, as something to compare."""
    return [row.tobytes() for batch in batches for row in batch["tokens"][batch["weights"].any(axis=1)]]


@pytest.mark.parametrize(
    ("vocab_size", "pairs", "seq_len", "random_non_queries"),
    [(64, 8, 64, True), (8192, 64, 512, False), (18, 8, 32, True)],
)
def test_invariants(vocab_size, pairs, seq_len, random_non_queries):
    task = MQAR(vocab_size=vocab_size, num_kv_pairs=pairs, random_non_queries=random_non_queries)
    batch = examples(task, seq_len, 1000)
    half, context = vocab_size // 2, 2 * pairs
    assert batch["tokens"].min() >= 0 and batch["tokens"].max() < vocab_size
    for tokens, targets, weights in zip(batch["tokens"], batch["targets"], batch["weights"]):
        keys, values = tokens[0:context:2], tokens[1:context:2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert keys.min() >= 1 and keys.max() < half and values.min() >= half
        queries = np.flatnonzero(weights)
        assert len(queries) == pairs and queries.min() >= context and not (queries % 2).any()
        assert set(weights) == {0.0, 1.0}
        recalled = dict(zip(keys, values))
        assert sorted(tokens[queries]) == sorted(keys)
        assert [recalled[key] for key in tokens[queries]] == list(targets[queries])
        assert not targets[weights == 0].any()
        if not random_non_queries:
            assert not tokens[context:][weights[context:] == 0].any()


def test_first_query_follows_the_power_law():
    """The first key's gap is one draw from p(g), g + 1 to the power a - 1: chi-squared."""
    task = MQAR(vocab_size=64, num_kv_pairs=8, power_a=0.3)
    count, slots = 5_000, (64 - 16) // 2
    batch = examples(task, 64, count)
    late = batch["tokens"][:, 16::2] == batch["tokens"][:, :1]
    gaps = np.argmax(late & (batch["weights"][:, 16::2] > 0), axis=1)
    chance = np.arange(1, slots + 1) ** (0.3 - 1.0)
    expected = count * chance / chance.sum()
    statistic = ((np.bincount(gaps, minlength=slots) - expected) ** 2 / expected).sum()
    # Mean 23 and standard deviation 6.8 if the law holds; a uniform draw of the gaps gives more than 1,000.
    assert statistic < 23 + 6 * 6.8


def test_test_examples_are_fixed_and_apart_from_training():
    task = MQAR(vocab_size=64, num_train_examples=50, num_test_examples=30)
    first, again = (list(task.evaluation_batches(8, 64)) for _ in range(2))
    assert [batch["tokens"].shape for batch in first] == [(8, 64)] * 4
    assert all((a["tokens"] == b["tokens"]).all() for a, b in zip(first, again))
    assert sum(batch["weights"].sum() for batch in first) == 30 * 8
    held_out = set(rows_of(first))
    assert len(held_out) == len(rows_of(first)) == 30
    other_seed = MQAR(vocab_size=64, num_test_examples=30, seed=1)
    assert not held_out & set(rows_of(other_seed.evaluation_batches(8, 64)))
    assert not held_out & set(rows_of(itertools.islice(task.train_batches(10, 64, seed=0), 10)))


def test_a_finite_training_set_is_reshuffled_every_epoch_and_an_endless_one_never_repeats():
    finite = MQAR(vocab_size=64, num_train_examples=40)
    rows = rows_of(itertools.islice(finite.train_batches(10, 64, 3), 8))
    assert len(set(rows[:40])) == len(set(rows[40:])) == len(set(rows)) == 40
    assert rows[:40] != rows[40:]
    endless = MQAR(vocab_size=64)
    assert len(set(rows_of(itertools.islice(endless.train_batches(10, 64, 3), 8)))) == 80


def test_it_is_no_text():
    assert (
        MQAR().tokenizer is None and MQAR().bytes_per_token is None and MQAR(vocab_size=64).vocab_size == 64
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 63}, "even vocab_size"),
        ({"vocab_size": 16, "num_kv_pairs": 8}, "does not fit"),
        ({"num_kv_pairs": 0}, "at least 1 pair"),
        ({"num_train_examples": 0}, "num_train_examples is 0"),
        ({"num_test_examples": 0}, "num_test_examples 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_parameters_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        MQAR(**arguments)


@pytest.mark.parametrize("seq_len", [31, 30, 65])
def test_bad_lengths_are_refused(seq_len):
    with pytest.raises(InputError, match="even number of at least 32"):
        MQAR(vocab_size=64).train_batches(2, seq_len, 0)
