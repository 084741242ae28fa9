"""One measured program in a process of its own, so that its threads, its memory and its libraries are its own.

The parent writes one `Task`, and the worker answers with `Ready` or `Skipped`; then each line that the parent writes
is answered with a `Run`, until the parent closes the pipe. Messages (messages.py) are pickles on standard
input and output.
"""

import contextlib
import ctypes
import gc
import math
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from seqmodels.errors import InputError
from seqmodels.tools._measuring import extrapolated, machine_memory
from seqmodels.tools.benchmark.cases import Inputs, Workload, inputs
from seqmodels.tools.benchmark.messages import Ready, Run, Skipped, Subject, Task
from seqmodels.tools.benchmark.peers import peers
from seqmodels.tools.benchmark.programs import jax_step, one_line, torch_step

SHORTEST_RUN = 0.1  # CPU seconds; shorter calls are repeated within a run
GRANULE = 64  # tokens; some programs take only whole chunks of this size


class Program(NamedTuple):
    """`call` does the whole work and returns the values, `to_numpy` turns one into float32; the rest as in `Ready`."""

    call: Callable[[], dict[str, Any]]
    to_numpy: Callable[[Any], np.ndarray]
    compile_seconds: float | None = None
    temporary_bytes: int | None = None


def main() -> None:
    # Libraries print; only answers may reach the parent.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    task: Task = pickle.load(sys.stdin.buffer)
    try:
        program, ready = _prepare(task)
    except _Skip as skip:
        return _answer(answers, Skipped(str(skip)))
    except InputError as error:
        return _answer(answers, Skipped(str(error), input_error=True))
    except Exception as error:
        # Whatever a library raises is an answer: the parent says it and measures the others.
        return _answer(answers, Skipped(one_line(error), traceback=traceback.format_exc()))
    _answer(answers, ready)
    calls = 1
    while sys.stdin.buffer.readline():
        run = _timed(program.call, calls)
        if run.cpu * calls < SHORTEST_RUN:
            calls = math.ceil(SHORTEST_RUN / max(run.cpu, 1e-6))
            run = _timed(program.call, calls)
        _answer(answers, run)


class _Skip(Exception):
    """The program is not worth running, or cannot be."""


def _answer(pipe: BinaryIO, answer: Ready | Skipped | Run) -> None:
    pickle.dump(answer, pipe)
    pipe.flush()


def _prepare(task: Task) -> tuple[Program, Ready]:
    if task.limit is not None:
        _check_prediction(task)
    program = _program(task, task.workload)
    before = _resident_bytes()
    values = program.call()
    peak = None if before is None else _peak_bytes() - before
    sent = {name: program.to_numpy(x) for name, x in values.items()} if task.values else {}
    return program, Ready(program.compile_seconds, program.temporary_bytes, peak, sent)


def _check_prediction(task: Task) -> None:
    """Run about a sixteenth and a quarter of the length, and skip what would take too long.

    Time is taken to grow as a power of the length: the one that both runs show, and at least the first. What is
    quadratic or worse shows by then.
    """
    length = task.workload.length
    shorter: list[tuple[int, float]] = []
    for part in (length // 16, length // 4):
        part -= part % GRANULE
        if not part:
            continue
        call = _program(task, task.workload._replace(length=part)).call
        call()
        shorter.append((part, _timed(call, 1).cpu))
        predicted = extrapolated(shorter, length, least_power=1.0)
        if predicted > task.limit:
            raise _Skip(f"predicted at least {predicted:.0f} CPU s per call, over the limit of {task.limit:g}")


def _program(task: Task, workload: Workload) -> Program:
    given = inputs(workload)
    if task.subject.peer is None:
        return _jax_program(_our_function(task.subject, workload, given), given, task)
    (peer,) = (p for p in peers(workload.op, workload.case) if p.name == task.subject.peer)
    try:
        function = peer.load(given)
    except ImportError as error:
        raise _Skip(f"not installed: {one_line(error)}") from error
    make = {"torch": _torch_program, "jax": _jax_program}[peer.framework]
    return make(function, given, task)


def _our_function(subject: Subject, workload: Workload, given: Inputs) -> Callable[..., Any]:
    from seqmodels.registry import ops

    call = ops()[workload.op].call
    how = {**given.options, "form": subject.form, "chunk_size": subject.chunk_size}
    return lambda **arrays: call(**arrays, **how)[0]


def _jax_program(function: Callable[..., Any], given: Inputs, task: Task) -> Program:
    import jax
    import jax.numpy as jnp

    def put(name: str, x: np.ndarray) -> jax.Array:
        return jnp.asarray(x, "float32" if name == "g" else task.workload.dtype)

    arrays = {name: jax.tree.map(partial(put, name), x) for name, x in given.arrays.items()}
    cotangent = put("o", given.cotangent)
    start = time.process_time()
    compiled = jax.jit(jax_step(function, task.backward)).lower(arrays, cotangent).compile()
    seconds = time.process_time() - start
    temporary = compiled.memory_analysis().temp_size_in_bytes
    most = machine_memory()
    if temporary > most:
        raise _Skip(f"needs {temporary / 2**30:.0f} GiB of memory, over the {most / 2**30:.0f} that it may use here")
    return Program(
        lambda: jax.block_until_ready(compiled(arrays, cotangent)),
        lambda x: np.asarray(x, np.float32),
        seconds,
        temporary,
    )


def _torch_program(function: Callable[..., Any], given: Inputs, task: Task) -> Program:
    import torch
    from jax import tree

    torch.set_num_threads(task.threads)

    def put(name: str, x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x).to(torch.float32 if name == "g" else getattr(torch, task.workload.dtype))

    def trained(name: str, x: np.ndarray) -> torch.Tensor:
        return put(name, x).requires_grad_(task.backward)

    arrays = {name: tree.map(partial(trained, name), x) for name, x in given.arrays.items()}
    call = partial(torch_step(function, task.backward), arrays, put("o", given.cotangent))
    return Program(call, lambda x: x.float().numpy())


def _timed(call: Callable[[], Any], calls: int) -> Run:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    return Run((time.process_time() - cpu) / calls, (time.perf_counter() - wall) / calls)


def _resident_bytes() -> int | None:
    """Resident memory now, and the start of a new peak. What was freed goes back to the system first, where it can."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # no glibc
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux
        return None
    return _status("VmRSS")


def _peak_bytes() -> int:
    return _status("VmHWM")


def _status(field: str) -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
