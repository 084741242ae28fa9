"""The synthetic tasks at small sizes, each with an oracle that solves it, for the tests of all of them."""

import re
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from seqmodels.data import (
    MQAR,
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
    NeedleInAHaystack,
    Passkey,
    SelectiveCopying,
)
from seqmodels.data.synthetic._task import SyntheticTask
from seqmodels.data.synthetic.listops import SYMBOLS

# Of the tokens of a row: what the oracle says at each position, None where it says nothing.
Oracle = Callable[[np.ndarray], list[Any]]


class Case(NamedTuple):
    """A task at one size.

    oracle   makes the oracle of the task
    chance   accuracy of the best constant answer; None where answers are text, or not uniform
    """

    make: Callable[..., SyntheticTask]
    seq_len: int
    oracle: Callable[[SyntheticTask], Oracle]
    chance: float | None


def recall(task: MADInContextRecall) -> Oracle:
    """The value that a key had last."""

    def oracle(tokens: np.ndarray) -> list[Any]:
        known, said = {}, []
        for key, value in zip(tokens[0::2], [*tokens[1::2], None]):
            said += [known.get(key), None]
            known[key] = value
        return said[: len(tokens)]

    return oracle


def fuzzy_recall(task: MADFuzzyRecall) -> Oracle:
    """Keys are of the first half of the data, so it is plain where a motif begins."""
    half = (task.vocab_size - 1) // 2

    def oracle(tokens: np.ndarray) -> list[Any]:
        known: dict[tuple, tuple] = {}
        said, key, value = [], (), ()
        for token in tokens.tolist():
            if token < half:
                if value:
                    known.setdefault(key, value)
                    key, value = (), ()
                key += (token,)
            elif token < task.vocab_size - 1:
                value += (token,)
            of_key = known.get(key, ())
            said.append(of_key[len(value)] if len(of_key) > len(value) else None)
        return said

    return oracle


def memorization(task: MADMemorization) -> Oracle:
    """What the training examples say of each key."""
    batch = next(task.train_batches(1000, 32, seed=0))
    known = {}
    for tokens, targets in zip(batch["tokens"], batch["targets"]):
        known |= dict(zip(tokens[0::2], targets[1::2]))
    return lambda tokens: [None, *(known.get(key) for key in tokens[:-1])]


def copying(blank: int, cue: int) -> Callable[[SyntheticTask], Oracle]:
    """The data in their order, at the end."""

    def oracle(tokens: np.ndarray) -> list[Any]:
        data = [token for token in tokens if token not in (blank, cue)]
        return [None] * (len(tokens) - len(data)) + data

    return lambda task: oracle


def induction(task: InductionHeads) -> Oracle:
    def oracle(tokens: np.ndarray) -> list[Any]:
        place = tokens.tolist().index(task.vocab_size - 1)
        return [None] * (len(tokens) - 1) + [tokens[place + 1]]

    return oracle


def mqar(task: MQAR) -> Oracle:
    def oracle(tokens: np.ndarray) -> list[Any]:
        context = 2 * task.num_kv_pairs
        known = dict(zip(tokens[0:context:2], tokens[1:context:2]))
        return [None] * context + [known.get(token) for token in tokens[context:]]

    return oracle


def backcopy(task: BigramBackcopy) -> Oracle:
    """What follows a trigger; the rest is chance."""

    def oracle(tokens: np.ndarray) -> list[Any]:
        return [None if token >= task.num_triggers else tokens[i - 1] for i, token in enumerate(tokens)]

    return oracle


def listops(task: ListOps) -> Oracle:
    """A recursive descent."""
    operations = {
        "[MIN": min,
        "[MAX": max,
        "[MED": lambda arguments: int(statistics.median(arguments)),
        "[SM": lambda arguments: sum(arguments) % 10,
    }

    def node(words: Iterator[str]) -> int | None:
        word = next(words)
        if word == "]":
            return None
        if word.isdigit():
            return int(word)
        arguments = []
        while (argument := node(words)) is not None:
            arguments.append(argument)
        return operations[word](arguments)

    def oracle(tokens: np.ndarray) -> list[Any]:
        words = iter(SYMBOLS[token] for token in tokens if SYMBOLS[token] != "<pad>")
        answer = node(words)
        assert next(words, None) is None
        return [None] * (len(tokens) - 1) + [answer]

    return oracle


def finding(pattern: str) -> Callable[[SyntheticTask], Oracle]:
    """What a pattern finds in the prompt, byte by byte after the text's last "is", and the separator."""

    def make(task: SyntheticTask) -> Oracle:
        def oracle(tokens: np.ndarray) -> list[Any]:
            text = task.tokenizer.decode(tokens)
            answer = [*f" {re.search(pattern, text)[1]}".encode(), task.tokenizer.separator]
            # Places of bytes, behind the separator in front.
            start = text.encode().rindex(b" is ") + len(b" is")
            return [None] * start + answer + [None] * (len(tokens) - start - len(answer))

        return oracle

    return make


def text(task: MADCompression) -> Oracle:
    """The whole row may be looked at."""
    return lambda tokens: tokens.tolist()


CASES: dict[str, Case] = {
    "mqar": Case(lambda **more: MQAR(**{"vocab_size": 64, **more}, random_non_queries=False), 64, mqar, 1 / 32),
    "mad_in_context_recall": Case(MADInContextRecall, 63, recall, 1 / 8),
    "mad_noisy_recall": Case(MADNoisyRecall, 64, recall, 1 / 8),
    "mad_fuzzy_recall": Case(MADFuzzyRecall, 63, fuzzy_recall, 1 / 8),
    "mad_memorization": Case(MADMemorization, 32, memorization, 1 / 128),
    "mad_compression": Case(MADCompression, 32, text, 1 / 15),
    "mad_selective_copying": Case(MADSelectiveCopying, 48, copying(14, 15), 1 / 14),
    "induction_heads": Case(InductionHeads, 32, induction, 1 / 15),
    "selective_copying": Case(SelectiveCopying, 48, copying(0, 15), 1 / 14),
    "bigram_backcopy": Case(BigramBackcopy, 32, backcopy, None),
    "listops": Case(ListOps, 32, listops, None),
    "passkey": Case(Passkey, 400, finding(r"Remember it\. (\d+) is the pass key"), None),
    "s_niah_1": Case(NeedleInAHaystack, 700, finding(r"numbers for \S+ is: (\d{7})\."), None),
    "s_niah_2": Case(
        lambda **more: NeedleInAHaystack(level=2, **more), 700, finding(r"numbers for \S+ is: (\d{7})\."), None
    ),
    "s_niah_3": Case(
        lambda **more: NeedleInAHaystack(level=3, **more), 700, finding(r"uuids for \S+ is: ([0-9a-f-]{36})\."), None
    ),
}

NUMBERS = {"linear_regression": Case(LinearRegression, 31, None, None)}


def assert_follows(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Counts are draws from the probabilities: chi-squared within six standard deviations of its mean."""
    counts, probabilities = np.asarray(counts, float), np.asarray(probabilities, float)
    assert not counts[probabilities == 0].any()
    expected = counts.sum() * probabilities[probabilities > 0] / probabilities.sum()
    assert expected.min() > 4, "too few draws for chi-squared"
    statistic = ((counts[probabilities > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert statistic < freedom + 6 * (2 * freedom) ** 0.5, (statistic, freedom)
