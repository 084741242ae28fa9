"""The suite `throughput`: speed and memory of a model by length, in training and in decoding."""

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from seqmodels.errors import InputError
from seqmodels.machine import share_of_cores
from seqmodels.models.accounting import tree_bytes
from seqmodels.parallel.mesh import make_mesh
from seqmodels.tools._measuring import Span, Timing, extrapolated, machine_memory, measure, span
from seqmodels.tools._runs import TrainedRun
from seqmodels.tools.compile_check.check import batch_shapes, reason
from seqmodels.tools.evaluate.evaluation import Evaluation, Row
from seqmodels.training import TrainingJob, create_state, parameter_shapes, say
from seqmodels.training.step import TrainStep

DESCRIPTION = """\
Speed and memory of the run's model by length, on one device, with random tokens.

  training    the run's own step, forward, backward and update, on batches of the same number of tokens at every
              length: fewer sequences, longer ones. Bytes are those of the compiled program's arguments (parameters,
              the optimizer's state, the batch) and temporaries.
  decoding    a batch of texts of each length, read in spans through the state, but for the last tokens, which are
              decoded one at a time. Bytes are those of the state of one text; a cache that grows is made for the
              whole of it.

Programs are compiled and called once before they are measured. A measurement has as many calls as take 50 ms, and the
fastest of several counts; how far the slowest is from it is said. What does not fit the memory or takes too long is
left out, and the reason is said; bytes that are known without running it stay."""

UNITS = {
    "length": "tokens",
    "training_tokens_per_second": "tokens/s",
    "training_bytes": "bytes",
    "decoding_tokens_per_second": "tokens/s",
    "state_bytes": "bytes",
}
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
REPEATS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    lengths = " ".join(map(str, LENGTHS))
    options: dict[str, tuple[dict[str, Any], str]] = {
        "lengths": (
            {"type": int, "nargs": "+", "default": list(LENGTHS)},
            f"tokens of a sequence (default: {lengths})",
        ),
        "tokens": ({"type": int}, "tokens of a training batch, a multiple of every length (default: the longest)"),
        "decode_batch": ({"type": int, "default": 8}, "texts that are decoded at once (default: 8)"),
        "decoded": ({"type": int, "default": 64}, "tokens at the end of a text that are decoded (default: 64)"),
        "span": ({"type": int, "default": 512}, "tokens before them that are read at once (default: 512)"),
        "max_bytes": ({"type": float}, "memory that training or decoding may take (default: the device's)"),
        "max_seconds": ({"type": float, "default": 120.0}, "time for a length's training or decoding (default: 120)"),
    }
    for name, (how, text) in options.items():
        parser.add_argument(f"--{name}", metavar="SECONDS" if name == "max_seconds" else "N", help=text, **how)


def evaluate(run: TrainedRun, options: argparse.Namespace) -> Evaluation:
    """A row for each length, the shortest first; cells that were left out are missing. The run is left as it is.

    Raises InputError for options that do not go together.
    """
    lengths = sorted(set(options.lengths))
    _check(options, lengths)
    tokens = options.tokens or lengths[-1]
    device = jax.devices()[0]
    limit = _memory_of(device) if options.max_bytes is None else options.max_bytes
    # A mixer is linear or quadratic in the length; batches have the same tokens at all of them, texts do not.
    tasks = [
        ("training", _Training(run, tokens), _Limits(limit, options.max_seconds, powers=(0, 1))),
        ("decoding", _Decoding(run, options), _Limits(limit, options.max_seconds, powers=(1, 2))),
    ]
    left_out: list[str] = []
    rows: list[Row] = [{"length": length, **_state_bytes(run.job.model, length)} for length in lengths]
    with tqdm(total=len(rows) * len(tasks), desc="throughput", unit="cell", disable=None, leave=False) as bar:
        for row in rows:
            for name, task, limits in tasks:
                where = f"length {row['length']:,}, {name}"
                try:
                    with limits.cell(row["length"]):
                        told = f"{where}: {task.measure(row, limits)}{_peak(device)}"
                except _LeftOutError as why:
                    told = f"{where}: left out, {why}"
                    left_out.append(f"{told}.")
                say(told)
                bar.update()
    notes = [
        f"Batches of {tokens:,} tokens in training, {options.decode_batch:,} texts at once in decoding; one "
        f"{device.device_kind} device.",
        *left_out,
    ]
    rows = [{name: row[name] for name in UNITS if name in row} for row in rows]
    return Evaluation("length", UNITS, rows, notes=notes)


def _check(options: argparse.Namespace, lengths: list[int]) -> None:
    for name in ("tokens", "decode_batch", "decoded", "span", "max_bytes", "max_seconds"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name} is {value}; expected more than 0")
    if lengths[0] <= options.decoded:
        raise InputError(
            f"--lengths has {lengths[0]}; expected more than the {options.decoded} tokens that are decoded (--decoded)"
        )
    for length in lengths:
        if options.tokens and options.tokens % length:
            raise InputError(f"--tokens is {options.tokens}; expected a multiple of every length, {length} among them")
        if not options.tokens and lengths[-1] % length:
            raise InputError(
                f"--lengths has {length}, which does not divide {lengths[-1]}; give --tokens that all divide"
            )


class _LeftOutError(Exception):
    """A cell is not measured; the message says why."""


class _Limits:
    """What a cell may take, for one column of cells.

    powers: of the length, by which the time of a cell grows at least and at most.
    """

    def __init__(self, max_bytes: float, max_seconds: float, *, powers: tuple[float, float]):
        self._bytes, self._seconds, self._powers = max_bytes, max_seconds, powers
        self._taken: list[tuple[int, float]] = []

    @contextlib.contextmanager
    def cell(self, length: int) -> Iterator[None]:
        """Raises where it would take too long, going by the shorter ones, or turns out not to fit the memory."""
        expected = extrapolated(self._taken, length, *self._powers)
        if expected > self._seconds:
            raise _LeftOutError(f"expected to take {expected:.3g} s, over the limit of {self._seconds:g}")
        self._began = time.perf_counter()
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise _LeftOutError(reason(str(error))) from error
        finally:
            self._taken.append((length, time.perf_counter() - self._began))

    def check_time(self, ahead: float = 0.0) -> None:
        """Raises where the cell has taken too long, or will with what is `ahead`, in seconds."""
        taken = time.perf_counter() - self._began + ahead
        if taken > self._seconds:
            raise _LeftOutError(f"takes at least {taken:.3g} s, over the limit of {self._seconds:g}")

    def check_memory(self, needed: int) -> None:
        if needed > self._bytes:
            raise _LeftOutError(f"needs {_size(needed)}, over the limit of {_size(self._bytes)}")


class _Training:
    """Steps of the run's own training, each on the same batch."""

    def __init__(self, run: TrainedRun, tokens: int):
        self._run, self._tokens = run, tokens
        self._mesh = make_mesh(devices=jax.devices()[:1])
        self._transform = run.job.optimizer.build(parameter_shapes(run.job.model, run.job.seq_len), run.job.steps)

    def measure(self, row: Row, limits: _Limits) -> str:
        """Puts into the row what is found, as it is found; returns a line that tells it."""
        with jax.set_mesh(self._mesh):
            step, program, state, batch = self.compiled(row["length"])
            row["training_bytes"] = program_bytes(program)
            limits.check_memory(row["training_bytes"])
            limits.check_time()

            def update() -> Any:
                nonlocal state
                state, result = program(state, batch, step.hyperparameters)
                return result

            timing = _timing(lambda calls: span(update, calls, jax.block_until_ready), limits)
        row["training_tokens_per_second"] = self._tokens / timing.best
        return _told(row["training_tokens_per_second"], timing, row["training_bytes"])

    def compiled(self, length: int) -> tuple[TrainStep, Any, Any, Any]:
        """The step for sequences of this length, its program, a state that it starts with, and a batch."""
        job = self._job(length)
        # A step consumes the state that it is given, and the run's parameters are still needed.
        params = jax.tree.map(jnp.copy, self._run.params)
        start = {"seq_len": length, "seed": job.seed, "mesh": self._mesh, "params": params}
        state, batch = create_state(job.model, self._transform, **start), self.batch(length)
        step = job.train_step(self._mesh, state)
        return step, step.lower(state, batch).compile(), state, batch

    def batch(self, length: int) -> dict[str, jax.Array]:
        job = self._job(length)
        return _random(batch_shapes(job, self._mesh), job.data.vocab_size)

    def _job(self, length: int) -> TrainingJob:
        # The parts of an accumulated batch would be other ones at other lengths.
        changes = {"batch_size": self._tokens // length, "seq_len": length, "accumulate": 1}
        return dataclasses.replace(self._run.job, **changes)


class _Decoding:
    """Steps at the end of texts that the model has read, each of one token in every text."""

    def __init__(self, run: TrainedRun, options: argparse.Namespace):
        self._run, self._options = run, options
        model = run.job.model

        def read(params: Any, tokens: Any, state: Any) -> Any:
            return model.apply({"params": params}, tokens, state)[1]

        def write(params: Any, tokens: Any, state: Any) -> tuple[Any, Any]:
            logits, state = model.apply({"params": params}, tokens[:, None], state)
            return jnp.argmax(logits[:, -1], axis=-1), state

        # A cache is written in its place, not copied.
        self._read, self._write = (jax.jit(call, donate_argnames="state") for call in (read, write))
        self._copied = jax.jit(lambda state: jax.tree.map(jnp.copy, state))

    def measure(self, row: Row, limits: _Limits) -> str:
        """As that of training."""
        batch = self._options.decode_batch
        if "state_bytes" not in row:
            raise _LeftOutError(f"{type(self._run.job.model).__name__} does not decode; expected a language model")
        # The states that texts have been read to are kept, and others decoded with.
        limits.check_memory(tree_bytes(self._run.params) + 2 * batch * row["state_bytes"])
        kept = self.states(row["length"], limits)

        def decode(calls: int) -> Span:
            tokens, state = jnp.zeros(batch, jnp.int32), jax.block_until_ready(self._copied(kept))

            def step() -> Any:
                nonlocal tokens, state
                tokens, state = self._write(self._run.params, tokens, state)
                return tokens

            return span(step, calls, jax.block_until_ready)

        decode(1)
        timing = _timing(decode, limits, most_calls=self._options.decoded)
        row["decoding_tokens_per_second"] = batch / timing.best
        return _told(row["decoding_tokens_per_second"], timing, row["state_bytes"])

    def states(self, length: int, limits: _Limits) -> Any:
        """Those of a batch of texts made for this length, before the tokens that are decoded."""
        model, batch, vocabulary = self._run.job.model, self._options.decode_batch, self._run.job.data.vocab_size
        state = jax.jit(lambda: model.initial_state(batch, length))()
        end = length - self._options.decoded
        text = _random({"tokens": jax.ShapeDtypeStruct((batch, end), jnp.int32)}, vocabulary)["tokens"]
        for start in range(0, end, self._options.span):
            tokens = text[:, start : start + self._options.span]
            state = jax.block_until_ready(self._read(self._run.params, tokens, state))
            limits.check_time()
        return state


def _state_bytes(model: Any, length: int) -> Row:
    """Of one text of this length; nothing for a model without a state."""
    if not hasattr(model, "initial_state"):
        return {}
    return {"state_bytes": tree_bytes(jax.eval_shape(lambda: model.initial_state(1, length)))}


def _timing(run: Callable[[int], Span], limits: _Limits, **how: int) -> Timing:
    """Of calls that have been compiled; the first is made here and not counted."""
    first = run(1)
    limits.check_time(ahead=first.device)
    return measure(run, REPEATS, first=first, **how)


def _told(speed: float, timing: Timing, size: int) -> str:
    apart = f", {len(timing.seconds)} measurements within {timing.spread:.0%}" if len(timing.seconds) > 1 else ""
    return f"{speed:,.0f} tokens/s{apart}; {_size(size)}"


def program_bytes(compiled: Any) -> int:
    """What a compiled program needs: its arguments and its temporaries."""
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def _random(shapes: dict[str, jax.ShapeDtypeStruct], vocabulary: int) -> dict[str, jax.Array]:
    """Arrays of a batch: ids or numbers at random, in one document of which every position counts."""
    random = np.random.default_rng(0)

    def values(name: str, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if name in ("weights", "segment_ids"):
            return np.ones(shape.shape, shape.dtype)
        if jnp.issubdtype(shape.dtype, jnp.integer):
            return random.integers(vocabulary, size=shape.shape, dtype=shape.dtype)
        return random.standard_normal(shape.shape).astype(shape.dtype)

    return {name: jax.device_put(values(name, shape), shape.sharding) for name, shape in shapes.items()}


def _memory_of(device: jax.Device) -> float:
    """Bytes that a program may take on it."""
    return (device.memory_stats() or {}).get("bytes_limit") or machine_memory(share_of_cores())


def _peak(device: jax.Device) -> str:
    """The most that the device has held since the start of the process, where it counts that."""
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    return f"; at most {_size(peak)} in use on the device so far" if peak else ""


def _size(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**10:,.0f} KiB"
