"""Writing text: read the prompts in one pass, then one token at a time in constant memory."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from seqmodels.data.tokenizers import Tokenizer
from seqmodels.errors import InputError
from seqmodels.models import LanguageModel
from seqmodels.notation import Array

PROMPT_MULTIPLE = 64


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn from the logits.

    temperature   the logits are divided by it; 0 takes the largest
    top_k         keep the k largest; None keeps all
    top_p         keep the most probable tokens that together reach this probability (Holtzman et al. 2019,
                  arXiv 1904.09751); applied after top_k
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"temperature is {self.temperature}; expected 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k is {self.top_k}; expected at least 1")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {self.top_p}; expected more than 0 and at most 1")

    def draw(self, logits: Float[Array, "b vocabulary"], key: Array) -> Int[Array, " b"]:
        """One token per row."""
        if self.temperature == 0:
            return jnp.argmax(logits, axis=-1)
        # In descending order, so that what is kept is the beginning.
        logits, tokens = jax.lax.top_k(logits / self.temperature, min(self.top_k or logits.shape[-1], logits.shape[-1]))
        probability = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        place = jax.random.categorical(key, jnp.where(before < self.top_p, logits, -jnp.inf))
        return jnp.take_along_axis(tokens, place[:, None], axis=-1)[:, 0]


def generate(
    model: LanguageModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> Iterator[np.ndarray]:
    """Continue every prompt by `max_tokens` tokens; yields them as they come, int32 [number of prompts] each time.

    prompts: token ids, of any lengths but zero. Shorter ones are padded on the left; padding changes nothing.
    params: the model's parameters, as in a checkpoint. seed: equal seeds give equal text.

    Memory does not grow with the text, but for attention without a window, whose cache is made for all of it.
    """
    steps = generate_with_states(model, params, prompts, max_tokens=max_tokens, sampling=sampling, seed=seed)
    return (tokens for tokens, _ in steps)


def generate_with_states(
    model: LanguageModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> Iterator[tuple[np.ndarray, Any]]:
    """As `generate`, and with each token the model's state before it is read, which is gone at the next token."""
    if not prompts or min(map(len, prompts)) == 0:
        raise InputError("generate: a prompt has no tokens; expected at least one in each")
    length = -(-max(map(len, prompts)) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    tokens = np.zeros((len(prompts), length), np.int32)
    segment_ids = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segment_ids[row, length - len(prompt) :] = 1

    variables = {"params": params}
    draw = sampling.draw

    @jax.jit
    def prefill(variables: Any, tokens: Array, segment_ids: Array, key: Array) -> tuple[Array, Any]:
        state = model.initial_state(len(prompts), capacity=length + max_tokens)
        logits, state = model.apply(variables, tokens, state, segment_ids)
        return draw(logits[:, -1], key), state

    @functools.partial(jax.jit, donate_argnames="state")  # a cache is written in its place, not copied
    def decode(variables: Any, tokens: Array, state: Any, key: Array) -> tuple[Array, Any]:
        logits, state = model.apply(variables, tokens[:, None], state)
        return draw(logits[:, -1], key), state

    keys = jax.random.split(jax.random.key(seed), max(max_tokens, 1))
    for i in range(max_tokens):
        if i == 0:
            drawn, state = prefill(variables, tokens, segment_ids, keys[0])
        else:
            drawn, state = decode(variables, drawn, state, keys[i])
        yield np.asarray(drawn, np.int32), state


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt as the beginning of a document."""
    return [tokenizer.separator, *map(int, tokenizer.encode(prompt))]


def until_separator(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[int]:
    """The ids before the one that ends a document."""
    for token in ids:
        if token == tokenizer.separator:
            return
        yield token
