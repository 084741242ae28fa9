"""Writing text: read the prompts in one pass, then one token at a time in constant memory."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
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
STOP_INTERVAL = 8


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
    length: int | None = None,
) -> Iterator[np.ndarray]:
    """Continue every prompt by `max_tokens` tokens; yields them as they come, int32 [number of prompts] each time.

    prompts: token ids, of any lengths but zero. Shorter ones are padded on the left; padding changes nothing.
    params: the model's parameters, as in a checkpoint. seed: equal seeds give equal text.
    length: that prompts are padded to; None for the next multiple of PROMPT_MULTIPLE. Calls of equal shapes share what
        is compiled.

    Memory does not grow with the text, but for attention without a window, whose cache is made for all of it.
    """
    steps = generate_with_states(
        model, params, prompts, max_tokens=max_tokens, sampling=sampling, seed=seed, length=length
    )
    return (tokens for tokens, _ in steps)


def generate_with_states(
    model: LanguageModel,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    length: int | None = None,
) -> Iterator[tuple[np.ndarray, Any]]:
    """As `generate`, and with each token the model's state before it is read, which is gone at the next token."""
    if not prompts or min(map(len, prompts)) == 0:
        raise InputError("generate: a prompt has no tokens; expected at least one in each")
    if length is None:
        length = -(-max(map(len, prompts)) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE
    tokens = np.zeros((len(prompts), length), np.int32)
    segment_ids = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, length - len(prompt) :] = prompt
        segment_ids[row, length - len(prompt) :] = 1

    fixed = {"model": model, "sampling": sampling}
    keys = jax.random.split(jax.random.key(seed), max(max_tokens, 1))
    for i in range(max_tokens):
        if i == 0:
            drawn, state = _prefill(params, tokens, segment_ids, keys[0], capacity=length + max_tokens, **fixed)
        else:
            drawn, state = _decode(params, drawn, state, keys[i], **fixed)
        yield np.asarray(drawn, np.int32), state


@functools.partial(jax.jit, static_argnames=("model", "capacity", "sampling"))
def _prefill(
    params: Any,
    tokens: Array,
    segment_ids: Array,
    key: Array,
    *,
    model: LanguageModel,
    capacity: int,
    sampling: Sampling,
) -> tuple[Array, Any]:
    state = model.initial_state(tokens.shape[0], capacity=capacity)
    logits, state = model.apply({"params": params}, tokens, state, segment_ids)
    return sampling.draw(logits[:, -1], key), state


# A cache is written in its place, not copied.
@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="state")
def _decode(
    params: Any, tokens: Array, state: Any, key: Array, *, model: LanguageModel, sampling: Sampling
) -> tuple[Array, Any]:
    logits, state = model.apply({"params": params}, tokens[:, None], state)
    return sampling.draw(logits[:, -1], key), state


def write_until(
    model: LanguageModel,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    stops: Sequence[str] = (),
    sampling: Sampling = Sampling(0.0),
    seed: int = 0,
    batch_size: int = 16,
    advance: Callable[[int], object] = lambda texts: None,
) -> list[str]:
    """What the model writes after each prompt, up to the end of the document, `max_tokens` or the first of `stops`.

    Prompts go in batches, the longest first, padded to few lengths. Equal prompts are drawn for independently.

    stops: see `before_stop`. advance: told how many texts were written, after every batch.
    """
    texts = [""] * len(prompts)
    for number, batch in enumerate(batches_by_length(list(map(len, prompts)), batch_size)):
        rows = min(batch_size, len(prompts))
        padded = [prompts[i] for i in batch] + [prompts[batch[-1]]] * (rows - len(batch))
        length = round_up(len(padded[0]), PROMPT_MULTIPLE)
        steps = generate(
            model, params, padded, max_tokens=max_tokens, sampling=sampling, seed=seed + number, length=length
        )
        for i, text in zip(batch, _texts_until(steps, tokenizer, stops, len(batch))):
            texts[i] = text
        advance(len(batch))
    return texts


def _texts_until(steps: Iterable[np.ndarray], tokenizer: Tokenizer, stops: Sequence[str], count: int) -> list[str]:
    """The texts of the first `count` rows; takes no more steps than they need, but for up to STOP_INTERVAL."""
    ids: list[list[int]] = [[] for _ in range(count)]
    unfinished = set(range(count))
    for number, drawn in enumerate(steps, start=1):
        for row in list(unfinished):
            if drawn[row] == tokenizer.separator:
                unfinished.remove(row)
            else:
                ids[row].append(int(drawn[row]))
        if stops and number % STOP_INTERVAL == 0:
            unfinished = {row for row in unfinished if not _holds_any(tokenizer.decode(ids[row]), stops)}
        if not unfinished:
            break
    return [before_stop(tokenizer.decode(row), stops) for row in ids]


def _holds_any(text: str, stops: Sequence[str]) -> bool:
    return any(stop in text for stop in stops)


def before_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the one of `stops` that is complete first, as if it had been looked for after each character;
    all of it where there is none."""
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        return text
    read = text[: min(ends)]
    return read[: min(read.find(stop) for stop in stops if stop in read)]


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices in batches of neighbours in length, the longest first: what does not fit in memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def round_up(length: int, smallest: int) -> int:
    """The next of `smallest`, twice, four times ... that: lengths to compile for."""
    return smallest << max(0, -(-length // smallest) - 1).bit_length()


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The prompt as the beginning of a document."""
    return [tokenizer.separator, *map(int, tokenizer.encode(prompt))]


def until_separator(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[int]:
    """The ids before the one that ends a document."""
    for token in ids:
        if token == tokenizer.separator:
            return
        yield token
