"""Runs the worker for one generation, and goes on after programs at which the compiler ends its process."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from seqmodels.errors import EXIT_INPUT, InputError
from seqmodels.tools._processes import Program
from seqmodels.tools.kernel_report import hopper
from seqmodels.tools.kernel_report.cases import Request
from seqmodels.tools.kernel_report.programs import FunctionRequest

_LINES = 12  # of what the compiler says at its end


def compile_all(generation: str, requests: Sequence[NamedTuple], *, simulate: bool) -> Iterator[dict]:
    """What the compiler says of each request, in order, as soon as it is known: what `worker` prints.

    simulate: with libtpu's simulator. Where it ends its process, the program is compiled once more without it.
    """
    left = [request._asdict() for request in requests]
    while left:
        for result in _work(generation, left, simulate):
            if simulate and result.get("ended"):
                (result,) = _work(generation, left[:1], simulate=False)
                for kernel in result.get("program", {}).get("kernels", []):
                    kernel["remarks"].append("libtpu's simulator cannot follow it")
            left = left[1:]
            yield result


def compile_on_hopper(request: Request | FunctionRequest) -> dict:
    """{"kernels": ...}, or {"error": one line}. An operator that says what it does not support is no defect."""
    try:
        found = hopper.kernels_of(_built, request)
    except Exception as error:  # whatever a function that is being written raises is what its author wants to see
        expected = isinstance(error, InputError) or (isinstance(request, Request) and isinstance(error, ValueError))
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {"error": line, "message": str(error), "input_error": expected}
    return {"kernels": [{**x._asdict(), "blocks": x.blocks} for x in found]}


def _built(request: Request | FunctionRequest) -> tuple:
    built = request.build()
    return built.function, list(built.arguments)


def _work(generation: str, requests: Sequence[dict], simulate: bool) -> Iterator[dict]:
    """Results of one worker. One that ends early gives a result that says so for the program that it was at."""
    with tempfile.TemporaryDirectory(prefix="kernel-report-") as folder:
        task = {"generation": generation, "requests": requests, "simulate": simulate, "folder": folder}
        command = ["-m", "seqmodels.tools.kernel_report.worker", json.dumps(task)]
        yield from _listen(command, len(requests))


def _listen(command: Sequence[str], expected: int) -> Iterator[dict]:
    count = 0
    with Program(command, environment={**os.environ, "JAX_PLATFORMS": "cpu"}) as program:
        for line in program.lines():
            kind, _, rest = line.partition(" ")
            if kind == "result":
                count += 1
                yield json.loads(rest)
        ended = program.ended()
    said = [line for line in ended.errors.splitlines() if line.strip()]
    if ended.code == EXIT_INPUT:
        raise InputError(said[-1].removeprefix("error: "))
    if count < expected:
        telling = [x for x in said if "Check failed" in x or "Error" in x] or said or ["no reason given"]
        line = f"the compiler's process ended with code {ended.code}: {telling[-1].strip()[:300]}"
        yield {"error": line, "message": "\n".join([line, *said[-_LINES:]]), "ended": True}
