"""The text of a compiled program (`compiled.as_text()`), as instructions in the order in which they run.

XLA has no stable way to hand out a scheduled program but this text. What is read of it here: names, shapes with their
place in memory, operands, the computations that an instruction calls, how often a loop runs, and who talks to whom in a
collective.
"""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)

_BITS = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^{}]*\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")


class Buffer(NamedTuple):
    """An array of a shape: where it is (0 the device's main memory, HBM; others are on the chip) and its bytes there,
    tiles filled up."""

    dtype: str
    dimensions: tuple[int, ...]
    space: int
    bytes: int

    @property
    def payload(self) -> float:
        """Bytes of its elements."""
        return math.prod(self.dimensions) * _bits(self.dtype) / 8


def _bits(dtype: str) -> float:
    if dtype in _BITS:
        return _BITS[dtype]
    number = re.match(r"[a-z]+(\d+)", dtype)
    return int(number[1]) if number else 0


def buffers(shape: str) -> list[Buffer]:
    """The arrays of a shape, a tuple's one after the other."""
    found = []
    for dtype, sizes, layout in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", shape)):
        dimensions = [int(size) for size in sizes.split(",") if size]
        space = re.search(r"S\((\d+)\)", layout)
        order, tile = re.match(r"\{([\d,]+)", layout), re.search(r"T\(([\d,]+)\)", layout)
        padded = list(dimensions)
        if order and tile:
            minor_first = [int(i) for i in order[1].split(",")]
            for i, size in zip(minor_first, reversed([int(size) for size in tile[1].split(",")])):
                padded[i] = -(-padded[i] // size) * size
        bytes_ = math.ceil(math.prod(padded) * _bits(dtype) / 8)
        found.append(Buffer(dtype, tuple(dimensions), int(space[1]) if space else 0, bytes_))
    return found


def payload(shape: str) -> float:
    """Bytes of all elements of a shape."""
    return sum(buffer.payload for buffer in buffers(shape))


class Instruction(NamedTuple):
    """literal: the text between the parentheses: of a constant its value, of a parameter its number."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool

    def attribute(self, name: str) -> str:
        """Its value, where it is a name or a number; "" where there is none."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""

    @property
    def collective(self) -> str:
        """The kind of collective it is, or starts; "" for what is none."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else ""

    @property
    def source(self) -> str:
        """Where in the traced program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


Computation = list[Instruction]


class Module:
    """All computations by name; the instructions of one stand in the order in which they run."""

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry, current = "", None
        for line in text.splitlines():
            if not line.startswith(" "):
                head = _COMPUTATION.match(line)
                if head:
                    current = self.computations.setdefault(head[2], [])
                    self.entry = head[2] if head[1] else self.entry
            elif current is not None and (instruction := _read_instruction(line)) is not None:
                current.append(instruction)
        self.shapes = {x.name: x.shape for body in self.computations.values() for x in body}

    def called(self, x: Instruction) -> Computation:
        """The body of a fusion, of a call, of what an async-start starts; empty for other instructions."""
        return self.computations.get(x.attribute("calls") or x.attribute("to_apply"), [])

    def inside(self, x: Instruction) -> Iterator[Instruction]:
        """The instruction, and all in the fusions and calls that it is or starts."""
        yield x
        if x.opcode in ("fusion", "call", "async-start", "call-start"):
            for y in self.called(x):
                yield from self.inside(y)

    def trips(self, loop: Instruction, around: Computation) -> int | None:
        """How often a loop that counts up from 0 runs; None where it becomes known only as it runs."""
        known = re.search(r'known_trip_count[^}]*?"n":"?(\d+)', loop.attributes)
        if known:
            return int(known[1])
        condition = {x.name: x for x in self.computations.get(loop.attribute("condition"), [])}
        compare = next((x for x in condition.values() if x.is_root), None)
        arguments = {}
        if compare is not None and compare.opcode == "fusion":  # the comparison alone, in a fusion
            body = self.called(compare)
            arguments = {x.name: compare.operands[int(x.literal)] for x in body if x.opcode == "parameter"}
            condition |= {x.name: x for x in body}
            compare = next((x for x in body if x.is_root), None)
        if compare is None or compare.opcode != "compare":
            return None
        outside = {x.name: x for x in around}
        for operand in compare.operands:
            x = condition.get(arguments.get(operand, operand))
            if x is not None and x.opcode == "get-tuple-element":  # handed in from around the loop, unchanged
                start = outside.get(loop.operands[0])
                x = start and outside.get(start.operands[int(x.attribute("index"))])
                while x is not None and x.opcode == "copy":
                    x = outside.get(x.operands[0])
                if x is not None and x.opcode == "constant" and x.literal.strip() == "0":
                    continue  # the counter
            if x is not None and x.opcode == "constant":
                return int(x.literal)
        return None


def _read_instruction(line: str) -> Instruction | None:
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    start = head.end()
    end = start
    if line[start] == "(":
        end = _closing(line, start) + 1
    else:
        while line[end] != " ":
            end = _closing(line, end) + 1 if line[end] in "([{" else end + 1
    opening = line.find("(", end)
    if opening < 0:
        return None
    closing = _closing(line, opening)
    inner = line[opening + 1 : closing]
    return Instruction(
        name=head[2],
        shape=line[start:end],
        opcode=line[end:opening].strip(),
        operands=tuple(re.findall(r"%([\w.\-]+)", inner)),
        literal=inner,
        attributes=line[closing + 1 :],
        is_root=bool(head[1]),
    )


def _closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    return len(text) - 1


class Talk(NamedTuple):
    """Who takes part in a collective: mesh axes along which the devices of a group differ, and devices of a group."""

    axes: tuple[str, ...]
    size: int


def talk(x: Instruction, mesh: Mapping[str, int]) -> Talk:
    """Of a collective in a program whose devices are numbered in the order of a mesh with these axes."""
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", x.attributes)
    if pairs:
        ends = [[int(i) for i in pair.split(",")] for pair in re.findall(r"\{(\d+,\d+)\}", pairs[1])]
        return Talk(_varying(ends, mesh), 2)
    groups = _groups(x.attributes, math.prod(mesh.values()))
    return Talk(_varying(groups, mesh), len(groups[0]))


def _varying(groups: list[list[int]], mesh: Mapping[str, int]) -> tuple[str, ...]:
    sizes = tuple(mesh.values())
    coordinates = [np.unravel_index(group, sizes) for group in groups]
    return tuple(axis for i, axis in enumerate(mesh) if any(len(set(places[i])) > 1 for places in coordinates))


_LIST = r"((?:\{[\d,]*\},?)+)"
_IOTA = r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?"


@functools.cache
def _groups(attributes: str, count: int) -> list[list[int]]:
    """The devices of each group. They are written as a list, as a shape of numbers in order (which may be transposed),
    or as some axes of a mesh of the compiler's own, whose devices are such a shape again."""
    written = re.search(r"replica_groups=(.*)", attributes)
    if written is None or written[1].startswith("{}"):
        return [list(range(count))]
    listed = re.match(rf"\{{{_LIST}\}}", written[1])
    if listed:
        return [[int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    shaped = re.match(_IOTA, written[1])
    if shaped:
        return _in_order(shaped[2], shaped[3]).reshape(_numbers(shaped[1])).tolist()
    by_axes = re.match(rf"mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))?\s*\{{([^}}]*)\}}", written[1])
    if by_axes is None or ":" in by_axes[5]:
        raise ValueError(f"a collective's groups are written in an unknown way: {written[1][:120]}")
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", by_axes[1])}
    devices = np.arange(math.prod(sizes.values()))
    if by_axes[2]:
        devices = _in_order(by_axes[2] if by_axes[3] is None else by_axes[3], by_axes[4])
    talking = re.findall(r"'(\w+)'", by_axes[5])
    places = list(sizes)
    order = [*(i for i, name in enumerate(places) if name not in talking), *(places.index(name) for name in talking)]
    devices = devices.reshape(tuple(sizes.values())).transpose(order)
    return devices.reshape(-1, math.prod(sizes[name] for name in talking)).tolist()


def _in_order(sizes: str, transposed: str | None) -> np.ndarray:
    devices = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return devices.transpose(_numbers(transposed)) if transposed else devices


def _numbers(text: str) -> list[int]:
    return [int(i) for i in text.split(",")]
