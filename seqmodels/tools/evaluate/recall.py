"""The suite `recall`: the run's own synthetic task, at other lengths and with other fields."""

import argparse
import ast
import dataclasses
import itertools
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from tqdm import tqdm

from seqmodels.config._types import accepts, describe
from seqmodels.data.synthetic._task import SyntheticTask
from seqmodels.data.transforms import Batch
from seqmodels.errors import InputError, nearest
from seqmodels.parallel.mesh import make_mesh
from seqmodels.tools._runs import TrainedRun
from seqmodels.tools.evaluate._texts import require_positive
from seqmodels.tools.evaluate.evaluation import Evaluation
from seqmodels.training import make_evaluator

LENGTH = "length"
EXAMPLES = 500

DESCRIPTION = """\
The synthetic task that the run was trained on, at other lengths and with other numbers of pairs, or whatever else is a
field of the task: every combination of the values, each with the metrics that the training's evaluation reports. The
examples are held-out ones. Combinations that the task does not have, such as more pairs than a text has room for, are
left out and named.

  --lengths 64 128 256 --pairs 4 8 16               MQAR
  --lengths 128 1024 --vary num_tokens=8,16         selective copying"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths", type=int, nargs="+", metavar="N", help="tokens of an example (default: the training length)"
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="FIELD=A,B,...",
        help="values of a field of the task; may be given several times",
    )
    parser.add_argument("--pairs", type=int, nargs="+", metavar="N", help="short for --vary num_kv_pairs=...")
    parser.add_argument(
        "--examples", type=int, default=EXAMPLES, metavar="N", help=f"of each combination (default: {EXAMPLES})"
    )


def evaluate(run: TrainedRun, options: argparse.Namespace) -> Evaluation:
    require_positive(lengths=options.lengths, examples=options.examples, pairs=options.pairs)
    task = run.job.data
    if not isinstance(task, SyntheticTask):
        raise InputError(
            f"recall varies a synthetic task, but the run was trained on {type(task).__name__}; expected a run on one "
            "of configs/tasks, or --suite perplexity or needle"
        )
    axes = {
        LENGTH: list(dict.fromkeys(options.lengths or [run.job.seq_len])),
        **_fields(task, options.vary, options.pairs),
    }
    points, left_out = _points(run, axes, options.examples)
    varying = [name for name in axes if len({str(point[name]) for point, _ in points}) > 1] or [LENGTH]
    constant = [f"{name} {points[0][0][name]}" for name in axes if name not in varying]
    notes = [", ".join([type(task).__name__, *constant, f"{options.examples:,} examples"]) + ".", *left_out]

    rows = []
    total = options.examples * sum(point[LENGTH] for point, _ in points)
    with tqdm(total=total, leave=False, unit=" tokens", unit_scale=True) as bar:
        for point, varied in points:
            bar.set_postfix_str(", ".join(f"{name} {value}" for name, value in point.items()))
            keys = {name: _in_table(point[name]) for name in varying}
            rows.append(keys | _measure(run, varied, point[LENGTH], bar))
    units = {LENGTH: "tokens", "loss": "nats" if task.input_size is None else "squared error"}
    return Evaluation(varying[0], units, rows, notes=notes)


def _fields(task: SyntheticTask, vary: Sequence[str], pairs: Sequence[int] | None) -> dict[str, list[Any]]:
    """The values of each field that is varied."""
    name = type(task).__name__
    hints = typing.get_type_hints(type(task))
    fields = [field.name for field in dataclasses.fields(task) if field.name != "num_test_examples"]
    given = [*([f"num_kv_pairs={','.join(map(str, pairs))}"] if pairs else []), *vary]
    found: dict[str, list[Any]] = {}
    for text in given:
        field, equals, values = text.partition("=")
        if not equals or not values:
            raise InputError(f"--vary {text!r}: expected FIELD=A,B,...")
        if field not in fields:
            raise InputError(f"--vary {text!r}: {name} has no field {field!r}; {nearest(field, fields)}")
        if field in found:
            raise InputError(f"--vary gives {field} twice; expected each field once")
        found[field] = _values(values)
        for value in found[field]:
            if not accepts(hints[field], value):
                raise InputError(f"--vary {text!r}: {value!r} is no {describe(hints[field])}")
    return found


def _values(text: str) -> list[Any]:
    """Of A,B,... as Python writes them; a name without quotes is a string."""
    try:
        return list(dict.fromkeys(ast.literal_eval(f"({text},)")))
    except (SyntaxError, ValueError):
        return list(dict.fromkeys(text.split(",")))


def _points(
    run: TrainedRun, axes: Mapping[str, Sequence[Any]], examples: int
) -> tuple[list[tuple[dict[str, Any], SyntheticTask]], list[str]]:
    """Each combination with its task, and a sentence for each that the task or the model does not have."""
    points, left_out = [], []
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values))
        try:
            points.append((point, _varied(run, point, examples)))
        except InputError as error:
            left_out.append(f"Left out: {', '.join(f'{name} {value}' for name, value in point.items())}: {error}.")
    if not points:
        raise InputError(f"none of the combinations can be had: {left_out[0].removeprefix('Left out: ')}")
    return points, left_out


def _varied(run: TrainedRun, point: Mapping[str, Any], examples: int) -> SyntheticTask:
    fields = {name: value for name, value in point.items() if name != LENGTH}
    task = dataclasses.replace(run.job.data, num_test_examples=examples, **fields)
    task.check_length(point[LENGTH])
    if task.vocab_size > run.job.model.vocab_size:
        raise InputError(
            f"the task has tokens up to {task.vocab_size - 1}; expected at most {run.job.model.vocab_size - 1}, as the "
            "model knows"
        )
    if task.input_size != run.job.data.input_size:
        raise InputError(f"the task has {task.input_size} numbers at a position; expected {run.job.data.input_size}")
    return task


def _measure(run: TrainedRun, task: SyntheticTask, length: int, bar: tqdm) -> dict[str, float]:
    """What the training's evaluation reports, over all held-out examples of the task."""
    job, examples = run.job, task.num_test_examples
    batch_size = min(examples, max(1, job.batch_size * job.seq_len // length))

    def batches() -> Iterator[Batch]:
        for i, batch in enumerate(task.evaluation_batches(batch_size, length)):
            yield batch
            bar.update(length * min(batch_size, examples - i * batch_size))

    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    evaluator = make_evaluator(job.model, batches, mesh=mesh, loss=job.loss, metrics=task.metrics)
    with jax.set_mesh(mesh):
        return evaluator(run.params)


def _in_table(value: Any) -> int | float | str:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
