"""The suite `needle`: whether the model finds what a text hides, by the text's length and the depth."""

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from seqmodels.data import NeedleInAHaystack, Passkey
from seqmodels.data.synthetic.needle import RetrievalTask
from seqmodels.errors import InputError, nearest
from seqmodels.evaluation.retrieval import retrieval_score
from seqmodels.evaluation.spans import SPAN, Reader, make_reader
from seqmodels.tools._runs import TrainedRun
from seqmodels.tools.evaluate._texts import batches_of, require_positive, require_text, rows_at_once
from seqmodels.tools.evaluate.evaluation import Evaluation

TASKS: dict[str, Callable[..., RetrievalTask]] = {
    "passkey": Passkey,
    # All fields of the task are named here: the run's config, which is still in force, may bind them.
    **{f"s_niah_{level}": functools.partial(NeedleInAHaystack, level=level, paths=None) for level in (1, 2, 3)},
}
FACTORS = (1, 2, 4, 8)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
EXAMPLES = 20

DESCRIPTION = f"""\
A needle in a haystack: texts with something hidden in them, and a question about it at their end. A cell of the grid is
of texts of one length that hide it at one depth, 0 is their beginning and 1 their end. The same things are hidden at
every length and depth, with the run's tokenizer.

  score   share of the texts, in percent, after which greedy decoding writes the answer first, all of it

It is had without decoding: the model reads the answer as well, and every token of it must be the likeliest before it is
read. Texts go through the model's state in spans of {SPAN:,} tokens. With --write the model does write, up to twice the
answer's tokens, and what counts is whether the answer stands anywhere in that, as in RULER.

  passkey    a number among repeated sentences (Mohtashami and Jaggi 2023, arXiv 2305.16300)
  s_niah_1   a number among repeated sentences (RULER, Hsieh et al. 2024, arXiv 2404.06654)
  s_niah_2   a number in an essay, Python's documentation
  s_niah_3   a UUID in an essay"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--task",
        metavar="NAME",
        help=f"one of {', '.join(TASKS)} (default: the run's own where it is of this kind, as it was trained, else "
        "passkey)",
    )
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        metavar="N",
        help="tokens of a text with its question and answer (default: the training length times "
        f"{', '.join(map(str, FACTORS))}, but for those too short for a text)",
    )
    parser.add_argument(
        "--depths",
        type=float,
        nargs="+",
        default=list(DEPTHS),
        metavar="D",
        help=f"from 0 to 1 (default: {' '.join(f'{depth:g}' for depth in DEPTHS)})",
    )
    parser.add_argument(
        "--examples", type=int, default=EXAMPLES, metavar="N", help=f"texts in each cell (default: {EXAMPLES})"
    )
    parser.add_argument("--write", action="store_true", help="let the model write, and look for the answer in that")
    parser.add_argument("--span", type=int, default=SPAN, metavar="N", help=f"tokens in a span (default: {SPAN:,})")


def evaluate(run: TrainedRun, options: argparse.Namespace) -> Evaluation:
    require_positive(lengths=options.lengths, examples=options.examples, span=options.span)
    task = _task(run, options.task, options.examples)
    depths = sorted(set(options.depths))
    at_depth = {depth: dataclasses.replace(task, depth=depth) for depth in depths}
    lengths = _lengths(task, options.lengths, run.job.seq_len)

    reader, rows = make_reader(run.job.model, span=options.span), []

    def score(task: RetrievalTask, length: int, at_once: int) -> float:
        if options.write:
            return retrieval_score(run.job.model, run.params, task, length)
        return 100.0 * float(np.mean(answers_found(reader, run.params, task, length, at_once)))

    with tqdm(total=sum(lengths) * len(depths) * options.examples, unit=" tokens", unit_scale=True, leave=False) as bar:
        for length in lengths:
            at_once = rows_at_once(run, length, options.examples, options.span)
            for depth in depths:
                bar.set_postfix_str(f"length {length:,}, depth {depth:g}")
                rows.append({"length": length, "depth": depth, "score": score(at_depth[depth], length, at_once)})
                bar.update(length * options.examples)
    notes = [f"{_named(options.task, task)}: {options.examples} texts in each cell."]
    if lengths[-1] > run.job.seq_len:
        notes.append(f"The model was trained on {run.job.seq_len:,} tokens.")
    return Evaluation("length", {"length": "tokens", "score": "%"}, rows, y="depth", notes=notes)


def answers_found(reader: Reader, params: Any, task: RetrievalTask, length: int, at_once: int) -> np.ndarray:
    """For each of the task's held-out texts of this length whether greedy decoding begins with its answer.

    at_once: how many are read together.
    """
    examples = list(task.evaluation_rows(length))
    rows = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    answer = rows["weights"] > 0
    # The separator after an answer counts in training; what a model writes after it is not asked for here.
    answer[np.arange(len(answer)), length - 1 - np.argmax(answer[:, ::-1], axis=1)] = False
    correct = np.concatenate([_correct(reader, params, batch) for batch in batches_of(rows, at_once)])
    return (correct[: len(answer)] | ~answer).all(axis=1)


def _correct(reader: Reader, params: Any, batch: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([scores.correct for scores in reader(params, batch)], axis=1)


def _task(run: TrainedRun, name: str | None, examples: int) -> RetrievalTask:
    if name is not None and name not in TASKS:
        raise InputError(f"--task {name!r} does not exist; {nearest(name, TASKS)}")
    tokenizer = require_text(run, "needle")
    if name is None and isinstance(run.job.data, RetrievalTask):
        return dataclasses.replace(run.job.data, num_test_examples=examples)
    return TASKS[name or "passkey"](tokenizer=tokenizer, num_test_examples=examples)


def _lengths(task: RetrievalTask, asked: Sequence[int] | None, trained: int) -> list[int]:
    """Ascending. Raises `InputError` where one has no room for a text."""
    if asked:
        for length in asked:
            task.check_length(length)
        return sorted(set(asked))
    lengths = [factor * trained for factor in FACTORS]
    with_room = list(_with_room(task, lengths))
    if not with_room:
        task.check_length(lengths[-1])
    return with_room


def _with_room(task: RetrievalTask, lengths: Sequence[int]) -> Iterator[int]:
    for length in lengths:
        try:
            task.check_length(length)
        except InputError:
            continue
        yield length


def _named(name: str | None, task: RetrievalTask) -> str:
    return name or type(task).__name__
