"""A million tokens trained on by eight virtual CPU devices and by one: memory of a device, and time.

Run as a program, `python -m seqmodels.tools.long_context.memory DEVICES STEPS`, it is one of the two measurements.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from seqmodels.errors import run_main
from seqmodels.tools.long_context.views import View, experiment, use_cpu_devices

DESCRIPTION = """\
The first updates of configs/long_context/million_tokens.gin, one sequence of 1,048,576 bytes of text, on one virtual
CPU device and on eight that split it. Both share this machine's cores, so the time tells what the exchange costs, not
what more devices bring.

  state, temporaries   bytes of a device, by the compiler
  process              the most resident memory of the whole process, all devices and the compiler
  seconds              of an update, the median after the first
  losses               of the updates; "apart" is the largest difference, relative"""

COLUMNS = ("devices", "state MiB", "temporaries MiB", "process GiB", "seconds", "losses", "apart")


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=4, metavar="N", help="updates (default: 4)")


def measure(options: argparse.Namespace) -> list[Sequence[str]]:
    from seqmodels.tools.survey.process import run

    experiment("million_tokens")
    found = {}
    for devices in (1, 8):
        said: list[str] = []

        def hear(line: str, said: list[str] = said) -> None:
            said.append(line)
            if not line.startswith("{"):
                print(line, flush=True)

        command = ["-m", "seqmodels.tools.long_context.memory", str(devices), str(options.steps)]
        ended = run(command, hear, threads=2, folder=Path.cwd())
        if ended.code:
            raise RuntimeError(f"training on {devices} devices ended with exit code {ended.code}:\n{ended.errors}")
        found[devices] = {**json.loads(said[-1]), "process": ended.peak_bytes}
    rows: list[Sequence[str]] = [COLUMNS]
    for devices, x in found.items():
        apart = max(abs(a / b - 1) for a, b in zip(x["losses"], found[1]["losses"]))
        sizes = (f"{x['state'] / 2**20:,.1f}", f"{x['temporaries'] / 2**20:,.0f}", f"{x['process'] / 2**30:.1f}")
        losses = ", ".join(f"{loss:.4f}" for loss in x["losses"])
        rows.append((str(devices), *sizes, f"{x['seconds']:.0f}", losses, f"{apart:.0e}"))
    return rows


VIEW = View("a million tokens on eight virtual devices and on one", DESCRIPTION, _add, measure)


def _train(argv: list[str]) -> None:
    count, steps = (int(text) for text in argv)
    use_cpu_devices(count)
    import jax
    import numpy as np

    from seqmodels import config
    from seqmodels.constructors import register_constructors
    from seqmodels.parallel.mesh import place_batch
    from seqmodels.start_up import prepare_jax
    from seqmodels.training import TrainingJob, create_state, parameter_shapes

    prepare_jax()
    register_constructors()
    config.parse([experiment("million_tokens")])
    job = TrainingJob()
    mesh = job.mesh.build()
    job.check_fits(mesh)
    transform = job.optimizer.build(parameter_shapes(job.model, job.seq_len), job.steps)
    batches = job.data.train_batches(job.batch_size, job.seq_len, job.seed)
    losses, seconds = [], []
    with jax.set_mesh(mesh):
        state = create_state(
            job.model, transform, seq_len=job.seq_len, seed=job.seed, mesh=mesh, rules=job.mesh.rules
        )
        step = job.train_step(mesh, state)
        batch = place_batch(next(batches), mesh)
        compiled = step.lower(state, batch).compile()
        memory = compiled.memory_analysis()
        for i in range(steps):
            began = time.perf_counter()
            state, result = compiled(state, batch, step.hyperparameters)
            losses.append(float(result.metrics["loss"]))
            seconds.append(time.perf_counter() - began)
            print(f"{count} device(s), update {i + 1}: loss {losses[-1]:.4f}, {seconds[-1]:.1f} s", flush=True)
            batch = place_batch(next(batches), mesh)
    found = {"state": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes, "losses": losses}
    print(json.dumps({**found, "seconds": float(np.median(seconds[1:] or seconds))}), flush=True)


if __name__ == "__main__":
    run_main(lambda argv: _train(argv))
