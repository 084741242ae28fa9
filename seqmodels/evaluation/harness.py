"""A trained model as EleutherAI's lm-evaluation-harness (Gao et al. 2021, doi 10.5281/zenodo.5371628) asks for it.

Everything that is scored or continued is a document: the separator of the run's tokenizer stands before it, as in
training. So log p(a) + log p(b | a) = log p(ab), where the tokenizer writes ab as a, then b.

Importing this module needs the package `lm_eval`, extra `lm-eval`.
"""

import difflib
import fnmatch
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from seqmodels.data.tokenizers import Tokenizer
from seqmodels.errors import InputError, UnreachableError, nearest
from seqmodels.evaluation.generation import Sampling, encode_prompt, write_until
from seqmodels.evaluation.likelihood import (
    Pair,
    encode_pair,
    score_continuations,
    score_texts,
    tokens_read,
    truncated,
    windows,
)
from seqmodels.models import LanguageModel

MAX_TOKENS = 256  # the harness's own default
BOOTSTRAP_ITERATIONS = 10_000
MAX_TOKENS_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING_NAMES = ("do_sample", "temperature", "top_k", "top_p")
# What other models can be asked for, at the value that asks for nothing.
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}


class Writing(NamedTuple):
    """How a task wants text to be written."""

    max_tokens: int
    stops: tuple[str, ...]
    sampling: Sampling


class HarnessModel(LM):
    """A language model and its tokenizer, to hand to `lm_eval.simple_evaluate`.

    batch_size: texts that are read or written side by side.
    max_length: tokens that a token may have before it; contexts are cut on the left. None for no limit: a state has
        none, and attention without a window pays for it.
    bare_context: leave out the separator before a context, but for an empty one.
    seed: of what is drawn, where a task draws.

    `shortened` counts by task the contexts that were cut, and the texts that were scored in pieces.
    """

    def __init__(
        self,
        model: LanguageModel,
        params: Any,
        tokenizer: Tokenizer,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        bare_context: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        for name, value in (("batch_size", batch_size), ("max_length", max_length)):
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; expected at least 1")
        self._model, self._params, self._tokenizer = model, params, tokenizer
        self._batch_size, self._max_length = batch_size, max_length
        self._bare_context, self._seed = bare_context, seed
        self.shortened: Counter[str | None] = Counter()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation) the log-likelihood in nats, and whether greedy decoding writes it."""
        pairs = []
        for request in requests:
            pair = self._pair(*request.args)
            pairs.append(truncated(pair, self._max_length))
            self.shortened[request.task_name] += len(pairs[-1].context) < len(pair.context)
        with _progress("log-likelihoods", tokens_read(pairs), disable_tqdm) as bar:
            scores = score_continuations(
                self._model, self._params, pairs, batch_size=self._batch_size, advance=bar.update
            )
        return [tuple(score) for score in scores]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of each text in nats, every token after all before it, or, under `max_length`, as
        `windows` says."""
        texts = [self._tokenizer.encode(request.args[0]) for request in requests]
        pieces = [windows(text, self._tokenizer.separator, self._max_length) for text in texts]
        for request, of_text in zip(requests, pieces):
            self.shortened[request.task_name] += len(of_text) > 1
        total = sum(map(tokens_read, pieces))
        with _progress("log-likelihoods of texts", total, disable_tqdm) as bar:
            return score_texts(
                self._model,
                self._params,
                texts,
                self._tokenizer.separator,
                max_length=self._max_length,
                batch_size=self._batch_size,
                advance=bar.update,
            )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What is written after each context, up to a stop string, the end of the document or as many tokens as the
        task has room for."""
        groups: dict[Writing, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(read_generation_kwargs(request.args[1], request.task_name), []).append(i)
        texts = [""] * len(requests)
        with _progress("texts", len(requests), disable_tqdm, unit="text") as bar:
            for writing, members in groups.items():
                written = write_until(
                    self._model,
                    self._params,
                    self._tokenizer,
                    [self._prompt(requests[i], writing.max_tokens) for i in members],
                    **writing._asdict(),
                    seed=self._seed,
                    batch_size=self._batch_size,
                    advance=bar.update,
                )
                for i, text in zip(members, written):
                    texts[i] = text
        return texts

    def _pair(self, context: str, continuation: str) -> Pair:
        pair = encode_pair(self._tokenizer, context, continuation)
        if self._bare_context and len(pair.context) > 1:
            return Pair(pair.context[1:], pair.continuation)
        return pair

    def _prompt(self, request: Instance, max_tokens: int) -> list[int]:
        """The context, cut so that the last token that is written has no more than `max_length` before it."""
        prompt = encode_prompt(self._tokenizer, request.args[0])
        if self._bare_context and len(prompt) > 1:
            prompt = prompt[1:]
        if self._max_length is None:
            return prompt
        room = self._max_length + 1 - max_tokens
        if room < 1:
            raise InputError(
                f"max_length is {self._max_length}, but the task {request.task_name!r} writes up to {max_tokens} "
                f"tokens: expected at least {max_tokens}"
            )
        self.shortened[request.task_name] += len(prompt) > room
        return prompt[-room:]


def _progress(what: str, total: int, disable: bool, unit: str = "token") -> tqdm:
    scale = {"unit_scale": True} if unit == "token" else {}
    return tqdm(total=total, desc=what, unit=f" {unit}s", file=sys.stderr, disable=disable, **scale)


def read_generation_kwargs(kwargs: Mapping[str, Any], task: str | None = None) -> Writing:
    """The `generation_kwargs` of a task. Without `do_sample`, a temperature says whether tokens are drawn.

    Raises `InputError` for what it does not know and would have to pass over.
    """
    known = {"until", *MAX_TOKENS_NAMES, *SAMPLING_NAMES, *NEUTRAL}
    for name, value in kwargs.items():
        where = f"generation_kwargs of the task {task!r}: {name} is {value!r}"
        if name not in known:
            raise InputError(f"{where}, which is not known here; {nearest(name, known)}")
        if name in NEUTRAL and value != NEUTRAL[name]:
            raise InputError(f"{where}; expected {NEUTRAL[name]}, there is nothing else here")
    limits = (kwargs[name] for name in MAX_TOKENS_NAMES if kwargs.get(name) is not None)
    until = kwargs.get("until") or ()
    return Writing(
        max_tokens=int(next(limits, MAX_TOKENS)),
        stops=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
        sampling=_sampling(kwargs),
    )


def _sampling(kwargs: Mapping[str, Any]) -> Sampling:
    do_sample, temperature = kwargs.get("do_sample"), kwargs.get("temperature")
    if do_sample is False or (do_sample is None and not temperature):
        return Sampling(0.0)
    return Sampling(
        temperature=1.0 if temperature is None else float(temperature),
        top_k=kwargs.get("top_k") or None,
        top_p=float(kwargs.get("top_p") or 1.0),
    )


def evaluate_tasks(
    model: HarnessModel,
    tasks: Sequence[str],
    *,
    include_path: str | Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> list[dict[str, float | int | str]]:
    """A row for every task, or group of tasks, and metric: `task`, `metric`, `filter`, `value`, `stderr` where there is
    one, `shots`, `samples`, and `shortened`, how many of the requests did not fit into `max_length`.

    tasks: names, or patterns with `*`, of what the harness brings or `include_path` has.
    include_path: a folder with task files (YAML). Paths in them are seen from the working directory.
    limit: the first so many items of each task; None for all. num_fewshot: examples in a context; None for the task's.
    """
    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    names = matching_tasks(tasks, manager.all_tasks)
    # The standard errors of some metrics are from a bootstrap, for which the harness would fork this process.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    try:
        results = simple_evaluate(
            model=model,
            tasks=names,
            task_manager=manager,
            limit=limit,
            num_fewshot=num_fewshot,
            bootstrap_iters=BOOTSTRAP_ITERATIONS,
            log_samples=False,
        )
    except ModuleNotFoundError as error:
        raise InputError(f"{', '.join(names)}: a package is missing: {_one_line(error)}") from error
    except ConnectionError as error:
        raise UnreachableError(f"{', '.join(names)}: the data cannot be reached: {_one_line(error)}") from error
    except OSError as error:
        raise InputError(f"{', '.join(names)}: the data cannot be read: {_one_line(error)}") from error
    return _rows(results, model.shortened)


def matching_tasks(patterns: Sequence[str], known: Sequence[str]) -> list[str]:
    """The known names that the patterns match, in the order of the patterns; each must match one."""
    found: dict[str, None] = {}
    for pattern in patterns:
        matches = fnmatch.filter(known, pattern)
        if not matches:
            # The harness knows too many names to list them.
            close = difflib.get_close_matches(pattern, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "`lm-eval ls tasks` lists those that it brings"
            raise InputError(f"there is no task {pattern!r}; {hint}")
        found |= dict.fromkeys(matches)
    return list(found)


def _one_line(error: Exception) -> str:
    """What a library has to say, without line ends."""
    return " ".join(str(error).split())


def _rows(results: Mapping[str, Any], shortened: Mapping[str | None, int]) -> list[dict[str, float | int | str]]:
    rows = []
    for task, values in results["results"].items():
        counts = {
            "shots": results["n-shot"].get(task),
            "samples": results["n-samples"].get(task, {}).get("effective"),
            "shortened": shortened.get(task, 0),
        }
        for name, value in values.items():
            metric, comma, filtered_by = name.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            row = {
                "task": task,
                "metric": metric,
                "filter": filtered_by,
                "value": value,
                "stderr": values.get(f"{metric}_stderr,{filtered_by}"),
                **counts,
            }
            rows.append({column: entry for column, entry in row.items() if entry not in (None, "N/A")})
    return rows
