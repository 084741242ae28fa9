"""The view `train`: every mixer through the program that users start."""

import math
import re
import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax

from seqmodels.errors import InputError
from seqmodels.models.accounting import parameter_count, tree_bytes
from seqmodels.tools.survey import quickstart
from seqmodels.tools.survey.process import run
from seqmodels.tools.survey.views import Progress, Result, Table, View
from seqmodels.training import parameter_shapes
from seqmodels.training.run_directory import read_metrics

DESCRIPTION = """\
Runs `train.py --config configs/quickstart.gin` for each mixer, with its own file of configs/mixers in place of the
quickstart's, in a process and a run directory of its own, for --steps updates (warm-up: a fifth of them; evaluated
once, on two batches). The loss has to be finite and to fall; where it does not, the mixer is marked and the exit
code is 1.

  parameters     of the whole model
  first, last    loss of the first and of the last batch, nats per byte; held out: after the last update
  tokens/s       the median of what the program told; compilation, evaluation and saving are not in it
  state bytes    per layer and sequence, in float32; of a cache that grows, for one sequence of the batch
  peak MiB       the most resident memory of the process, with the compiler's"""

UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


def measure(mixer: str, options: Any, progress: Progress) -> Result:
    """Train it; the job is built here too, in shapes, to count its parameters and the bytes of its state."""
    with tempfile.TemporaryDirectory() as folder:
        file, run_dir = quickstart.write_config(mixer, Path(folder)), Path(folder) / "run"
        counts = _counts(file)
        changes = {
            "train.steps": options.steps,
            "train.log_every": max(1, options.steps // 10),
            "train.eval_every": None,
            "train.eval_batches": 2,
            "train.checkpoint_every": None,
            "train.sample_tokens": 0,
            "AdamW.warmup_steps": options.steps // 5,
        }
        overrides = [f"--gin.{name}={value}" for name, value in changes.items()]
        speeds: list[float] = []

        def hear(line: str) -> None:
            found = re.search(r"step +(\d+)/\d+: ", line)
            if found:
                progress(int(found[1]) / options.steps, f"step {found[1]} of {options.steps}")
            speed = re.search(r"([\d.]+)([kMG]?) tokens/s", line)
            if speed:
                speeds.append(float(speed[1]) * UNITS[speed[2]])

        progress(0, "start and compile")
        command = [str(quickstart.TRAIN), "--config", str(file), "--run_dir", str(run_dir), *overrides]
        ended = run(command, hear, threads=options.threads, folder=quickstart.ROOT)
        rows = read_metrics(run_dir / "metrics.jsonl")
    last_words = ended.errors.splitlines()[-1] if ended.errors else ""
    losses = [row["loss"] for row in rows if "loss" in row]
    held_out = [row["eval/loss"] for row in rows if "eval/loss" in row]
    if ended.code == 2:
        raise InputError(f"train.py with configs/mixers/{mixer}.gin: {last_words.removeprefix('error: ')}")
    return {
        **counts,
        "steps": options.steps,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "held_out_loss": held_out[-1] if held_out else None,
        "tokens_per_second": statistics.median(speeds) if speeds else None,
        "peak_bytes": ended.peak_bytes,
        "exit_code": ended.code,
        "error": last_words if ended.code else None,
    }


def _counts(file: Path) -> Result:
    job = quickstart.read_job(file)
    state = jax.eval_shape(lambda: job.model.initial_state(1, job.seq_len))
    parameters = parameter_count(parameter_shapes(job.model, job.seq_len))
    return {"parameters": parameters, "state_bytes": tree_bytes(state) // job.model.n_layers}


def failure(result: Result) -> str | None:
    """What is wrong with a run; None where nothing is."""
    first, last = result["first_loss"], result["last_loss"]
    if result["exit_code"]:
        return f"train.py ended with exit code {result['exit_code']}: {result['error']}"
    if first is None or last is None or not (math.isfinite(first) and math.isfinite(last)):
        return f"the loss is not finite: {first}, then {last}"
    if last >= first:
        return f"the loss does not fall: {first:.3f}, then {last:.3f}"
    return None


def failures(results: dict[str, Result]) -> list[str]:
    return [f"{mixer}: {why}" for mixer, result in results.items() if (why := failure(result))]


def tables(results: dict[str, Result], options: Any) -> list[Table]:
    columns = ("mixer", "parameters", "first", "last", "held out", "tokens/s", "state bytes", "peak MiB", "")
    rows = [
        (
            mixer,
            f"{x['parameters']:,}",
            *(_number(x[name], ".3f") for name in ("first_loss", "last_loss", "held_out_loss")),
            _number(x["tokens_per_second"], ",.0f"),
            f"{x['state_bytes']:,}",
            f"{x['peak_bytes'] / 2**20:,.0f}",
            "FAILED" if failure(x) else "falls",
        )
        for mixer, x in results.items()
    ]
    return [Table(f"Quickstart, {options.steps} steps, {options.threads} thread(s)", columns, rows)]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def check(options: Any) -> None:
    for name in ("steps", "threads"):
        if getattr(options, name) < (least := {"steps": 2, "threads": 1}[name]):
            raise InputError(f"--{name} is {getattr(options, name)}; expected at least {least}")


VIEW = View(
    "does it train: loss, speed, memory of a short run of train.py",
    DESCRIPTION,
    measure,
    tables,
    failures,
    None,
    {
        "steps": (int, 50, "updates of each run"),
        "threads": (int, 1, "threads of each run"),
    },
    check,
)
