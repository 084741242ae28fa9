"""From a job and a slice to what the compiler makes of the job's training step."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from seqmodels.models.accounting import flops_per_token, parameter_count
from seqmodels.parallel.mesh import batch_sharding, describe_mesh
from seqmodels.tools.compile_check.chips import GIB, Target
from seqmodels.tools.compile_check.schedule import Collective, Counts, count
from seqmodels.training import TrainingJob, parameter_shapes, state_shapes


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a device's memory. padding: what the layout of the arguments adds to their elements. temporaries: at
    their most. code: of the program itself. host: of the host's memory, where a policy offloads activations to it; not
    in the total."""

    parameters: int
    optimizer: int
    batch: int
    padding: int
    outputs: int
    temporaries: int
    code: int
    host: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self)) - self.host


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a job's training step on a slice.

    error: the compiler's reason where it refused the program; what follows from the program is then None.
    model_operations: of matrix products and convolutions in a step as the model asks for them, over all devices; what
    is computed again in the backward pass is not counted. preset: `train.compiler_preset`; options: its options and
    those that were asked for beside it. counts: of one device, see `schedule`.
    """

    target: str
    device_kind: str
    devices: int
    mesh: dict[str, int]
    batch_size: int
    seq_len: int
    parameters: int
    model_operations: float
    preset: str | None
    options: dict[str, Any]
    trace_seconds: float
    compile_seconds: float
    capacity: float
    error: str | None = None
    memory: Memory | None = None
    counts: Counts | None = None
    bounds: dict[str, float] | None = None

    @property
    def fits(self) -> bool:
        return self.memory is not None and self.memory.total <= self.capacity


def check(
    job: TrainingJob,
    target: Target,
    options: Mapping[str, Any] | None = None,
    keep: Path | None = None,
    say: Callable[[str], None] = print,
) -> Report:
    """Compile the job's training step for the target; nothing is allocated but in the compiler.

    options: of the compiler, beside the job's own. keep: a folder for the text of the compiled program.
    Raises InputError where the job does not fit the mesh; a program that does not fit the memory is a report.
    """
    mesh = job.mesh.build(target.devices)
    job.check_fits(mesh)
    parameters = parameter_shapes(job.model, job.seq_len)
    transform = job.optimizer.build(parameters, job.steps)
    state = state_shapes(job.model, transform, seq_len=job.seq_len, mesh=mesh, rules=job.mesh.rules)
    batch = batch_shapes(job, mesh)
    shape = f"{job.batch_size} x {job.seq_len} tokens"
    say(f"{target.name}: {len(target.devices)} devices, mesh {describe_mesh(mesh.shape)}, {shape}")
    step = job.train_step(mesh, state)
    began = time.perf_counter()
    with jax.set_mesh(mesh):
        lowered = step.trace(state, batch).lower(lowering_platforms=("tpu",))
    traced = time.perf_counter()
    say(f"{target.name}: traced in {traced - began:.0f} s; compiling")
    error = compiled = None
    try:
        compiled = lowered.compile(compiler_options=dict(options or {}))
    except jax.errors.JaxRuntimeError as refused:
        error = reason(str(refused))
    seconds = time.perf_counter() - traced
    report = Report(
        target=target.name,
        device_kind=target.chip.kind,
        devices=len(target.devices),
        mesh=dict(mesh.shape),
        batch_size=job.batch_size,
        seq_len=job.seq_len,
        parameters=parameter_count(parameters),
        model_operations=3 * flops_per_token(job.model, job.seq_len) * job.batch_size * job.seq_len,
        preset=job.compiler_preset,
        options={**job.compiler_options(mesh), **(options or {})},
        trace_seconds=traced - began,
        compile_seconds=seconds,
        capacity=target.chip.memory,
        error=error,
    )
    if compiled is None:
        return report
    text = compiled.as_text()
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        (keep / f"{target.name.replace(' ', '').replace(':', '_')}.hlo.txt").write_text(text)
    within = {**mesh.shape, "data": mesh.shape["data"] // job.mesh.slices}  # devices are numbered in their slice
    counts = count(text, within, target.chip)
    memory = _memory(compiled.memory_analysis(), state, batch)
    return dataclasses.replace(report, memory=memory, counts=counts, bounds=_bounds(counts, report, target))


def batch_shapes(job: TrainingJob, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """What the job's data gives a step, on the mesh; the data is not read."""
    shapes, dtypes, sharding = job.data.batch_shapes(job.batch_size, job.seq_len), job.data.dtypes, batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(shape, dtypes[name], sharding=sharding) for name, shape in shapes.items()}


def reason(message: str) -> str:
    """The part of a compiler's error that says why, as one line."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    telling = next((line for line in lines if "memory" in line.lower()), lines[0])
    return telling[:400]


def bytes_on_a_device(tree: Any) -> int:
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _memory(analysis: Any, state: Any, batch: Any) -> Memory:
    parameters, optimizer = bytes_on_a_device(state.params), bytes_on_a_device(state.opt_state)
    of_batch = bytes_on_a_device(batch)
    return Memory(
        parameters=parameters,
        optimizer=optimizer,
        batch=of_batch,
        padding=analysis.argument_size_in_bytes - parameters - optimizer - of_batch,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        host=analysis.host_temp_size_in_bytes,
    )


def _bounds(counts: Counts, report: Report, target: Target) -> dict[str, float]:
    """Seconds that a step takes at least, for each thing that may hold it up."""
    chip = target.chip
    return {
        "model": report.model_operations / report.devices / chip.flops,
        "compute": counts.operations / chip.flops,
        "memory": counts.traffic / chip.bandwidth,
        "links": sum(x.seconds for x in counts.collectives),
        "schedule": counts.schedule_seconds,
        "compiler": counts.compiler_seconds,
    }


def merged(collectives: list[Collective]) -> list[Collective]:
    """Collectives of one kind along the same axes as one entry, whatever their sizes: `bytes` is then the largest."""
    found: dict[tuple, Collective] = {}
    for x in collectives:
        fresh = Collective(x.kind, x.axes, x.devices, x.by, x.dtype, 0.0)
        entry = found.setdefault((x.kind, x.axes, x.by, x.dtype), fresh)
        entry.bytes = max(entry.bytes, x.bytes)
        for name in ("count", "overlapped", "wire_bytes", "seconds", "hidden_seconds"):
            setattr(entry, name, getattr(entry, name) + getattr(x, name))
    return sorted(found.values(), key=lambda x: -x.wire_bytes)


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"
