"""What each synthetic task draws: invariants of 1,000 examples, and their distributions by chi-squared."""

import itertools

import numpy as np
import pytest

from seqmodels.data import (
    BigramBackcopy,
    InductionHeads,
    LinearRegression,
    ListOps,
    MADCompression,
    MADFuzzyRecall,
    MADInContextRecall,
    MADMemorization,
    MADNoisyRecall,
    MADSelectiveCopying,
    SelectiveCopying,
)
from seqmodels.data.synthetic.linear_regression import gradient_step_predictions, pairs_of, ridge_predictions
from seqmodels.data.synthetic.listops import CLOSE, OPERATORS, PADDING, SYMBOLS
from seqmodels.errors import InputError
from tests.tasks import assert_follows

EXAMPLES = 1000


def training(task, seq_len, count=EXAMPLES):
    return next(task.train_batches(count, seq_len, seed=0))


def held_out(task, seq_len):
    return next(task.evaluation_batches(EXAMPLES, seq_len))


def uniform(ids, low, high):
    """Integers that are uniform over low .. high - 1, and no others."""
    ids = np.ravel(ids)
    assert ids.min() >= low and ids.max() < high
    counts = np.bincount(ids - low, minlength=high - low)
    assert_follows(counts, np.ones(high - low))
    assert len(ids) < 20 * (high - low) or counts.min() > 0


# ---- MAD ----


@pytest.mark.parametrize(("make", "values"), [(MADInContextRecall, 8), (MADNoisyRecall, 8)])
@pytest.mark.parametrize("seq_len", [63, 64])
def test_recall(make, values, seq_len):
    for batch, masked in ((training(make(), seq_len), False), (held_out(make(), seq_len), True)):
        for tokens, targets, weights in zip(batch["tokens"], batch["targets"], batch["weights"]):
            slots = np.append(tokens, targets[-1])[: 2 * ((seq_len + 1) // 2)].reshape(-1, 2)
            is_pair = (slots < 2 * values).all(axis=1)
            assert ((slots[is_pair] < values) == [True, False]).all() and (slots[~is_pair] >= 2 * values).all()
            assert is_pair[-1] and slots[-1, 0] in slots[:-1, 0][is_pair[:-1]]
            value_of = dict(slots[is_pair])
            assert all(value_of[key] == value for key, value in slots[is_pair])
            seen = [is_pair[i] and key in slots[:i, 0][is_pair[:i]] for i, key in enumerate(slots[:, 0])]
            expected = np.zeros(seq_len)
            expected[0::2] = seen[: len(expected[0::2])]
            last = seq_len if seq_len % 2 else seq_len - 1
            assert (weights == (expected if masked else np.arange(seq_len) < last)).all()
            assert (targets[:-1] == tokens[1:]).all()


def test_recall_draws_uniform_keys_and_values():
    batch = training(MADInContextRecall(), 63)
    uniform(batch["tokens"][:, 0:-1:2], 0, 8)  # but the last
    uniform(batch["tokens"][:, 1], 8, 16)


def test_noise_takes_a_fifth_of_the_slots():
    tokens = training(MADNoisyRecall(), 63)["tokens"][:, :62]
    noisy = tokens >= 16
    assert (noisy[:, 0::2] == noisy[:, 1::2]).all()
    assert_follows([noisy[:, 0::2].sum(), (~noisy[:, 0::2]).sum()], [0.2, 0.8])
    uniform(tokens[noisy], 16, 32)


def motifs(tokens, half, padding):
    """Keys and values of a row, in order; padding stands in front alone."""
    kept = tokens[tokens != padding]
    assert (tokens[len(tokens) - len(kept) :] == kept).all()
    groups = [tuple(group) for _, group in itertools.groupby(kept.tolist(), key=lambda token: token < half)]
    assert groups[0][0] < half and len(groups) % 2 == 0
    return groups[0::2], groups[1::2]


def test_fuzzy_recall():
    lengths = {"train": [], "held out": [], "values": []}
    for split, batch in (("train", training(MADFuzzyRecall(), 63)), ("held out", held_out(MADFuzzyRecall(), 63))):
        for tokens, targets, weights in zip(batch["tokens"], batch["targets"], batch["weights"]):
            keys, values = motifs(np.append(tokens, targets[-1]), 7, 15)
            assert all(1 <= len(motif) == len(set(motif)) <= 3 for motif in keys + values)
            assert all(dict(zip(keys, values))[key] == value for key, value in zip(keys, values))
            assert keys[-1] in keys[:-1]
            answer = len(values[-1])
            expected = np.arange(63) >= 63 - answer if split == "held out" else targets != 15
            assert (weights == expected).all()
            lengths[split].append(len(keys[0]))
            lengths["values"].append(len(values[0]))
    assert_follows(np.bincount(lengths["train"])[1:], np.ones(3))
    assert set(lengths["held out"]) == {3}
    assert_follows(np.bincount(lengths["values"])[1:], np.ones(3))


def test_memorization():
    task = MADMemorization()
    batch = training(task, 32)
    keys, answers = batch["tokens"][:, 0::2], batch["targets"][:, 1::2]
    uniform(keys[:256], 0, 127)  # more are rows of the next epochs
    assert (batch["tokens"][:, 1::2] == 255).all() and (batch["weights"] == [0, 1] * 16).all()
    assert len(set(task.values)) == 127 and task.values.min() >= 127 and task.values.max() < 255
    assert (answers == task.values[keys]).all()
    assert (MADMemorization(seed=5).values == task.values).all()
    assert (MADMemorization(map_seed=5).values != task.values).any()


def test_compression():
    batch = training(MADCompression(), 32)
    uniform(batch["tokens"][:, :-1], 0, 15)
    assert (batch["tokens"][:, -1] == 15).all() and (batch["weights"][:, -1] == 0).all()
    assert (batch["targets"][:, :-1] == batch["tokens"][:, :-1]).all() and batch["weights"][:, :-1].all()


def test_noise_of_compression_has_no_weight():
    batch = training(MADCompression(vocab_size=24, noise_vocab_size=8, noise=0.25), 32)
    noisy = batch["tokens"] >= 15
    assert (batch["weights"] == ~noisy).all()
    assert_follows([noisy[:, :-1].sum(), (~noisy[:, :-1]).sum()], [0.25, 0.75])
    uniform(batch["tokens"][:, :-1][noisy[:, :-1]], 15, 23)


# ---- copying and induction ----


@pytest.mark.parametrize(
    ("task", "blank", "ids", "cues"),
    [
        (MADSelectiveCopying(num_tokens=8), 14, (0, 14), [15] + [14] * 8),
        (SelectiveCopying(num_tokens=8), 0, (1, 15), [15] * 8),
    ],
    ids=["mad", "mamba"],
)
def test_selective_copying(task, blank, ids, cues):
    batch = training(task, 40)
    before = 40 - len(cues)
    context = batch["tokens"][:, :before]
    assert (batch["tokens"][:, before:] == cues).all()
    assert (batch["weights"] == (np.arange(40) >= 32)).all()
    assert ((context != blank).sum(axis=1) == 8).all()
    assert (context[context != blank].reshape(-1, 8) == batch["targets"][:, 32:]).all()
    uniform(batch["targets"][:, 32:], *ids)
    # Every place equally often, the one right before the cue too.
    assert_follows((context != blank).sum(axis=0), np.ones(before))


def test_induction_heads():
    batch = training(InductionHeads(), 32)
    is_prefix = batch["tokens"] == 15
    assert (is_prefix.sum(axis=1) == 2).all() and is_prefix[:, -1].all()
    assert (batch["weights"] == (np.arange(32) == 31)).all()
    place = is_prefix.argmax(axis=1)
    uniform(place, 0, 30)
    assert (batch["targets"][:, -1] == batch["tokens"][np.arange(EXAMPLES), place + 1]).all()
    uniform(batch["targets"][:, -1], 0, 15)


# ---- Bigram-Backcopy ----


@pytest.fixture(scope="module")
def bigrams():
    return BigramBackcopy()


def test_backcopy(bigrams):
    batch = training(bigrams, 64)
    tokens, targets = batch["tokens"], batch["targets"]
    assert batch["weights"].all() and (targets[:, :-1] == tokens[:, 1:]).all()
    assert (tokens[:, 0] == 64).all() and (tokens[:, 1:] < 64).all() and (tokens[:, 1] >= 3).all()
    trigger = tokens < 3
    assert trigger.mean() > 0.1 and not (trigger[:, 1:] & trigger[:, :-1]).any()
    before = np.roll(tokens, 1, axis=1)
    assert (targets[trigger] == before[trigger]).all()
    after = bigrams.probabilities
    assert np.allclose(after.sum(axis=1), 1) and not after[64, :3].any()
    # The first character, and what follows the most frequent one that is no trigger; rare ones together.
    for drawn, probabilities in ((tokens[:, 1], after[64]), (targets[tokens == 3], after[3])):
        counts = np.bincount(drawn, minlength=65)
        frequent = probabilities * counts.sum() > 10
        assert not counts[probabilities == 0].any()
        assert_follows(
            [*counts[frequent], counts[~frequent].sum()], [*probabilities[frequent], probabilities[~frequent].sum()]
        )


def test_bigrams_are_counted_within_documents(tmp_path):
    (tmp_path / "a.txt").write_text("abab\x01ac")
    (tmp_path / "b.txt").write_text("aac")
    task = BigramBackcopy(str(tmp_path), num_characters=3, num_triggers=1)
    # a, five times, then b and c, twice each. The other byte is left out, so that b is followed by a twice.
    a, b, c, start = task.probabilities
    assert a.tolist() == [1 / 5, 2 / 5, 2 / 5, 0] and b.tolist() == [1, 0, 0, 0]
    assert c.tolist() == [5 / 9, 2 / 9, 2 / 9, 0] and start.tolist() == [0, 1 / 2, 1 / 2, 0]
    (tmp_path / "b.txt").write_text("aaac")
    assert BigramBackcopy(str(tmp_path), num_characters=3, num_triggers=1).fingerprint != task.fingerprint


def test_a_text_of_triggers_alone_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abab")
    with pytest.raises(InputError, match="the text has 2 different bytes; expected more than num_triggers = 2"):
        BigramBackcopy(str(tmp_path), num_characters=3, num_triggers=2).train_batches(1, 8, 0).__next__()


# ---- ListOps ----


def test_expressions():
    batch = training(ListOps(), 64)
    assert (batch["weights"] == (np.arange(64) == 63)).all() and (batch["targets"][:, -1] < 10).all()
    operators = []
    for tokens in batch["tokens"]:
        kept = tokens[tokens != PADDING]
        assert 16 <= len(kept) <= 64 and (tokens[-len(kept) :] == kept).all()
        depth, arguments = 1, [0]
        for token in kept:
            if token == CLOSE:
                assert 2 <= arguments.pop() <= 10
                depth -= 1
            else:
                arguments[-1] += 1
                if token in OPERATORS:
                    assert depth < 10
                    depth += 1
                    arguments.append(0)
        assert arguments == [1]
        operators += kept[np.isin(kept, OPERATORS)].tolist()
    uniform(operators, OPERATORS.start, OPERATORS.stop)
    # The answers: SM evens them out, MIN and MAX do not; none is rare, and none is half.
    share = np.bincount(batch["targets"][:, -1], minlength=10) / EXAMPLES
    assert share.min() > 0.02 and share.max() < 0.35


def test_nodes_without_a_bound_on_the_length():
    task, random = ListOps(max_depth=2, max_args=5), np.random.default_rng(0)
    drawn = [task.expression(random, 10**6, operator=False) for _ in range(4 * EXAMPLES)]
    operations = [expression for expression in drawn if len(expression) > 1]
    assert_follows([len(drawn) - len(operations), len(operations)], [0.75, 0.25])
    uniform([len(expression) - 2 for expression in operations], 2, 6)
    uniform([token for expression in drawn for token in expression if token < 10], 0, 10)


def test_long_expressions():
    task = ListOps(min_length=500)
    lengths = [(row != PADDING).sum() for row in training(task, 2000, 50)["tokens"]]
    assert min(lengths) >= 500 and max(lengths) > 1000
    assert "".join(SYMBOLS[:10]) == "0123456789" and task.vocab_size == 16


def test_lengths_that_do_not_come_up_end_in_an_error(monkeypatch):
    monkeypatch.setattr("seqmodels.data.synthetic.listops.MAX_DRAWS", 100)
    with pytest.raises(InputError, match="none of 100 expressions has 99999 to 100000 tokens"):
        ListOps(min_length=99_999).example(100_000, np.random.default_rng(0))


# ---- linear regression ----


def test_regression_draws():
    batch = training(LinearRegression(noise=0.5), 31)
    tokens, targets, weights = batch["tokens"], batch["targets"], batch["weights"]
    assert (weights == (np.arange(31) % 2 == 0)).all() and not targets[weights == 0].any()
    assert not tokens[:, 0::2, -1].any() and not tokens[:, 1::2, :-1].any()
    assert (tokens[:, 1::2, -1] == targets[:, 0:-1:2]).all()
    xs, ys = pairs_of(tokens, targets)
    # Means and variances within five standard deviations.
    assert abs(xs.mean()) < 5 / xs.size**0.5 and abs(xs.var() - 1) < 5 * (2 / xs.size) ** 0.5
    assert abs(ys.var() - 1.25) < 5 * 1.25 * (2 / EXAMPLES) ** 0.5


def test_ridge_is_exact_without_noise():
    batch = training(LinearRegression(dim=4, noise=0.0), 31)
    xs, ys = pairs_of(batch["tokens"], batch["targets"])
    predictions = ridge_predictions(xs, ys, 0.0)
    # The numbers are rounded to float32: errors grow with the condition of the first four x.
    assert np.median(np.abs(predictions - ys)[:, 4]) < 1e-5 and np.abs(predictions - ys)[:, 8:].max() < 1e-3
    assert np.median(np.abs(predictions - ys)[:, 3]) > 0.1


def test_ridge_is_the_best_of_its_kind():
    """Another strength of the penalty, either way, has a larger loss."""
    batch = training(LinearRegression(noise=0.5), 47, 4000)
    xs, ys = pairs_of(batch["tokens"], batch["targets"])
    risks = [((ridge_predictions(xs, ys, noise) - ys) ** 2)[:, 4:].mean() for noise in (0.3, 0.5, 0.8)]
    assert risks[1] < risks[0] and risks[1] < risks[2]


def test_gradient_step_has_the_risk_of_theory():
    """With n pairs: 1 + s^2 - (n - 1) / (n + d + d s^2), and no other rate has less."""
    dim, noise = 4, 0.5
    batch = training(LinearRegression(dim=dim, noise=noise), 47, 20_000)
    xs, ys = pairs_of(batch["tokens"], batch["targets"])
    errors = (gradient_step_predictions(xs, ys, noise) - ys) ** 2
    best = ((ridge_predictions(xs, ys, noise) - ys) ** 2).mean(axis=0)
    for n in (2, 8, 23):
        expected = 1 + noise**2 - (n - 1) / (n + dim + dim * noise**2)
        spread = errors[:, n].std() / len(errors) ** 0.5
        assert abs(errors[:, n].mean() - expected) < 5 * spread
        assert best[n] < errors[:, n].mean() < (ys[:, n] ** 2).mean()
        rate = n / (n + dim + dim * noise**2)
        for other in (0.8 * rate, 1.2 * rate):
            assert ((gradient_step_predictions(xs, ys, noise, other) - ys) ** 2)[:, n].mean() > errors[:, n].mean()


# ---- wrong arguments ----


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MADInContextRecall(vocab_size=1), "vocab_size is 1, of which 1 are ids of data; keys and values need"),
        (lambda: MADInContextRecall(noise=0.2), "noise_vocab_size is 0; expected 1 or more"),
        (lambda: MADNoisyRecall(noise=1.0), "noise is 1.0; expected at least 0 and less than 1"),
        (lambda: MADNoisyRecall(vocab_size=16), "vocab_size is 16, of which 0 are ids of data"),
        (lambda: MADFuzzyRecall(motif_size=0), "motif_size is 0; expected 1 or more"),
        (lambda: MADFuzzyRecall(motif_size=8), "motifs of 8 different keys, or values, need at least 16"),
        (lambda: MADMemorization(vocab_size=2), "vocab_size is 2, of which 1 are ids of data"),
        (lambda: MADMemorization(map_seed=-1), "map_seed is -1; expected 0 or more"),
        (lambda: MADCompression(vocab_size=1), "vocab_size is 1, of which 0 are ids of data; tokens need at least 1"),
        (lambda: MADCompression(noise=-0.1), "noise is -0.1; expected at least 0"),
        (lambda: MADSelectiveCopying(num_tokens=0), "num_tokens is 0; expected 1 or more"),
        (lambda: MADSelectiveCopying(vocab_size=2), "of which 0 are ids of data; tokens need at least 1"),
        (lambda: SelectiveCopying(num_tokens=0), "num_tokens is 0; expected 1 or more"),
        (lambda: SelectiveCopying(vocab_size=2), "vocab_size is 2; expected 3 or more"),
        (lambda: InductionHeads(vocab_size=1), "vocab_size is 1; expected 2 or more"),
        (
            lambda: BigramBackcopy(num_triggers=0),
            "num_triggers is 0 and num_characters 64; expected at least one trigger",
        ),
        (lambda: BigramBackcopy(num_characters=3), "num_triggers is 3 and num_characters 3"),
        (lambda: BigramBackcopy(num_characters=257), "and no more than 256"),
        (lambda: BigramBackcopy("/nowhere").probabilities, "no such file or folder: /nowhere"),
        (lambda: ListOps(max_depth=1), "max_depth is 1; expected 2 or more"),
        (lambda: ListOps(max_args=1), "max_args is 1; expected 2 or more"),
        (lambda: ListOps(min_length=0), "min_length is 0; expected 1 or more"),
        (lambda: ListOps(min_length=50).check_length(40), "min_length is 50 with seq_len 40; expected at most that"),
        (lambda: ListOps(max_depth=2, max_args=3).check_length(64), "and at most 5, the longest expression of depth 2"),
        (lambda: LinearRegression(dim=0), "dim is 0; expected 1 or more"),
        (lambda: LinearRegression(noise=-1.0), "noise is -1.0; expected 0 or more"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(InputError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)
