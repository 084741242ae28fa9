"""All programs of one library, in a process of its own.

The parent writes a `Setup`, which is answered with `Ready` or `Failed`, and then `Job`s. Of a job every program is
answered with `Measured` or `Failed`, each after a `Doing`; `Done` is the last answer. Messages (messages.py) are
pickles on standard input and output.
"""

import os
import pickle
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from seqmodels.tools._measuring import measure
from seqmodels.tools.benchmark.cases import Inputs, Workload, inputs
from seqmodels.tools.benchmark.gpu.libraries import LIBRARIES, Function, Library, Placed, Program, sample
from seqmodels.tools.benchmark.gpu.messages import (
    PALLAS,
    REFERENCE,
    STEPS,
    XLA,
    Doing,
    Done,
    Failed,
    Job,
    Key,
    Measured,
    Ready,
    Setup,
)
from seqmodels.tools.benchmark.gpu.peers import peers
from seqmodels.tools.benchmark.programs import one_line

STATES = 8 * 2**30  # bytes of states that the reference may keep for its gradients, one of each token


def main() -> None:
    # Libraries print; only answers may reach the parent.
    pipe = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def answer(message: Any) -> None:
        pickle.dump(message, pipe)
        pipe.flush()

    setup: Setup = pickle.load(sys.stdin.buffer)
    try:
        library = LIBRARIES[setup.library](setup.platform)
    except ImportError as error:
        return answer(Failed(None, f"not installed: {one_line(error)}"))
    except Exception as error:
        return answer(Failed(None, one_line(error), traceback.format_exc()))
    answer(Ready(library.device))
    numbers = _Numbers()
    while True:
        try:
            job: Job = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        run(job, library, setup.repeats, numbers.of(job), answer)
        answer(Done())


class _Numbers:
    """Inputs of workloads, the next ones made while the device is busy: making them takes longer than measuring."""

    def __init__(self):
        self._pool = ThreadPoolExecutor(1)
        self._made: dict[Workload, Future] = {}

    def of(self, job: Job) -> Inputs:
        wanted = {job.workload, job.following} - {None}
        self._made = {each: made for each, made in self._made.items() if each in wanted}
        for each in (job.workload, job.following):
            if each is not None and each not in self._made:
                self._made[each] = self._pool.submit(inputs, each)
        return self._made[job.workload].result()


def run(job: Job, library: Library, repeats: int, given: Inputs, answer: Callable[[Any], None]) -> None:
    """Measure the programs of a job, in their order."""
    answer(Doing(None, "arrays"))
    placed = library.place(given, job.workload)
    answer(Doing(None, "compile"))
    loads = {key: partial(_function, key.name, job.workload, given) for key in job.keys}
    prepared = library.prepare(loads, placed)
    for key in job.keys:
        answer(Doing(key, "forward + backward" if key.backward else "forward"))
        try:
            answer(_measured(key, prepared.pop(key)(), library, repeats, placed))
        except ImportError as error:
            answer(Failed(key, f"not installed: {one_line(error)}"))
        except Exception as error:
            # Whatever a library raises is an answer: the parent says it and measures the others.
            answer(Failed(key, one_line(error), traceback.format_exc()))
            library.check()
    del placed, prepared
    library.free()


def _measured(key: Key, program: Program, library: Library, repeats: int, placed: Placed) -> Measured:
    values = program.call(placed.one_cotangent)
    library.wait(values)
    of_one = {name: library.to_numpy(sample(name, x, placed.sequences)) for name, x in values.items()}
    of_one = {name: np.ascontiguousarray(x) for name, x in of_one.items()}
    del values
    about = (program.seconds, program.temporary_bytes, program.form)
    if key.name == REFERENCE:
        return Measured(key, of_one, (), 0, 0.0, *about)
    timing = measure(partial(library.span, partial(program.call, placed.cotangent)), repeats)
    return Measured(key, of_one, timing.seconds, timing.calls, timing.host, *about)


def _function(name: str, workload: Workload, given: Inputs) -> Function:
    if name in (XLA, PALLAS, REFERENCE):
        return _ours(name, workload, given)
    (peer,) = (p for p in peers(workload.op, workload.case) if p.name == name)
    return Function(peer.load(given))


def _ours(name: str, workload: Workload, given: Inputs) -> Function:
    from seqmodels.registry import ops

    op = ops()[workload.op]
    form = "chunked"
    if name == REFERENCE and workload.length <= STEPS and not op.state_grows and _states(op, workload, given) <= STATES:
        form = "recurrent"
    how = {**given.options, "form": form, "backend": PALLAS if name == PALLAS else XLA}
    return Function(lambda **arrays: op.call(**arrays, **how)[0], form, alone=name == REFERENCE)


def _states(op: Any, workload: Workload, given: Inputs) -> int:
    """Bytes of the states of one sequence, one for each token."""
    import jax

    from seqmodels.models.accounting import tree_bytes

    _, state = jax.eval_shape(lambda arrays: op.call(**arrays, **given.options), given.arrays)
    return workload.length * tree_bytes(state) // workload.batch


if __name__ == "__main__":
    main()
