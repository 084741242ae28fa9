"""What a compiled program does on one device, counted from its schedule: loops multiplied out, fusions looked into.

    operations     of matrix products and convolutions
    traffic        bytes to and from the device's memory: what an instruction reads and writes there, of an array that
                   it slices or updates in place the slice alone
    collectives    what travels between devices, how often, and whether anything else runs meanwhile
    kernels        custom calls that are programs of their own

Times are bounds, not measurements: an instruction takes the longer of its operations at the chip's peak and its traffic
at the memory's full bandwidth, one after the other; a collective takes its bytes over the links that it uses, beside
what runs between its start and its end. The operations of kernels are not known here; their traffic is. Of a choice
between branches all are counted, and the longest is taken.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from seqmodels.tools.compile_check.chips import Chip
from seqmodels.tools.compile_check.hlo import Computation, Instruction, Module, buffers, payload, talk

# They neither compute nor move anything.
FREE = {
    "add-dependency",
    "after-all",
    "bitcast",
    "constant",
    "domain",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
# How many steps to follow what a collective gives in search of where it comes from.
_READERS = 5


@dataclasses.dataclass
class Collective:
    """Collectives of one kind, between the same devices, of the same size.

    axes: mesh axes along which those that talk differ. devices: in a group. by: "operators", inside `jax.shard_map`, or
    "partitioner", by which XLA splits all else: weights, gradients, sums. bytes: of the whole array that is gathered,
    reduced, scattered or sent, for each. wire_bytes: that a device sends, all together; seconds: on its links, of which
    hidden_seconds are beside other work. overlapped: how many are so for at least half of their time.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    by: str
    dtype: str
    bytes: float
    count: int = 0
    overlapped: int = 0
    wire_bytes: float = 0.0
    seconds: float = 0.0
    hidden_seconds: float = 0.0


@dataclasses.dataclass
class Counts:
    """What one device does in one run of the program.

    schedule_seconds: all instructions one after the other, collectives beside what overlaps them. compiler_seconds: the
    compiler's own estimate of the same, where it makes one, without collectives. unknown_loops: those whose length
    becomes known only as they run; they are counted once.
    """

    operations: float = 0.0
    traffic: float = 0.0
    compiler_seconds: float = 0.0
    schedule_seconds: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    unknown_loops: int = 0


def count(text: str, mesh: Mapping[str, int], chip: Chip) -> Counts:
    """Of the text of a compiled program whose devices are numbered in the order of a mesh with these axes."""
    return _Counter(Module(text), mesh, chip).run()


class _Pending:
    """A collective under way: when it will have ended, and how long other work has run since it began."""

    def __init__(self, entry: Collective, end: float, seconds: float):
        self.entry, self.end, self.seconds, self.work = entry, end, seconds, 0.0


class _Counter:
    def __init__(self, module: Module, mesh: Mapping[str, int], chip: Chip):
        self.module, self.mesh, self.chip = module, mesh, chip
        self.counts = Counts()
        self.groups: dict[tuple, Collective] = {}
        self.kernels: collections.Counter[str] = collections.Counter()

    def run(self) -> Counts:
        self.counts.schedule_seconds = self._walk(self.module.computations[self.module.entry], 1)
        self.counts.collectives = sorted(self.groups.values(), key=lambda x: -x.wire_bytes)
        self.counts.kernels = dict(sorted(self.kernels.items()))
        return self.counts

    def _walk(self, body: Computation, times: int, carried: frozenset[str] = frozenset()) -> float:
        """Note what `times` runs of a computation do; returns the seconds of one. carried: collectives that are under
        way around it, which its instructions may carry on."""
        now, pending, names, readers = 0.0, {}, {}, _readers(body)
        for x in body:
            if x.opcode in FREE:
                continue
            begun, ended = set(), set()
            if x.opcode == "while":
                trips = self.module.trips(x, body)
                self.counts.unknown_loops += trips is None
                trips = 1 if trips is None else trips
                loop = self.module.computations[x.attribute("body")]
                work = trips * self._walk(loop, times * trips, carried | pending.keys())
            elif x.opcode == "conditional":
                branches = (self._walk(branch, times, carried | pending.keys()) for branch in self._branches(x))
                work = max(branches, default=0.0)
            elif x.opcode == "call":
                work = self._walk(self.module.called(x), times, carried | pending.keys())
            else:
                for inner in self.module.inside(x):
                    key = _key(x, inner)
                    if not inner.collective or key in carried:
                        continue
                    if key not in pending:
                        by = "operators" if "/shard_map" in _origin(x, inner, readers) else "partitioner"
                        entry, seconds = self._enter(inner, x, by, body, times)
                        pending[key] = _Pending(entry, now + seconds, seconds)
                        begun.add(key)
                    names[x.name] = key
                    if not _goes_on(x):
                        ended.add(key)
                if x.opcode.endswith("-update") and x.operands:
                    names[x.name] = names.get(x.operands[0])
                if x.opcode.endswith("-done"):
                    ended.add(names.get(x.operands[0]))
                if x.opcode == "send":
                    self._enter_send(x, times)
                work = 0.0 if x.opcode.endswith("-done") else self._instruction(x, times)
            now += work
            for key in pending.keys() - begun - ended:
                pending[key].work += work
            for key in pending.keys() & ended:
                now = max(now, self._end(pending.pop(key), times))
        for one in pending.values():
            now = max(now, self._end(one, times))
        return now

    def _end(self, one: _Pending, times: int) -> float:
        """Note how much of a collective was hidden; returns when it has ended."""
        hidden = min(one.work, one.seconds)
        one.entry.overlapped += times if hidden > one.seconds / 2 else 0
        one.entry.hidden_seconds += times * hidden
        return one.end

    def _branches(self, x: Instruction) -> list[Computation]:
        listed = re.search(r"branch_computations=\{([^}]*)\}", x.attributes)
        names = re.findall(r"%([\w.\-]+)", listed[1]) if listed else []
        names += [x.attribute("true_computation"), x.attribute("false_computation")]
        return [self.module.computations[name] for name in names if name in self.module.computations]

    def _enter(
        self, x: Instruction, around: Instruction, by: str, body: Computation, times: int
    ) -> tuple[Collective, float]:
        """Note a collective; `around` is the instruction of the schedule that it is or is part of."""
        kind, group = x.collective, talk(x, self.mesh)
        # A sum of which every device keeps a part is written as a sum within a fusion of this name.
        if kind == "all-reduce" and around.attribute("calls").startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        # On a torus of three dimensions an array is gathered by a sum of arrays that are zero but for their part.
        if kind == "all-reduce" and {y.opcode for y in body if y.name in x.operands} == {"dynamic-update-slice"}:
            kind = "all-gather by sum"
        moved = sum(payload(self.module.shapes[name]) for name in x.operands)
        if kind == "all-gather":
            moved *= group.size
        share = (1 - 1 / group.size) * (2 if x.collective == "all-reduce" and kind != "reduce-scatter" else 1)
        share = 1.0 if kind == "collective-permute" else share
        links = re.search(r"colors:(\d+)", x.attributes + around.attributes)
        # A permute takes one link. Rings that the compiler does not describe are taken to use both directions of one.
        used = 1 if kind == "collective-permute" else int(links[1]) if links else 2
        seconds = share * moved / (used * self.chip.link)
        dtype = buffers(self.module.shapes[x.operands[0]])[0].dtype
        key = (kind, *group, by, dtype, moved)
        entry = self.groups.setdefault(key, Collective(*key))
        entry.count += times
        entry.wire_bytes += times * share * moved
        entry.seconds += times * seconds
        shapes = (x.shape, *(self.module.shapes[name] for name in x.operands))
        self.counts.traffic += times * sum(map(_in_memory, shapes))
        return entry, seconds

    def _enter_send(self, x: Instruction, times: int) -> None:
        """Note what goes to another slice, by a network whose speed is not known here."""
        data = self.module.shapes[x.operands[0]]
        by = "operators" if "/shard_map" in x.source else "partitioner"
        key = ("send to a slice", ("data",), 2, by, buffers(data)[0].dtype, payload(data))
        entry = self.groups.setdefault(key, Collective(*key))
        entry.count += times
        entry.wire_bytes += times * payload(data)

    def _instruction(self, x: Instruction, times: int) -> float:
        computed = operations(self.module, x)
        moved = traffic(self.module, x)
        self.counts.operations += times * computed
        self.counts.traffic += times * moved
        cycles = re.search(r'"estimated_cycles":"(\d+)"', x.attributes)
        if cycles:
            self.counts.compiler_seconds += times * int(cycles[1]) / self.chip.clock
        if x.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in x.attributes:
            self.kernels[re.sub(r"[.\d]+$", "", x.name)] += times
        return max(computed / self.chip.flops, moved / self.chip.bandwidth)


def traffic(module: Module, x: Instruction) -> float:
    """Bytes that one run of an instruction reads from the device's memory and writes to it."""
    shapes = module.shapes
    if "AllocateBuffer" in x.attributes or x.collective:  # those of collectives are counted where they start
        return 0.0
    if x.opcode == "slice-start":
        return sum(2.0 * part.bytes if part.space == 0 else part.bytes for part in buffers(x.shape)[1:2])
    if x.opcode.endswith("-start"):  # of a copy to or from the chip
        return _in_memory(x.shape)
    if x.opcode == "dynamic-update-slice":
        return 2.0 * _in_memory(shapes[x.operands[1]])
    if x.opcode in ("dynamic-slice", "slice", "gather"):
        return 2.0 * _in_memory(x.shape)
    body = module.called(x) if x.opcode == "fusion" else []
    if not body:
        return _in_memory(x.shape) + sum(_in_memory(shapes[name]) for name in x.operands)
    read = 0.0
    for y in body:
        if y.opcode == "parameter":
            whole = _in_memory(shapes[x.operands[int(y.literal)]])
            read += min(whole, _read(module, body, y.name)) if whole else 0.0
    return read + sum(_written(module, x, body))


def _read(module: Module, body: Computation, name: str) -> float:
    """Bytes of an argument that a computation reads; infinite for all of it."""
    total = 0.0
    for y in body:
        if name not in y.operands:
            continue
        if y.opcode in ("dynamic-slice", "slice") and y.operands[0] == name:
            total += payload(y.shape)
        elif (
            y.collective
            or (y.opcode == "dynamic-update-slice" and name not in y.operands[1:])
            or (y.is_root and y.opcode == "tuple")
        ):
            pass
        elif y.opcode == "bitcast":
            total += _read(module, body, y.name)
        elif y.opcode == "fusion":
            inner = {int(z.literal): z.name for z in module.called(y) if z.opcode == "parameter"}
            for place, operand in enumerate(y.operands):
                if operand == name:
                    total += _read(module, module.called(y), inner[place])
        else:
            return math.inf
    return total


def _written(module: Module, x: Instruction, body: Computation) -> list[float]:
    """Bytes that a fusion writes, for each of its outputs."""
    by_name = {y.name: y for y in body}
    root = next(y for y in body if y.is_root)
    outputs = [by_name[name] for name in root.operands] if root.opcode == "tuple" else [root]
    written = []
    for output, whole in zip(outputs, buffers(x.shape)):
        size = float(whole.bytes) if whole.space == 0 else 0.0
        inner = by_name
        while output is not None and output.opcode in ("bitcast", "fusion"):
            if output.opcode == "fusion":
                inner = {y.name: y for y in module.called(output)}
                output = next((y for y in inner.values() if y.is_root), None)
            else:
                output = inner.get(output.operands[0])
        if output is None or output.opcode == "parameter" or output.collective:
            size = 0.0
        elif output.opcode == "dynamic-update-slice":
            size = min(size, payload(module.shapes[output.operands[1]]))
        written.append(size)
    return written


def _key(x: Instruction, inner: Instruction) -> Any:
    """What tells a collective from others: of one that is spread over several fusions, those that start it, carry it on
    beside their own work and wait for it, what its copies in them have in common."""
    if x is inner:
        return x.name
    sizes = tuple(part.dimensions for part in buffers(inner.shape))
    return inner.attribute("channel_id"), inner.collective, sizes, inner.source


def _goes_on(x: Instruction) -> bool:
    """Whether the collectives in an instruction of the schedule are still under way after it."""
    if x.opcode == "fusion" and not x.name.startswith("async-collective-done"):
        return x.name.startswith("async-collective-start") or x.attribute("calls").startswith("async_collective")
    return x.opcode.endswith("-start")


def _origin(x: Instruction, inner: Instruction, readers: Mapping[str, list[Instruction]]) -> str:
    """Where a collective comes from in the traced program. Of one that the compiler writes in another form it says so
    at the instructions that read the outcome."""
    source, level = inner.source or x.source, [x]
    for _ in range(_READERS):
        if source:
            break
        level = [reader for y in level for reader in readers[y.name]]
        source = next((y.source for y in level if y.source), "")
    return source


def _readers(body: Computation) -> Mapping[str, list[Instruction]]:
    found = collections.defaultdict(list)
    for x in body:
        for name in x.operands:
            found[name].append(x)
    return found


def operations(module: Module, x: Instruction) -> float:
    """Of matrix products and convolutions in one run of an instruction."""
    return sum(_operations(y, module.shapes) for y in module.inside(x))


def _in_memory(shape: str) -> float:
    return float(sum(buffer.bytes for buffer in buffers(shape) if buffer.space == 0))


def _operations(x: Instruction, shapes: Mapping[str, str]) -> float:
    if x.opcode not in ("dot", "convolution"):
        return 0.0
    out, left, right = (buffers(shape)[0].dimensions for shape in (x.shape, *(shapes[name] for name in x.operands[:2])))
    if x.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)
        return 2.0 * math.prod(out) * math.prod(left[int(i)] for i in contracted[1].split(",") if i)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes)
    of_left, of_right, of_out = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", x.attributes)
    positions = 1
    for i in range(sum(label.isdigit() for label in of_out)):
        positions *= _positions(left[of_left.index(str(i))], out[of_out.index(str(i))], window[1], i)
    return 2.0 * out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")] * positions


def _positions(length: int, outputs: int, window: str, dimension: int) -> int:
    """Pairs of an output's place and a place in the window that meet an element of the input. The compiler writes
    products over batches and others as convolutions in which most places meet padding."""

    def field(name: str, otherwise: str) -> str:
        found = re.search(rf"(?<![\w]){name}=([\w\-]+)", window)
        return found[1].split("x")[dimension] if found else otherwise

    size, stride = int(field("size", "1")), int(field("stride", "1"))
    before = int(field("pad", "0_0").split("_")[0])
    spread, apart = int(field("lhs_dilate", "1")), int(field("rhs_dilate", "1"))
    total = 0
    for place in range(size):
        # Outputs o with o * stride + place * apart - before = spread * i for an i of 0 to length - 1.
        offset = place * apart - before
        if spread == 1:
            first = max(0, -(offset // stride))
            last = min(outputs - 1, (length - 1 - offset) // stride)
            total += max(0, last - first + 1)
        else:
            at = [o * stride + offset for o in range(outputs)]
            total += sum(0 <= i < length * spread and i % spread == 0 for i in at)
    return total
