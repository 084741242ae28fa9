"""The training loop.

    read a batch -> hand it to the device -> look at what has finished -> evaluate -> save

Nothing here waits for the device in order to log (`in_flight.py`). Before an evaluation or a save the loop
looks at every step so far, so that a step with a non-finite result ends the run before it can be evaluated or
saved.

The order at the end of a step is the contract of an exact resume: the rows of steps up to n, then the
evaluation at n, then the checkpoint n. So the rows that belong to a checkpoint are all stored when it is saved;
what a killed run has written beyond its last checkpoint is cut off and comes again.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import grain
import jax
from jax.sharding import Mesh

from seqmodels.errors import InputError, nearest
from seqmodels.files import copy_folder, in_bucket, told
from seqmodels.parallel.mesh import must_take_turns, place_batch
from seqmodels.parameter_rules import parameter_paths
from seqmodels.training.checkpoint import Checkpointer
from seqmodels.training.in_flight import StepsInFlight
from seqmodels.training.metrics import Report, less_is_better
from seqmodels.training.state import TrainState
from seqmodels.training.step import Batch, StepResult
from seqmodels.training.stop_request import StopRequest

STEPS_IN_FLIGHT = 4


class Ended(NamedTuple):
    """How a loop ended. step: how many updates the state has seen. finished: whether nothing is left to do; otherwise
    it was asked to stop, and a later one goes on."""

    state: TrainState
    step: int
    finished: bool


def training_loop(
    state: TrainState,
    batches: grain.DatasetIterator,
    *,
    start: int,
    steps: int,
    train_step: Callable[[TrainState, Batch], tuple[TrainState, StepResult]],
    evaluate: Callable[[Any], dict[str, float]],
    eval_every: int | None,
    checkpointer: Checkpointer,
    report: Report,
    mesh: Mesh,
    goal: tuple[str, float] | None = None,
    profile_steps: tuple[int, int] | None = None,
    profile_directory: str | os.PathLike | None = None,
) -> Ended:
    """Train until update number `steps`, an evaluation that reaches the goal, or until the process is asked to stop.
    The state is saved then.

    Args:
        state: after `start` updates; consumed.
        batches: stands at the batch of update `start + 1`.
        evaluate: parameters to metrics; called every `eval_every` updates and after the last one.
        goal: a name among the metrics of `evaluate` and a value; a run ends early once an evaluation has at least that,
            or where less is better at most.
        profile_steps: first and last update to trace into `profile_directory`.

    Raises:
        InputError: the evaluation reports nothing of the goal's name.
        NonFiniteError: from the first step whose loss, gradient or update is not finite.
    """
    limit = 0 if must_take_turns(mesh.devices.flat) else STEPS_IN_FLIGHT
    in_flight = StepsInFlight(limit, parameter_paths(state.params))
    jax.block_until_ready(state)
    profiler = _Profiler(profile_steps, profile_directory)

    def look_at_everything():
        for done in in_flight.drain():
            report.step(done.step, done.metrics)

    def reaches_goal(metrics):
        if goal is None:
            return False
        name, value = goal
        if name not in metrics:
            raise InputError(f"train.goal is {goal}, but the evaluation has no {name!r}: {nearest(name, metrics)}")
        return metrics[name] <= value if less_is_better(name) else metrics[name] >= value

    if goal is not None and start and eval_every and start % eval_every == 0 and reaches_goal(evaluate(state.params)):
        # The program was killed between the last save and the run's end.
        return Ended(state, start, True)
    step, last = start, start >= steps
    with StopRequest() as stop:
        while not last:
            step += 1
            profiler.before(step, look_at_everything)
            data_position = batches.get_state()
            batch = place_batch(next(batches), mesh)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, result = train_step(state, batch)
            in_flight.add(step, result, data_position)
            with jax.profiler.TraceAnnotation("wait for room"):
                in_flight.wait_for_room()
            with jax.profiler.TraceAnnotation("log"):
                for done in in_flight.finished():
                    report.step(done.step, done.metrics)
            profiler.after(step, look_at_everything)

            stopping = stop.requested_at(step)
            last = step == steps
            evaluation_due = last or (eval_every and step % eval_every == 0)
            save_due = last or stopping or (checkpointer.every and step % checkpointer.every == 0)
            if evaluation_due or save_due:
                look_at_everything()
            if evaluation_due:
                report.store()
                metrics = evaluate(state.params)
                report.evaluation(step, metrics)
                report.restart_clock()
                if reaches_goal(metrics):
                    last = save_due = True
            if save_due:
                report.store()
            if checkpointer.save(step, state, batches, final=last or stopping):
                report.restart_clock()
            if stopping:
                break
        profiler.end()
        checkpointer.wait()
    return Ended(state, step, last)


class _Profiler:
    """A trace of some steps from their first moment to their last: no other step is in it."""

    def __init__(self, steps: tuple[int, int] | None, directory: str | os.PathLike | None):
        self._first, self._last = steps or (0, 0)
        self._directory = directory
        self._local = os.fspath(directory) if directory is not None else ""
        self._tracing = False

    def before(self, step: int, wait: Callable[[], None]) -> None:
        if step == self._first:
            wait()
            if in_bucket(self._local):
                # JAX's profiler writes to disks only.
                self._local = tempfile.mkdtemp()
            jax.profiler.start_trace(self._local)
            self._tracing = True

    def after(self, step: int, wait: Callable[[], None]) -> None:
        if self._tracing and step == self._last:
            wait()
            self.end()

    def end(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False
            if in_bucket(self._directory):
                with told(f"cannot write {self._directory}", self._directory):
                    copy_folder(self._local, self._directory)
                shutil.rmtree(self._local)
