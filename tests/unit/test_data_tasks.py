"""Laws that hold for every synthetic task."""

import itertools
import json

import numpy as np
import pytest

from seqmodels.data import synthetic
from seqmodels.errors import InputError
from tests.tasks import CASES, NUMBERS

EXAMPLES = 1000
ALL = {**CASES, **NUMBERS}


def take(batches, count):
    return list(itertools.islice(batches, count))


def rows_of(batches):
    """The rows that count, as something to compare."""
    return [row.tobytes() for batch in batches for row in batch["tokens"][batch["weights"].any(axis=1)]]


def same(first, second):
    return first.keys() == second.keys() and all((first[key] == second[key]).all() for key in first)


@pytest.fixture(params=ALL)
def case(request):
    return ALL[request.param]


@pytest.fixture(params=CASES)
def of_ids(request):
    return CASES[request.param]


def test_every_task_is_here():
    assert {type(case.make()).__name__ for case in ALL.values()} == set(synthetic.__all__)


def test_batches_keep_their_contract(case):
    task = case.make()
    for batches in (task.train_batches(EXAMPLES, case.seq_len, 0), task.evaluation_batches(100, case.seq_len)):
        batch = next(batches)
        rows = len(batch["tokens"])
        assert {name: array.shape for name, array in batch.items()} == task.batch_shapes(rows, case.seq_len)
        assert all(array.dtype == task.dtypes[name] for name, array in batch.items())
        assert batch["weights"].any(axis=1).all() and set(np.unique(batch["weights"])) <= {0.0, 1.0}
        if task.input_size is None:
            for name in ("tokens", "targets"):
                assert batch[name].min() >= 0 and batch[name].max() < task.vocab_size


@pytest.mark.parametrize("longer", [1, 2, 61])
def test_any_length(of_ids, longer):
    task = of_ids.make(num_test_examples=8)
    seq_len = of_ids.seq_len + (2 * longer if isinstance(task, synthetic.MQAR) else longer)
    oracle = of_ids.oracle(task)
    batch = next(task.evaluation_batches(8, seq_len))
    assert batch["tokens"].shape == (8, seq_len)
    assert_solved(batch, oracle)


def assert_solved(batch, oracle):
    """At every position that counts and of which the oracle says anything, it is right; it does in every row."""
    for tokens, targets, weights in zip(batch["tokens"], batch["targets"], batch["weights"]):
        said = oracle(tokens)
        assert len(said) == len(tokens)
        counted = [i for i in np.flatnonzero(weights) if said[i] is not None]
        assert counted and [said[i] for i in counted] == targets[counted].tolist()


def test_an_oracle_solves_it(of_ids):
    task = of_ids.make(num_test_examples=EXAMPLES)
    oracle = of_ids.oracle(task)
    [batch] = task.evaluation_batches(EXAMPLES, of_ids.seq_len)
    assert_solved(batch, oracle)
    if not isinstance(task, synthetic.BigramBackcopy):  # most of which is chance
        answered = [[x is not None for x in oracle(tokens)] for tokens in batch["tokens"]]
        assert np.array(answered)[batch["weights"] > 0].all()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.chance])
def test_a_constant_answer_is_chance(name):
    """As often right as its class is frequent, within five standard deviations as if a row were one answer."""
    case = CASES[name]
    [batch] = case.make(num_test_examples=EXAMPLES).evaluation_batches(EXAMPLES, case.seq_len)
    answers = batch["targets"][batch["weights"] > 0]
    best = np.bincount(answers).max() / len(answers)
    assert abs(best - case.chance) < 5 * (case.chance / EXAMPLES) ** 0.5


def test_example_depends_on_seed_stream_and_place_alone(case):
    task = case.make(num_test_examples=24)
    first, again, other = (take(task.train_batches(4, case.seq_len, seed), 6) for seed in (1, 1, 2))
    assert all(map(same, first, again))
    if task.num_train_examples is None:
        assert len({*rows_of(first), *rows_of(other)}) == 48
        [whole] = take(task.train_batches(24, case.seq_len, 1), 1)
        assert rows_of([whole]) == rows_of(first)
    else:
        assert rows_of(first) != rows_of(other)
    reseeded = case.make(num_test_examples=24, seed=1)
    assert not {*rows_of(first)} & {*rows_of(take(reseeded.train_batches(4, case.seq_len, 1), 6))}


def test_held_out_rows_are_fixed_and_apart_from_training(case):
    task = case.make(num_train_examples=100, num_test_examples=30)
    first, again = (list(task.evaluation_batches(8, case.seq_len)) for _ in range(2))
    assert [len(batch["tokens"]) for batch in first] == [8] * 4 and all(map(same, first, again))
    held_out = rows_of(first)
    assert len(held_out) == len(set(held_out)) == 30
    assert not {*held_out} & {*rows_of(take(task.train_batches(10, case.seq_len, 0), 10))}
    endless = case.make(num_train_examples=None)
    assert not {*held_out} & {*rows_of(take(endless.train_batches(10, case.seq_len, 0), 10))}


def test_a_finite_training_set_is_reshuffled_every_epoch(case):
    rows = rows_of(take(case.make(num_train_examples=40).train_batches(10, case.seq_len, 3), 8))
    assert len(set(rows[:40])) == len(set(rows[40:])) == len(set(rows)) == 40
    assert rows[:40] != rows[40:]


@pytest.mark.parametrize("examples", [None, 25])
def test_processes_read_parts_of_one_batch(case, examples):
    task = case.make(num_train_examples=examples, num_test_examples=9)
    arguments = 4, case.seq_len
    shards = [task.train_batches(*arguments, 0, index, 2) for index in range(2)]
    for batch, *parts in take(zip(task.train_batches(*arguments, 0), *shards), 8):
        assert all(same(part, {key: x[2 * i : 2 * i + 2] for key, x in batch.items()}) for i, part in enumerate(parts))
    shards = [task.evaluation_batches(*arguments, None, index, 2) for index in range(2)]
    for batch, *parts in zip(task.evaluation_batches(*arguments), *shards, strict=True):
        assert all(same(part, {key: x[2 * i : 2 * i + 2] for key, x in batch.items()}) for i, part in enumerate(parts))


@pytest.mark.parametrize("examples", [None, 25])
@pytest.mark.parametrize("process", [(0, 1), (1, 2)], ids=["alone", "second-of-two"])
def test_a_restart_continues_with_the_next_batch(case, examples, process):
    def batches():
        return case.make(num_train_examples=examples).train_batches(4, case.seq_len, 0, *process)

    stream, states, uninterrupted = batches(), [], []
    for _ in range(16):
        states.append(json.dumps(stream.get_state()))
        uninterrupted.append(next(stream))
    for stop in (0, 1, 7, 13):
        resumed = batches()
        resumed.set_state(json.loads(states[stop]))
        assert all(map(same, uninterrupted[stop : stop + 3], resumed))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_train_examples": 0}, "num_train_examples is 0 and"),
        ({"num_test_examples": 0}, "num_test_examples 0; expected at least 1"),
        ({"seed": -1}, "seed is -1; expected 0 or more"),
    ],
)
def test_wrong_numbers_of_examples_are_refused(case, arguments, message):
    with pytest.raises(InputError, match=f"^{type(case.make()).__name__}: .*{message}") as raised:
        case.make(**arguments)
    assert "\n" not in str(raised.value)


def test_a_row_that_is_too_short_is_refused(case):
    task = case.make()
    with pytest.raises(InputError, match=rf"^{type(task).__name__}: seq_len is \d+; .*\d") as raised:
        shortest = 0 if task.input_size else 1
        task.check_length(shortest)
    assert "\n" not in str(raised.value)
