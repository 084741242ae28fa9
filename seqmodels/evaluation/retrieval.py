"""Whether a model finds what a text has hidden: it writes an answer, and the answer is looked through."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from seqmodels.data.synthetic.needle import RetrievalTask
from seqmodels.evaluation.generation import Sampling, encode_prompt, generate, until_separator
from seqmodels.models import LanguageModel


def string_match_all(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean over the outputs of the share of their references that stand in them, whatever the case, times 100: the
    score of RULER's needles (Hsieh et al. 2024, arXiv 2404.06654)."""
    shares = [
        sum(reference.lower() in output.lower() for reference in wanted) / len(wanted)
        for output, wanted in zip(outputs, references, strict=True)
    ]
    return 100.0 * sum(shares) / len(shares)


def retrieval_score(
    model: LanguageModel, params: Any, task: RetrievalTask, seq_len: int, *, examples: int | None = None
) -> float:
    """`string_match_all` of what the model writes, by greedy decoding, after the task's held-out prompts.

    seq_len: of the rows that the prompts are from. examples: how many; None for all. An answer may have twice the
    tokens of the longest reference.
    """
    prompts = list(islice(task.test_prompts(seq_len), examples))
    tokenizer = task.tokenizer
    room = 2 * max(len(tokenizer.encode(prompt.answer)) for prompt in prompts)
    ids = [encode_prompt(tokenizer, prompt.text) for prompt in prompts]
    steps = list(generate(model, params, ids, max_tokens=room, sampling=Sampling(0.0)))
    outputs = [
        tokenizer.decode(until_separator((int(step[row]) for step in steps), tokenizer)) for row in range(len(prompts))
    ]
    return string_match_all(outputs, [[prompt.reference] for prompt in prompts])
