"""Writing text: what is decoded a token at a time is what the whole pass says, and draws are what is asked for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqmodels.data.tokenizers import ByteTokenizer
from seqmodels.errors import InputError
from seqmodels.evaluation.generation import (
    PROMPT_MULTIPLE,
    Sampling,
    encode_prompt,
    generate,
    until_separator,
)
from seqmodels.models import LanguageModel
from seqmodels.registry import MIXERS
from tests.mixers import every_mixer

VOCABULARY = 32
GREEDY = Sampling(temperature=0)


@functools.cache
def tiny_model(mixer: str):
    """A model with random weights whose likeliest next token is not simply the last one."""
    model = LanguageModel(
        vocab_size=VOCABULARY, d_model=32, n_layers=2, pattern=(mixer,), tie_embeddings=False
    )
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return model, params


def prompts_of(*lengths: int) -> list[list[int]]:
    return [np.random.default_rng(n).integers(VOCABULARY, size=n).tolist() for n in lengths]


def write(model, params, prompts, count=12, **options) -> np.ndarray:
    """The tokens that continue each prompt, int32 [prompt, token]."""
    return np.stack(list(generate(model, params, prompts, max_tokens=count, **options)), axis=1)


# One shorter than what prompts are padded to, one of just that length, one longer; and a single token.
LENGTHS = (1, 9, PROMPT_MULTIPLE, PROMPT_MULTIPLE + 6)


@pytest.mark.parametrize("mixer", every_mixer("generation"))
def test_decoding_is_the_forward_pass_one_token_at_a_time(mixer):
    """And a batch of prompts of unequal length gives each its own text, whatever stands beside it."""
    model, params = tiny_model(mixer)
    prompts = prompts_of(*LENGTHS)
    written = write(model, params, prompts, sampling=GREEDY)
    assert len(np.unique(written)) > 4, "too uniform a text to tell anything"
    forward = jax.jit(lambda tokens: model.apply({"params": params}, tokens)[0])
    for prompt, continuation in zip(prompts, written):
        whole = [*prompt, *continuation]
        # Tokens that come later change nothing, so all texts go through one program.
        tokens = np.array([whole + [0] * (LENGTHS[-1] + len(continuation) - len(whole))], np.int32)
        expected = jnp.argmax(forward(tokens)[0], axis=-1)[len(prompt) - 1 : len(whole) - 1]
        assert continuation.tolist() == expected.tolist(), len(prompt)
    alone = write(model, params, prompts[1:2], sampling=GREEDY)
    assert alone[0].tolist() == written[1].tolist()


@pytest.mark.parametrize("mixer", every_mixer("generation"))
def test_the_state_is_as_large_as_the_mixer_declares(mixer):
    """Constant in the number of tokens, but for operators that say that theirs grows."""
    model, _ = tiny_model(mixer)

    def state_bytes(capacity):
        state = jax.eval_shape(lambda: model.initial_state(1, capacity))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    assert (state_bytes(100) < state_bytes(10_000)) == MIXERS[mixer].op.state_grows


@pytest.mark.parametrize("mixer", every_mixer("generation"))
def test_decoding_keeps_the_state_as_it_is(mixer):
    """Every step returns the shapes and dtypes that it was given: memory does not creep up."""
    model, params = tiny_model(mixer)
    state = jax.eval_shape(lambda: model.initial_state(1, 100))
    step = jax.eval_shape(
        lambda s: model.apply({"params": params}, jnp.zeros((1, 1), jnp.int32), s)[1], state
    )
    assert step == state


def test_equal_seeds_write_equal_text():
    model, params = tiny_model("linear_attention")
    texts = [write(model, params, prompts_of(5), count=20, seed=seed).tolist() for seed in (3, 3, 4)]
    assert texts[0] == texts[1] != texts[2]


def test_it_writes_as_much_as_is_asked_for():
    model, params = tiny_model("linear_attention")
    assert write(model, params, prompts_of(2, 3), count=1).shape == (2, 1)
    assert list(generate(model, params, prompts_of(2), max_tokens=0)) == []


@pytest.mark.parametrize("prompts", [[], [[]], [[1, 2], []]])
def test_a_prompt_needs_a_token(prompts):
    model, params = tiny_model("linear_attention")
    with pytest.raises(InputError, match="expected at least one"):
        next(generate(model, params, prompts, max_tokens=1))


# Drawing

DRAWS = 20_000
PROBABILITY = np.array([0.1, 0.4, 0.05, 0.2, 0.25])


def frequencies(sampling: Sampling, probability=PROBABILITY) -> np.ndarray:
    """How often each token is drawn, of DRAWS independent draws."""
    logits = jnp.tile(jnp.log(jnp.array(probability, jnp.float32)) + 3.0, (DRAWS, 1))
    drawn = jax.jit(sampling.draw)(logits, jax.random.key(0))
    return np.bincount(np.asarray(drawn), minlength=len(probability)) / DRAWS


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(), [0, 1, 2, 3, 4]),
        (Sampling(top_k=3), [1, 3, 4]),
        (Sampling(top_k=99), [0, 1, 2, 3, 4]),
        (Sampling(top_p=0.6), [1, 4]),
        (Sampling(top_p=0.7), [1, 3, 4]),
        # The three likeliest are renormalised first, to 0.47, 0.29 and 0.24.
        (Sampling(top_k=3, top_p=0.7), [1, 4]),
        (Sampling(temperature=0.5), [0, 1, 2, 3, 4]),
        (Sampling(temperature=2.0, top_k=2), [1, 4]),
    ],
)
def test_draws_follow_the_probabilities_of_what_is_kept(sampling, kept):
    expected = np.zeros(5)
    expected[kept] = PROBABILITY[kept] ** (1 / sampling.temperature)
    expected /= expected.sum()
    found = frequencies(sampling)
    assert (found[expected == 0] == 0).all(), "a token was drawn that is not kept"
    # Five standard deviations of a binomial share.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / DRAWS)).all(), found


def test_draws_differ_when_the_probabilities_do():
    """That the bound above is tight enough to see a temperature of 1 where 0.9 was asked for."""
    expected = PROBABILITY ** (1 / 0.9)
    expected /= expected.sum()
    assert (np.abs(frequencies(Sampling()) - expected) > 5 * np.sqrt(expected * (1 - expected) / DRAWS)).any()


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(temperature=1e-4)]
)
def test_greedy_choices(sampling):
    logits = jax.random.normal(jax.random.key(1), (64, 50))
    for seed in range(3):
        drawn = sampling.draw(logits, jax.random.key(seed))
        assert drawn.tolist() == jnp.argmax(logits, axis=-1).tolist()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1; expected 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0; expected at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; expected more than 0"),
        ({"top_p": 1.01}, "top_p is 1.01; .* at most 1"),
    ],
)
def test_wrong_sampling(fields, message):
    with pytest.raises(InputError, match=message):
        Sampling(**fields)


# Text


def test_a_prompt_begins_a_document_and_a_separator_ends_one():
    tokenizer = ByteTokenizer()
    ids = encode_prompt(tokenizer, "né")
    assert ids == [tokenizer.separator, *"né".encode()]
    assert encode_prompt(tokenizer, "") == [tokenizer.separator]
    assert list(until_separator([*ids[1:], tokenizer.separator, 65], tokenizer)) == ids[1:]
