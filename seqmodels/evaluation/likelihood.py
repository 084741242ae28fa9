"""How likely a model finds texts, and whether it would have written them.

    log p(continuation | context) = sum over its tokens of log softmax(logits)[token]           in nats

A text is read in spans of up to SPAN tokens, and the state is handed from one to the next, so that each token is scored
once, with all that stands before it, however long that is: there are no windows. Memory does not grow with the text,
but for attention without a window, whose cache is made for all of it.

Texts of similar length are read side by side, padded on the right to one of few lengths: what comes later changes
nothing. One program is compiled for each of these lengths, and one for all texts of more than a span.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from seqmodels.data.tokenizers import Tokenizer
from seqmodels.data.transforms import Batch
from seqmodels.errors import InputError
from seqmodels.evaluation.generation import batches_by_length, encode_prompt, round_up
from seqmodels.evaluation.spans import PositionScores, read_span
from seqmodels.models import LanguageModel

SPAN = 512
SHORTEST = 32

Ids = Sequence[int] | np.ndarray


class Score(NamedTuple):
    """What a model thinks of a continuation.

    log_likelihood   of the whole continuation, in nats
    greedy           whether each of its tokens is the likeliest one
    """

    log_likelihood: float
    greedy: bool


class Pair(NamedTuple):
    """Ids of a context, at least one, and of what is scored after it."""

    context: Ids
    continuation: Ids


def score_continuations(
    model: LanguageModel,
    params: Any,
    pairs: Sequence[Pair],
    *,
    batch_size: int = 16,
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[Score]:
    """The score of every pair's continuation; of an empty one (0.0, True).

    advance: told how many tokens were read, after every span; `tokens_read` says how many there will be.
    """
    if not all(len(pair.context) for pair in pairs):
        raise InputError("score_continuations: a context has no tokens; expected at least one, such as the separator")
    scores = [Score(0.0, True)] * len(pairs)
    scored = [i for i, pair in enumerate(pairs) if len(pair.continuation)]
    for batch in batches_by_length([_inputs(pairs[i]) for i in scored], batch_size):
        batch = [scored[place] for place in batch]
        rows = min(batch_size, len(scored))
        for i, score in zip(batch, _score_batch(model, params, [pairs[i] for i in batch], rows, advance)):
            scores[i] = score
    return scores


def score_texts(
    model: LanguageModel,
    params: Any,
    texts: Sequence[Ids],
    separator: int,
    *,
    max_length: int | None = None,
    batch_size: int = 16,
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[float]:
    """The log-likelihood, in nats, of every text as a document: after a separator, and without the one behind it.

    max_length: see `windows`.
    """
    pairs = [windows(text, separator, max_length) for text in texts]
    scores = iter(
        score_continuations(
            model, params, [pair for each in pairs for pair in each], batch_size=batch_size, advance=advance
        )
    )
    return [sum(next(scores).log_likelihood for _ in each) for each in pairs]


def tokens_read(pairs: Sequence[Pair]) -> int:
    """How many tokens `score_continuations` reads, padding aside."""
    return sum(_inputs(pair) for pair in pairs if len(pair.continuation))


def windows(text: Ids, separator: int, max_length: int | None) -> list[Pair]:
    """The text, scored in one piece after the separator, or cut so that no token has more than `max_length` before it.

    Then each piece has one token of the piece before it as its context, and the last one as many as there is room for,
    as lm-evaluation-harness does it for models that can read no more.
    """
    if max_length is None or len(text) <= max_length:
        return [Pair([separator], text)]
    pairs = [Pair([separator], text[:max_length])]
    for start in range(max_length, len(text), max_length):
        end = min(start + max_length, len(text))
        pairs.append(Pair(text[end - max_length - 1 : start], text[start:end]))
    return pairs


def truncated(pair: Pair, max_length: int | None) -> Pair:
    """The pair with its context cut on the left, so that its last token has no more than `max_length` before it. One
    token of the context stays in any case, and the continuation as it is."""
    if max_length is None:
        return pair
    room = max(1, max_length + 1 - len(pair.continuation))
    return Pair(pair.context[-room:], pair.continuation)


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """A document that begins with `context`, and its continuation, as the tokenizer writes both together.

    Where a token reaches over the border between the two, it is scored, with its part of the context: the tokens of the
    context are those that it has alone and with its continuation. Bytes never do.
    """
    before = encode_prompt(tokenizer, context)
    whole = encode_prompt(tokenizer, context + continuation)
    shared = next((i for i, (a, b) in enumerate(zip(before, whole)) if a != b), min(len(before), len(whole)))
    return Pair(whole[:shared], whole[shared:])


def _inputs(pair: Pair) -> int:
    """Tokens that are read: the last one is only predicted."""
    return len(pair.context) + len(pair.continuation) - 1


def _score_batch(
    model: LanguageModel, params: Any, pairs: Sequence[Pair], rows: int, advance: Callable[[int], object]
) -> list[Score]:
    longest = max(map(_inputs, pairs))
    if longest <= SPAN:
        span, state = round_up(longest, SHORTEST), None
    else:
        # Where the state grows, its size is part of the program: few sizes.
        span, state = SPAN, model.initial_state(rows, capacity=round_up(longest, SPAN))
    log_likelihood, all_greedy = np.zeros(rows), np.ones(rows, bool)

    def add(scores: PositionScores, weights: np.ndarray) -> None:
        nonlocal log_likelihood, all_greedy
        log_likelihood = log_likelihood - np.asarray(scores.nll).sum(axis=1, dtype=np.float64)
        all_greedy = all_greedy & (np.asarray(scores.correct) == (weights > 0)).all(axis=1)

    previous = None
    for batch, read in _spans(pairs, rows, span, longest):
        scores, state = read_span(params, batch, state, model=model)
        # One span late, so that the device is never idle.
        if previous is not None:
            add(*previous)
        previous = scores, batch["weights"]
        advance(read)
    add(*previous)
    return [Score(float(value), bool(greedy)) for value, greedy in zip(log_likelihood, all_greedy)][: len(pairs)]


def _spans(pairs: Sequence[Pair], rows: int, span: int, longest: int) -> Iterator[tuple[Batch, int]]:
    """The batch, `span` positions at a time, and how many positions are no padding. A target is the token after a
    position; its weight is 1 where it is scored."""
    texts = [np.concatenate([np.asarray(ids, np.int32) for ids in pair]) for pair in pairs]
    for start in range(0, longest, span):
        tokens, targets = np.zeros((2, rows, span), np.int32)
        weights, read = np.zeros((rows, span), np.float32), 0
        for row, (pair, text) in enumerate(zip(pairs, texts)):
            piece = text[start : start + span + 1]
            count = max(0, len(piece) - 1)
            tokens[row, :count], targets[row, :count] = piece[:count], piece[1:]
            weights[row, max(0, len(pair.context) - 1 - start) : count] = 1.0
            read += count
        yield {"tokens": tokens, "targets": targets, "weights": weights}, read
