"""Times from the compiler's schedules: of one kernel, and of a whole program.

A Pallas kernel with `steps` of its grid on each core, C cycles of schedule in a step, and copies of a step's inputs
that arrive L cycles after they were asked for, n blocks of them in VMEM at a time:

    cycles = steps max(C, (L + (n - 1) C) / n)            n = 2 unless a kernel says otherwise
    L = latency + bytes of the largest block / rate + 30 for every further block
    time = max(cycles / clock, HBM bytes / (efficiency bandwidth))

C counts the schedule's bundles, `pl.when`s whose conditions are known for every step by how often they hold, all others
as if they held always. An instruction of XLA takes the longest of its schedule's cycles, its matrix products at the
peak rate and its traffic at efficiency times bandwidth; they run one after the other, copies between HBM and VMEM that
the compiler starts early beside what follows.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

from seqmodels.tools.compile_check.chips import Chip
from seqmodels.tools.compile_check.hlo import Computation, Instruction, Module, buffers
from seqmodels.tools.compile_check.schedule import FREE, operations, traffic
from seqmodels.tools.kernel_report.llo import Dumps, Schedule, Slots
from seqmodels.tools.kernel_report.pallas_calls import PallasCall

# Cycles to ask for one more copy.
_ISSUE = 30


class Timing(NamedTuple):
    """What `Chip` does not say of a generation.

    latency, rate  of a copy from HBM to VMEM: cycles until the first byte, then bytes a cycle. v4: published
                   measurements on hardware; v5e: fitted to published times of a kernel that waits for its copies; v5p,
                   v6e, TPU7x: fitted to libtpu's simulator
    efficiency     share of the memory's bandwidth that a stream of copies reaches
    delay_slots    bundles after a branch that run in any case
    simulator      whether libtpu can simulate kernels of this generation
    """

    latency: float
    rate: float
    efficiency: float
    delay_slots: int
    simulator: bool


TIMING = {
    "v4": Timing(530, 911, 0.80, 1, False),
    "v5e": Timing(650, 374, 0.90, 4, True),
    "v5p": Timing(780, 980, 0.85, 4, True),
    "v6e": Timing(600, 577, 0.90, 4, True),
    "tpu7x": Timing(585, 1300, 0.85, 6, False),
}


class Device(NamedTuple):
    """What a program runs on. chip: of a whole device, which has one or two cores."""

    generation: str
    chip: Chip
    cores: int

    @property
    def timing(self) -> Timing:
        return TIMING[self.generation]

    def to_hbm(self, size: float) -> float:
        """Seconds for so many bytes."""
        return size / (self.timing.efficiency * self.chip.bandwidth)


@dataclasses.dataclass
class Kernel:
    """A Pallas kernel of a program. Per step and per call are means over a grid.

    times                   calls in a run of the program
    steps, cores            steps of the grid, and cores that share them
    cycles                  of a step's schedule, conditions by how often they hold
    cycles_at_most          the same if all conditions held
    latency                 cycles until a step's inputs have arrived
    entry_cycles            outside of the loop over the grid
    simulated_cycles        of a whole call on one core, by libtpu's simulator; None where it was not asked or fails
    seconds                 of a call, by the formula above
    operations              of matrix products, a call
    mxu                     share of the peak rate in `seconds`
    slots                   of the instruction slots of a step, the share that is filled, by kind
    spills, fills           vector registers stored and read back for want of registers, a step
    vmem                    bytes, buffers and spilled registers
    traffic                 bytes between HBM and VMEM, a call
    limit                   "schedule", "latency" or "bandwidth": what the time comes from
    remarks                 what is not known
    """

    name: str
    times: int
    grid: tuple[int, ...]
    steps: int
    cores: int
    cycles: float
    cycles_at_most: float
    latency: float
    entry_cycles: float
    simulated_cycles: int | None
    seconds: float
    operations: float
    mxu: float
    slots: dict[str, float]
    spills: float
    fills: float
    vmem: int
    traffic: int
    limit: str
    remarks: list[str]


@dataclasses.dataclass
class Part:
    """An instruction of a program. seconds: of all its runs. limit: "schedule", "products", "bandwidth" or "kernel"."""

    name: str
    times: int
    seconds: float
    cycles: float | None
    operations: float
    traffic: float
    limit: str
    source: str


@dataclasses.dataclass
class Program:
    """A compiled program. seconds: of a run. operations, traffic: of a run, Pallas kernels included. parts: the
    longest first. unknown_loops: whose length becomes known only as they run; they count once."""

    seconds: float
    operations: float
    traffic: float
    kernels: list[Kernel]
    parts: list[Part]
    unknown_loops: int


class Bound(NamedTuple):
    """What no program for an operation can do without. bytes: of its arguments and results, each moved once. seconds:
    the longer of the operations at the peak rate and the bytes at full bandwidth; limit: which, "products" or
    "bandwidth"."""

    operations: float
    bytes: float
    seconds: float
    limit: str


def bound(operations: float, bytes_: float, device: Device) -> Bound:
    computing, moving = operations / device.chip.flops, bytes_ / device.chip.bandwidth
    return Bound(operations, bytes_, max(computing, moving), "products" if computing > moving else "bandwidth")


def program(text: str, calls: Sequence[PallasCall], dumps: Dumps, device: Device) -> Program:
    """text: of the compiled program. calls: of the program as traced."""
    module = Module(text)
    described = dict(_paired(module, list(calls)))
    kernels = {
        x.name: kernel(x.name, described.get(x.name), dumps, device, _on_chip(x, described.get(x.name), module))
        for x in _custom_calls(module)
    }
    walk = _Walk(module, dumps, device, kernels)
    seconds = walk.run(module.computations[module.entry], 1)
    parts = sorted(walk.parts.values(), key=lambda part: -part.seconds)
    moved = sum(part.traffic * part.times for part in parts)
    return Program(
        seconds=max(seconds, device.to_hbm(moved)),
        operations=sum(part.operations * part.times for part in parts),
        traffic=moved,
        kernels=[each for each in kernels.values() if each.times],
        parts=parts,
        unknown_loops=walk.unknown_loops,
    )


def _custom_calls(module: Module) -> list[Instruction]:
    everywhere = (x for body in module.computations.values() for x in body)
    return [x for x in everywhere if x.opcode == "custom-call" and '"tpu_custom_call"' in x.attributes]


def _paired(module: Module, calls: list[PallasCall]) -> list[tuple[str, PallasCall]]:
    """Kernels of the compiled program with the calls that they come from: of those with the same arrays, the one with
    the same name, or the next."""
    found = []
    left = list(calls)
    for x in _custom_calls(module):
        shapes = [*(module.shapes[name] for name in x.operands), x.shape]
        arrays = [f"{y.dtype}[{','.join(map(str, y.dimensions))}]" for shape in shapes for y in buffers(shape)]
        alike = [call for call in left if list(call.signature) == sorted(arrays)]
        # A kernel that XLA gives its operands in another type or shape has its name alone.
        alike = alike or [call for call in left if call.name and call.name in x.name]
        alike = [call for call in alike if call.name and call.name in x.name] or alike
        alike = alike or (left if len(left) == 1 else [])
        if alike:
            left.remove(alike[0])
            found.append((x.name, alike[0]))
    return found


def _on_chip(x: Instruction, call: PallasCall | None, module: Module) -> list[bool]:
    """Of the operands with blocks, and then of the outputs, whether XLA keeps them in VMEM all the time."""
    if call is None:
        return []
    outputs = [part.space != 0 for part in buffers(x.shape)]
    inputs = [buffers(module.shapes[name])[0].space != 0 for name in x.operands]
    blocks = len(call.blocks) - len(outputs)
    return [*inputs[len(inputs) - blocks :], *outputs] if len(inputs) >= blocks >= 0 else []


def kernel(name: str, call: PallasCall | None, dumps: Dumps, device: Device, on_chip: Sequence[bool] = ()) -> Kernel:
    """Of one call. call: None where it is not known which call of the traced program this is."""
    schedule, remarks = dumps.schedule(name), []
    steps = 1 if call is None else call.steps
    cores = _cores(call, device)
    a_core = math.ceil(steps / cores)
    if call is None:
        remarks.append("not found in the traced program: operations and traffic are unknown")
    elif call.unknown_traffic:
        remarks.append("some copies are the kernel's own or depend on data: traffic is a guess")
    cycles, at_most, entry, slots = _step_cycles(schedule, call, a_core, remarks)
    latency, buffered = _latency(call, device.timing, on_chip)
    waiting = (latency + (buffered - 1) * cycles) / buffered if a_core > 1 else cycles + latency
    total = a_core * max(cycles, waiting) + entry
    moved = 0 if call is None else call.traffic(on_chip)
    of_schedule, of_memory = total / device.chip.clock, device.to_hbm(moved)
    seconds = max(of_schedule, of_memory)
    computed = 0.0 if call is None else call.operations
    limit = "latency" if waiting > 1.02 * cycles else "schedule"
    return Kernel(
        name=name,
        times=0,  # until the program has been walked through
        grid=() if call is None else call.grid,
        steps=steps,
        cores=cores,
        cycles=cycles,
        cycles_at_most=at_most,
        latency=latency,
        entry_cycles=entry,
        simulated_cycles=dumps.simulated_cycles(name),
        seconds=seconds,
        operations=computed,
        mxu=computed / device.chip.flops / seconds if seconds else 0.0,
        slots=slots.use if slots else {},
        spills=slots.spills if slots else 0.0,
        fills=slots.fills if slots else 0.0,
        vmem=schedule.vmem if schedule else 0,
        traffic=moved,
        limit="bandwidth" if of_memory > of_schedule else limit,
        remarks=remarks,
    )


def _cores(call: PallasCall | None, device: Device) -> int:
    """Cores that share a grid: the compiler splits an axis that may run in any order."""
    axes = () if call is None else zip(call.grid, call.semantics)
    return device.cores if any(size > 1 and "parallel" in how for size, how in axes) else 1


def _step_cycles(
    schedule: Schedule | None, call: PallasCall | None, steps: int, remarks: list[str]
) -> tuple[float, float, float, Slots | None]:
    """(cycles of a step, the same if all conditions held, cycles outside of the loop over the grid, slots of a step)"""
    if schedule is None:
        remarks.append("the compiler has written no schedule")
        return 0.0, 0.0, 0.0, None
    loop = schedule.grid_loop if steps > 1 else None
    runs = schedule.runs(loop)
    # The first and the last passes only copy; the compiler does not always say how many they are.
    if loop is not None and loop.passes is not None and not steps <= loop.passes <= steps + 2:
        remarks.append(f"the loop over the grid has {loop.passes} passes a core, {steps} or 2 more were expected")
    if schedule.unknown_loops(loop):
        remarks.append(f"{schedule.unknown_loops(loop)} loops of unknown length count once")
    branches = schedule.conditions(loop)
    shares = [] if call is None else list(call.shares)
    mean = runs.copy()
    if len(branches) == len(shares):
        for branch, share in zip(branches, shares):
            mean[branch.first : branch.last + 1] *= share
    elif min(shares, default=1.0) < 1.0:
        remarks.append(f"{len(shares)} conditions in {len(branches)} branches: all count as if they held")
    entry = 0.0 if loop is None else len(schedule.bundles) - (loop.last - loop.first + 1)
    return float(mean.sum()), float(runs.sum()), float(entry), schedule.slots(mean)


def _latency(call: PallasCall | None, timing: Timing, on_chip: Sequence[bool]) -> tuple[float, int]:
    """Cycles until a step's inputs have arrived, and how many steps' blocks are in VMEM at a time."""
    if call is None:
        return 0.0, 2
    on_chip = [*on_chip, *[False] * (len(call.blocks) - len(on_chip))]
    inputs = [x for x, here in zip(call.blocks, on_chip) if x is not None and not x.is_output and not here]
    moving = [x for x in inputs if 4 * x.copies > call.steps]  # others are in place in most steps
    if not moving:
        return 0.0, 2
    buffered = max(2, min(x.buffers for x in moving))
    return timing.latency + max(x.bytes for x in moving) / timing.rate + _ISSUE * (len(moving) - 1), buffered


class _Walk:
    """Goes through a program as it runs."""

    def __init__(self, module: Module, dumps: Dumps, device: Device, kernels: dict[str, Kernel]):
        self.module, self.dumps, self.device, self.kernels = module, dumps, device, kernels
        self.parts: dict[str, Part] = {}
        self.unknown_loops = 0

    def run(self, body: Computation, times: int) -> float:
        """Seconds of one run of a computation that runs so often in all."""
        now, arrives = 0.0, {}
        for x in body:
            if x.opcode in FREE:
                continue
            if x.opcode == "while":
                trips = self.module.trips(x, body)
                self.unknown_loops += trips is None
                trips = 1 if trips is None else trips
                now += trips * self.run(self.module.computations[x.attribute("body")], times * trips)
            elif x.opcode == "conditional":
                now += max((self.run(branch, times) for branch in self._branches(x)), default=0.0)
            elif x.opcode == "call":
                now += self.run(self.module.called(x), times)
            elif x.opcode in ("copy-start", "slice-start"):
                arrives[x.name] = now + self._instruction(x, times)
            elif x.opcode.endswith("-done"):
                now = max(now, arrives.pop(x.operands[0], now))
            else:
                now += self._instruction(x, times)
        return max([now, *arrives.values()])

    def _branches(self, x: Instruction) -> list[Computation]:
        names = re.findall(r"%([\w.\-]+)", (re.findall(r"branch_computations=\{([^}]*)\}", x.attributes) or [""])[0])
        names += [x.attribute("true_computation"), x.attribute("false_computation")]
        return [self.module.computations[name] for name in names if name in self.module.computations]

    def _instruction(self, x: Instruction, times: int) -> float:
        part = self.parts.get(x.name)
        if part is None:
            part = self.parts[x.name] = self._part(x)
        each = part.seconds / part.times if part.times else part.seconds
        part.times += times
        part.seconds = each * part.times
        if x.name in self.kernels:
            self.kernels[x.name].times += times
        return each

    def _part(self, x: Instruction) -> Part:
        """One run of an instruction."""
        if x.name in self.kernels:
            k = self.kernels[x.name]
            return Part(x.name, 0, k.seconds, k.cycles, k.operations, float(k.traffic), "kernel", x.source)
        computed, moved = operations(self.module, x), traffic(self.module, x)
        schedule = self.dumps.schedule(x.name)
        cycles = None if schedule is None else float(schedule.runs().sum())
        times = {
            "schedule": (cycles or 0.0) / self.device.chip.clock,
            "products": computed / self.device.chip.flops,
            "bandwidth": self.device.to_hbm(moved),
        }
        limit = max(times, key=times.get)
        return Part(x.name, 0, times[limit], cycles, computed, moved, limit, x.source)
