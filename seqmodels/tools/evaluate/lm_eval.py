"""Suites of EleutherAI's lm-evaluation-harness, on a run's model with its own tokenizer."""

import argparse
from pathlib import Path

from seqmodels.errors import InputError
from seqmodels.tools._runs import TrainedRun
from seqmodels.tools.evaluate.evaluation import Evaluation

DESCRIPTION = """\
Tasks of EleutherAI's lm-evaluation-harness (pip install -e '.[lm-eval]'): those that it brings, and your own over local
files. Log-likelihoods and text are those of documents: a separator stands before each."""

UNITS = {"shots": "examples", "samples": "items", "shortened": "requests"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="NAME",
        help="tasks, groups of tasks, or patterns with *; `lm-eval ls tasks` lists those that the harness brings",
    )
    parser.add_argument(
        "--include_path",
        metavar="FOLDER",
        help="a folder with task files (YAML) of your own; paths in them are seen from the working directory",
    )
    parser.add_argument(
        "--limit", type=int, default=None, metavar="N", help="the first N items of each task (default: all)"
    )
    parser.add_argument(
        "--num_fewshot", type=int, default=None, metavar="N", help="examples in a context (default: as the task says)"
    )
    parser.add_argument("--batch_size", type=int, default=16, metavar="N", help="texts side by side (default: 16)")
    parser.add_argument(
        "--max_length",
        type=int,
        default=None,
        metavar="N",
        help="tokens that a token may have before it: contexts are cut on the left, long texts scored in pieces. For "
        "attention, which does not reach beyond what it was trained on (default: no limit)",
    )
    parser.add_argument(
        "--bare_context",
        action="store_true",
        help="leave out the separator before a context, as the harness does with most models of Hugging Face",
    )
    parser.add_argument("--draw_seed", type=int, default=0, metavar="N", help="of tasks that draw (default: 0)")


def evaluate(run: TrainedRun, options: argparse.Namespace) -> Evaluation:
    """A row for each task and metric; `stderr` where the harness has one, `shortened` what `--max_length` cut."""
    for name, least in (("limit", 1), ("num_fewshot", 0), ("batch_size", 1), ("max_length", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise InputError(f"--{name} is {value}; expected at least {least}")
    if options.include_path is not None and not Path(options.include_path).is_dir():
        raise InputError(f"--include_path {options.include_path} is no folder; expected one with task files (YAML)")
    tokenizer = run.job.data.tokenizer
    if tokenizer is None:
        data = type(run.job.data).__name__
        raise InputError(
            f"the suite lm_eval needs text, but the run was trained on {data}, whose tokens stand for none"
        )
    try:
        from seqmodels.evaluation.harness import HarnessModel, evaluate_tasks
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == "seqmodels":
            raise
        raise InputError(f"the suite lm_eval needs the package {error.name!r}: pip install -e '.[lm-eval]'") from error
    model = HarnessModel(
        run.job.model,
        run.params,
        tokenizer,
        batch_size=options.batch_size,
        max_length=options.max_length,
        bare_context=options.bare_context,
        seed=options.draw_seed,
    )
    rows = evaluate_tasks(
        model,
        options.tasks,
        include_path=options.include_path,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
    )
    return Evaluation(x="task", units=UNITS, rows=rows)
