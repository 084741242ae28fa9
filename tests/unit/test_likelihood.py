"""Likelihoods of texts: what is scored in batches, spans and padding is what one pass over each whole text says."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.data.tokenizers import ByteTokenizer, FileTokenizer
from seqmodels.errors import InputError
from seqmodels.evaluation import likelihood
from seqmodels.evaluation.generation import (
    STOP_INTERVAL,
    Sampling,
    before_stop,
    encode_prompt,
    generate,
    round_up,
    write_until,
)
from seqmodels.evaluation.likelihood import (
    Pair,
    Score,
    encode_pair,
    score_continuations,
    score_texts,
    tokens_read,
    truncated,
    windows,
)
from seqmodels.evaluation.spans import read_span
from seqmodels.models import LanguageModel
from seqmodels.parallel.mesh import make_mesh
from seqmodels.training.evaluation import make_evaluator
from tests.tolerances import TOLERANCES

BYTES = ByteTokenizer()
LONGEST = 100
CLOSE = {"rtol": TOLERANCES["model"], "atol": TOLERANCES["model"]}


@functools.cache
def tiny_model(mixer: str = "gated_linear_attention"):
    model = LanguageModel(vocab_size=258, d_model=16, n_layers=1, pattern=(mixer,), tie_embeddings=False)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return model, jax.tree.map(lambda x: 4 * x, params)  # opinions that are strong enough to differ


@functools.cache
def whole_pass(mixer: str):
    model, params = tiny_model(mixer)
    return jax.jit(lambda tokens: jax.nn.log_softmax(model.apply({"params": params}, tokens)[0]))


def by_hand(pair: Pair, mixer: str = "gated_linear_attention") -> Score:
    """One pass over one whole text, alone. What comes later changes nothing, so all texts have one length."""
    text = [*pair.context, *pair.continuation]
    log_p = np.asarray(whole_pass(mixer)(jnp.array([text + [0] * (LONGEST - len(text))]))[0], np.float64)
    places = range(len(pair.context), len(text))
    return Score(sum(log_p[i - 1, text[i]] for i in places), all(log_p[i - 1].argmax() == text[i] for i in places))


def pairs_of(*lengths: tuple[int, int]) -> list[Pair]:
    draw = np.random.default_rng(0).integers
    return [Pair(draw(258, size=a).tolist(), draw(258, size=b).tolist()) for a, b in lengths]


@pytest.fixture
def short_spans(monkeypatch):
    """So that texts of a hundred tokens take many."""
    monkeypatch.setattr(likelihood, "SPAN", 16)
    monkeypatch.setattr(likelihood, "SHORTEST", 8)


# Within a span, at its edges, over several, scored from the first token of a span on, and one continuation alone.
LENGTHS = ((1, 1), (3, 5), (1, 16), (2, 16), (16, 1), (17, 16), (40, 2), (33, 60), (1, 70), (5, 12), (32, 17))


@pytest.mark.parametrize("mixer", ["gated_linear_attention", "softmax_attention"])
def test_scores_are_those_of_one_pass_over_each_whole_text(short_spans, mixer):
    pairs = pairs_of(*LENGTHS)
    scores = score_continuations(*tiny_model(mixer), pairs, batch_size=4)
    expected = [by_hand(pair, mixer) for pair in pairs]
    np.testing.assert_allclose([s.log_likelihood for s in scores], [s.log_likelihood for s in expected], **CLOSE)
    assert [score.greedy for score in scores] == [score.greedy for score in expected]


def test_what_greedy_decoding_writes_is_greedy_and_nothing_else_is(short_spans):
    model, params = tiny_model()
    contexts = [pair.context for pair in pairs_of((4, 1), (30, 1), (9, 1))]
    written = np.stack(list(generate(model, params, contexts, max_tokens=40, sampling=Sampling(0.0))), axis=1)
    pairs = [Pair(context, row) for context, row in zip(contexts, written)]
    assert all(score.greedy for score in score_continuations(model, params, pairs, batch_size=4))
    for place in (0, 20, 39):
        changed = written.copy()
        changed[:, place] = (changed[:, place] + 1) % 258
        pairs = [Pair(context, row) for context, row in zip(contexts, changed)]
        assert not any(score.greedy for score in score_continuations(model, params, pairs, batch_size=4)), place


def test_the_score_of_a_text_is_the_loss_that_our_evaluation_has_on_it(short_spans):
    model, params = tiny_model()
    text = Path(likelihood.__file__).read_bytes()[: LONGEST - 1]
    row = np.array([[BYTES.separator, *text]], np.int32)
    batch = {"tokens": row[:, :-1], "targets": row[:, 1:], "weights": np.ones((1, LONGEST - 1), np.float32)}
    mesh = make_mesh(devices=jax.devices()[:1])
    loss = make_evaluator(model, lambda: [batch], mesh=mesh)(params)["loss"]
    scores = score_texts(model, params, [list(text), list(text[:30])], BYTES.separator)
    np.testing.assert_allclose(scores[0], -loss * len(text), **CLOSE)


def test_likelihoods_of_the_parts_of_a_text_add_up(short_spans):
    model, params = tiny_model()
    a, b = "def f(x):\n    return ", "x + 1  # naïve\n"
    pairs = [encode_pair(BYTES, "", a), encode_pair(BYTES, a, b), encode_pair(BYTES, "", a + b)]
    first, second, both = (score.log_likelihood for score in score_continuations(model, params, pairs))
    np.testing.assert_allclose(first + second, both, **CLOSE)
    [text] = score_texts(model, params, [BYTES.encode(a + b)], BYTES.separator)
    np.testing.assert_allclose(text, both, **CLOSE)


def test_few_programs_are_compiled(short_spans):
    """One for each padded length, and one for all that is longer than a span."""
    model = tiny_model()[0].clone(norm_eps=2e-5)
    before = read_span._cache_size()
    score_continuations(model, tiny_model()[1], pairs_of(*((1, n) for n in range(1, 60))), batch_size=2)
    assert read_span._cache_size() - before == 3


def test_progress_counts_every_token_that_is_read(short_spans):
    pairs = [*pairs_of(*LENGTHS), Pair([1, 2, 3], [])]
    told = []
    scores = score_continuations(*tiny_model(), pairs, batch_size=4, advance=told.append)
    assert sum(told) == tokens_read(pairs) == sum(a + b - 1 for a, b in LENGTHS)
    assert scores[-1] == Score(0.0, True)


def test_a_context_needs_a_token():
    with pytest.raises(InputError, match="a context has no tokens; expected at least one"):
        score_continuations(*tiny_model(), [Pair([], [1])])


def test_a_pair_is_split_where_its_text_is():
    assert encode_pair(BYTES, "", "né") == ([BYTES.separator], [*"né".encode()])
    assert encode_pair(BYTES, "a ", " b") == ([BYTES.separator, *b"a "], [*b" b"])
    assert encode_pair(BYTES, "a", "") == ([BYTES.separator, *b"a"], [])


def test_a_token_over_the_border_of_a_pair_is_scored(tmp_path):
    """As the tokenizer writes the whole, which is what the model was trained on."""
    tokenizers = pytest.importorskip("tokenizers", reason="the extra `text` is not installed")
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "</s>": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("a", "b")]))
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = FileTokenizer(tmp_path / "tokenizer.json")
    assert encode_pair(ours, "ca", "bc") == ([4, 2], [3, 2])
    assert encode_pair(ours, "ab", "c") == ([4, 3], [2])


@pytest.mark.parametrize("max_length", [1, 4, 9, 10])
def test_windows_score_every_token_once_with_no_more_than_the_limit_before_it(max_length):
    text, separator = list(range(10)), 99
    pairs = windows(text, separator, max_length)
    assert [token for pair in pairs for token in pair.continuation] == text
    whole = [separator, *text]
    for pair in pairs:
        start = whole.index(pair.context[0])
        assert whole[start:][: len(pair.context) + len(pair.continuation)] == [*pair.context, *pair.continuation]
        assert len(pair.context) + len(pair.continuation) - 1 <= max_length
    if len(pairs) > 1:
        assert len(pairs[-1].context) + len(pairs[-1].continuation) - 1 == max_length, "the last has all the context"
    assert windows(text, separator, None) == [([separator], text)]


@pytest.mark.parametrize(
    ("max_length", "context"), [(None, [1, 2, 3, 4]), (5, [1, 2, 3, 4]), (4, [2, 3, 4]), (2, [4]), (1, [4])]
)
def test_a_context_is_cut_on_the_left(max_length, context):
    assert truncated(Pair([1, 2, 3, 4], [5, 6]), max_length) == (context, [5, 6])


# Writing


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one\ntwo", ["\n"], "one"),
        ("one\ntwo", ["two", "\n"], "one"),
        ("one", ["\n"], "one"),
        ("one", [], "one"),
        ("\none", ["\n"], ""),
        # Looked for after each character: "b" is there before "abc" is.
        ("xabc", ["abc", "b"], "xa"),
        # Both are complete at once: what belongs to either is left out.
        ("x\n\n\ny", ["\n\n", "\n\n\n"], "x"),
        ("x##end", ["end", "##end"], "x"),
    ],
)
def test_a_text_ends_before_the_stop_that_is_complete_first(text, stops, expected):
    assert before_stop(text, stops) == expected


def test_texts_end_at_a_stop_or_after_so_many_tokens_whatever_stands_beside_them():
    model, params = tiny_model()
    prompts = [encode_prompt(BYTES, text) for text in ("a", "bcd", "ef\ng", "h" * 30, "ij")]
    steps = list(generate(model, params, prompts, max_tokens=30, sampling=Sampling(0.0)))
    free = [BYTES.decode(int(step[row]) for step in steps) for row in range(len(prompts))]
    assert all(BYTES.separator not in step for step in steps)
    stops = [free[1][5], free[3][STOP_INTERVAL]]
    told = []
    written = write_until(model, params, BYTES, prompts, max_tokens=30, stops=stops, batch_size=2, advance=told.append)
    assert written == [before_stop(text, stops) for text in free]
    assert written != free
    assert told == [2, 2, 1]


def test_a_text_ends_with_its_document(monkeypatch):
    """The row beside it goes on."""
    ids = np.array([[65, 65], [BYTES.separator, 66], [67, 68]], np.int32)
    monkeypatch.setattr("seqmodels.evaluation.generation.generate", lambda *_, **__: iter(ids))
    assert write_until(*tiny_model(), BYTES, [[1], [1]], max_tokens=3) == ["A", "ABD"]


def test_equal_prompts_are_drawn_for_independently():
    """Tasks that vote ask for one prompt many times; batches must not repeat each other."""
    prompts = [encode_prompt(BYTES, "a")] * 6
    options = {"max_tokens": 12, "sampling": Sampling(1.0), "batch_size": 2}
    texts = write_until(*tiny_model(), BYTES, prompts, seed=5, **options)
    assert len(set(texts)) == 6
    assert texts == write_until(*tiny_model(), BYTES, prompts, seed=5, **options)


def test_lengths_are_rounded_up_to_few():
    assert [round_up(length, 8) for length in (1, 8, 9, 16, 17, 33, 64, 65)] == [8, 8, 16, 16, 32, 64, 64, 128]
