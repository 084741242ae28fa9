"""Pass keys and needles: what the prompts say, how long they are, and how answers are scored."""

import re
import uuid
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from seqmodels.data import NeedleInAHaystack, Passkey
from seqmodels.data.synthetic.needle import ADJECTIVES, FILLER, NOUNS
from seqmodels.errors import InputError
from seqmodels.evaluation.retrieval import retrieval_score, string_match_all
from seqmodels.models import LanguageModel
from tests.tasks import assert_follows

EXAMPLES = 1000
LEVELS = (1, 2, 3)


def prompts(task, seq_len):
    return list(islice(task.test_prompts(seq_len), EXAMPLES))


def test_pass_keys():
    keys, places = [], []
    for prompt in prompts(Passkey(num_test_examples=EXAMPLES), 600):
        _, before, line, after, question = prompt.text.split("\n")
        key = re.fullmatch(r"The pass key is (\d+)\. Remember it\. \1 is the pass key\.", line)[1]
        assert question == "What is the pass key? The pass key is" and prompt.answer == f" {key}"
        repeated = 9 * (FILLER + " ")
        assert repeated.startswith(before) and repeated.startswith(after)
        keys.append(int(key))
        places.append(len(before) / (len(before) + len(after) + 1))
    assert min(keys) >= 1 and max(keys) <= 50_000
    for drawn in (np.array(keys) / 50_001, np.array(places)):
        assert_follows(np.bincount((10 * drawn).astype(int), minlength=10), np.ones(10))


@pytest.mark.parametrize("level", LEVELS)
def test_needles(level):
    task = NeedleInAHaystack(level=level, num_test_examples=EXAMPLES)
    adjectives, nouns = [], []
    for prompt in prompts(task, 900):
        first, text = prompt.text.split("\n", 1)
        text, last = text.rsplit("\n", 1)
        needle = re.search(r"One of the special magic (?:number|uuid)s for ((\w+)-(\w+)) is: (\S+)\.", text)
        kind = "uuid" if level == 3 else "number"
        assert f"magic {kind} is hidden" in first and last.endswith(
            f"magic {kind} for {needle[1]} mentioned in the provided text is"
        )
        assert prompt.reference == needle[4] and prompt.text.count(needle[4]) == 1
        if level == 3:
            assert str(uuid.UUID(needle[4])) == needle[4]
        else:
            assert 10**6 <= int(needle[4]) < 10**7
        if level == 1:
            assert set(text.split("\n")) == {FILLER, needle[0]}
        else:
            haystack = (text[: needle.start()] + text[needle.end() + 1 :]).strip()
            assert haystack in 2 * (task.essay + " ")
        adjectives.append(ADJECTIVES.index(needle[2]))
        nouns.append(NOUNS.index(needle[3]))
    assert_follows(np.bincount(adjectives, minlength=32), np.ones(32))
    assert_follows(np.bincount(nouns, minlength=32), np.ones(32))


def test_forty_depths_from_the_beginning_to_the_end():
    """Among 39 lines each is a place of its own."""
    random, task = np.random.default_rng(0), NeedleInAHaystack()
    texts = [task.draw(random)(39).text.split("\n")[1:-1] for _ in range(EXAMPLES)]
    places = [next(i for i, line in enumerate(lines) if line != FILLER) for lines in texts]
    counts = np.bincount(places, minlength=40)
    assert_follows(counts, np.ones(40))
    assert counts.min() > 0


@pytest.mark.parametrize("make", [Passkey, *(lambda level=level: NeedleInAHaystack(level=level) for level in LEVELS)])
def test_rows_are_as_full_as_they_can_be(make):
    """And no fuller: a unit more of filler would not fit."""
    task = make()
    for i in range(20):
        tokens = task.example(777, np.random.default_rng(i))["tokens"]
        example, used = task.draw(np.random.default_rng(i)), (tokens != task.tokenizer.separator).sum() + 1
        lengths = [len(task._sequence(example(units))[0]) for units in range(700)]
        assert used <= 778 and max(length for length in lengths if length <= 778) in (used, used + 1)


def test_rows_end_with_the_answer_and_the_separator():
    task = NeedleInAHaystack(level=3)
    batch = next(task.train_batches(50, 900, 0))
    for tokens, targets, weights in zip(batch["tokens"], batch["targets"], batch["weights"]):
        [places] = np.nonzero(weights)
        assert (np.diff(places) == 1).all() and len(places) == 38 and tokens[0] == 256
        assert targets[places[-1]] == 256 and (tokens[places[-1] + 1 :] == 256).all()
        assert (targets[:-1] == tokens[1:]).all()


def test_a_tokenizer_file_and_essays_of_ones_own(tmp_path):
    essay = "One two three. Four five, six! Is 7 all? " * 5
    (tmp_path / "essay.txt").write_text(essay)
    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    words.train_from_iterator([essay, FILLER], trainer)
    words.save(str(tmp_path / "tokenizer.json"))
    task = NeedleInAHaystack(level=2, paths=str(tmp_path / "essay.txt"), tokenizer=str(tmp_path / "tokenizer.json"))
    assert task.sentences[:3] == ["One two three.", "Four five, six!", "Is 7 all?"] and task.vocab_size == 302
    batch = next(task.evaluation_batches(4, 500))
    for tokens, targets, weights in zip(batch["tokens"], batch["targets"], batch["weights"]):
        text, answer = task.tokenizer.decode(tokens), task.tokenizer.decode(targets[weights > 0])
        assert f"is:{answer}." in text and "Is 7 all? Four" not in text and "six! Is 7 all?" in text
    assert task.fingerprint != NeedleInAHaystack(level=2).fingerprint


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NeedleInAHaystack(level=4), "level is 4; expected 1, 2 or 3"),
        (lambda: NeedleInAHaystack(paths="a.txt"), "paths is 'a.txt' with level 1; expected None"),
        (lambda: NeedleInAHaystack(level=2, paths="/nowhere").sentences, "no such file or folder: /nowhere"),
        (lambda: Passkey(tokenizer="gpt2"), "tokenizer 'gpt2' is no file; expected 'bytes'"),
        (lambda: Passkey().train_batches(1, 100, 0), r"Passkey: seq_len is 100; .* without any filler needs \d+"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(InputError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def test_a_value_that_the_essay_has_is_drawn_anew(tmp_path):
    file = tmp_path / "essay.txt"
    file.write_text("No number here.")
    value = next(NeedleInAHaystack(level=2, paths=str(file)).test_prompts(500)).reference
    file.write_text(f"It was {value} years ago.")
    prompt = next(NeedleInAHaystack(level=2, paths=str(file)).test_prompts(500))
    assert value in prompt.text and prompt.reference != value and prompt.text.count(prompt.reference) == 1


def test_an_essay_without_text_is_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(InputError, match=r"has no text in it; expected an essay"):
        NeedleInAHaystack(level=2, paths=str(tmp_path / "empty.txt")).sentences  # noqa: B018


# ---- scores ----


def test_string_match():
    assert string_match_all(["It is ABC-1, I think.", "no"], [["abc-1"], ["x"]]) == 50.0
    assert string_match_all(["7 and 8"], [["7", "8", "9", "10"]]) == 50.0


class Parrot:
    """A model that has read the prompts: it says what comes next in `text`, and else the separator."""

    vocab_size = 258

    def __init__(self, follows):
        self.follows = jnp.asarray(follows)

    def initial_state(self, batch_size, capacity=None):
        return jnp.zeros(batch_size, jnp.int32)

    def apply(self, variables, tokens, state=None, segment_ids=None):
        place = state + (1 if segment_ids is None else (segment_ids > 0).sum(axis=1) - 1)
        said = self.follows[jnp.arange(len(place)), jnp.minimum(place, self.follows.shape[1] - 1)]
        return jax.nn.one_hot(said, 258)[:, None], place


def test_a_model_that_knows_is_scored_100():
    task = Passkey(num_test_examples=6)
    follows = next(task.evaluation_batches(6, 400))["targets"]
    assert retrieval_score(Parrot(follows), {}, task, 400) == 100.0
    follows[:3, 350:] = ord("x")
    assert retrieval_score(Parrot(follows), {}, task, 400) == 50.0
    assert retrieval_score(Parrot(follows), {}, task, 400, examples=3) == 0.0


def test_a_model_that_knows_nothing_is_scored_0():
    model, task = LanguageModel(vocab_size=258, d_model=16, n_layers=1), Passkey(num_test_examples=2)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert retrieval_score(model, params, task, 400) == 0.0
