"""The scheduled instructions (LLO) of one kernel or fusion, as libtpu writes them into files.

libtpu writes several stages of a program. The one to time is `packed-bundles-post-ra`: a bundle is what a core issues
in a cycle, and cycles in which it waits for a result are empty bundles, so bundles are cycles. (`final_bundles`, which
comes later, hides those in delay fields of instructions: it is the code's size, not its time.) Waits for copies between
memories are in neither. Three files are read for each kernel:

    packed-bundles-post-ra                   bundles, with branches that name the bundle that they go to
    post-bundle-packing-post-ra              the same as a tree of regions: loops with their bounds, buffers in VMEM
    hlo-static-per-bundle-utilization        for each bundle, how many slots of each kind it fills
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

# What is to be written, for the compiler's flag.
STAGES = (
    "packed-bundles-post-ra",
    "post-bundle-packing-post-ra",
    "hlo-static-per-bundle-utilization",
    "deduplication-map",
)

_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:[\s>]*\{(.*)$")
_BRANCH = re.compile(r"sbr\.rel(?: \((!?%\w+)\))? target bundleno = (\d+) \(0x[0-9a-f]+\), region = (\d+)")
_STAGE = re.compile(r"iteration index, stage = (\d+)")
_BOUNDS = re.compile(r"( *)loop: start=(-?\d+), step=(-?\d+), limit=(-?\d+)")
_LOOP_BODY = re.compile(r"( *)\$region(\d+): .*// loop_body")
_BUFFER = re.compile(r"space=vmem, size = (0x[0-9a-f]+|\d+), offset = (0x[0-9a-f]+|\d+), scoped")
# Of waits that the compiler puts into a loop over the grid, whose copies it has put there too.
_PIPELINE = "pipeline-emitter"


class Loop(NamedTuple):
    """first, last: its bundles, both included. passes: how often they run; None where it becomes known only as it
    runs. stages: of those passes, how many only start or only end what other passes do, as the first and last of a
    loop that copies one step's data while it computes another's."""

    first: int
    last: int
    passes: int | None
    stages: int

    @property
    def trips(self) -> int | None:
        """Passes that do the whole of a step's work."""
        return None if self.passes is None else max(1, self.passes - self.stages)

    def holds(self, other: "Loop") -> bool:
        return self is not other and self.first <= other.first and other.last <= self.last


class Branch(NamedTuple):
    """Bundles first to last, both included, that are skipped where a condition does not hold."""

    first: int
    last: int


class Slots(NamedTuple):
    """What a step fills of the slots of its bundles. use: kind of slot -> share of what there is. spills, fills: vector
    registers stored to VMEM for want of registers, and read back."""

    use: dict[str, float]
    spills: float
    fills: float


class Schedule:
    """One kernel's or fusion's bundles.

    loops: outer ones before those inside them. branches: what is skipped under a condition, in order; not the loops'.
    vmem: bytes of VMEM that its buffers and spilled registers take, together.
    """

    def __init__(self, bundles: str, regions: str, utilization: str, delay_slots: int):
        """Of the three files' text. delay_slots: bundles after a branch that run whether or not it is taken."""
        self.bundles = _read_bundles(bundles)
        self._utilization = utilization
        bounds = _read_bounds(regions)
        loops, self.branches = [], []
        for place, text in enumerate(self.bundles):
            for _, target, region in _BRANCH.findall(text):
                after = place + delay_slots + 1
                if int(target) > place:
                    if int(target) > after:
                        self.branches.append(Branch(after, int(target) - 1))
                    continue
                last = min(after, len(self.bundles)) - 1
                stages = max(map(int, _STAGE.findall(" ".join(self.bundles[int(target) : last + 1]))), default=0)
                loops.append(Loop(int(target), last, bounds.get(int(region)), stages))
        self.branches.sort(key=lambda branch: (branch.first, -branch.last))
        self.loops = sorted(loops, key=lambda loop: (loop.first, -loop.last))
        self.vmem = max((int(size, 0) + int(at, 0) for size, at in _BUFFER.findall(regions)), default=0)

    @property
    def grid_loop(self) -> Loop | None:
        """The loop with a pass for every step of a Pallas grid."""
        outer = [loop for loop in self.loops if not any(other.holds(loop) for other in self.loops)]
        waiting = [loop for loop in outer if any(_PIPELINE in x for x in self.bundles[loop.first : loop.last + 1])]
        return max(waiting or outer, key=lambda loop: loop.last - loop.first, default=None)

    def runs(self, within: Loop | None = None) -> np.ndarray:
        """How often each bundle runs in one pass of a loop, 0 outside of it; of all where it is None. Loops of unknown
        length count once; what is under a condition counts as if it held."""
        count = np.ones(len(self.bundles))
        if within is not None:
            count[:] = 0
            count[within.first : within.last + 1] = 1
        for loop in self.loops:
            if loop is not within and (within is None or within.holds(loop)):
                count[loop.first : loop.last + 1] *= 1 if loop.trips is None else loop.trips
        return count

    def unknown_loops(self, within: Loop | None = None) -> int:
        inside = (loop for loop in self.loops if within is None or within.holds(loop))
        return sum(loop.passes is None for loop in inside)

    def conditions(self, loop: Loop | None = None) -> list[Branch]:
        """The branches that come from conditions in a kernel's body, outer ones before those in them; loop: that over
        its grid. What else is skipped: the body itself, in passes that only copy, and loops that have no passes."""
        found = self.branches
        if loop is not None:
            found = [x for x in found if loop.first <= x.first and x.last <= loop.last]
        guards = set()
        for unknown in self.loops:
            around = [x for x in found if x.first <= unknown.first and unknown.last <= x.last]
            if unknown.passes is None and around:
                guards.add(min(around, key=lambda x: x.last - x.first))
        if loop is not None and loop.stages and found:
            body = max(found, key=lambda x: x.last - x.first)
            found = [x for x in found if x != body and body.first <= x.first and x.last <= body.last]
        return [x for x in found if x not in guards]

    def slots(self, runs: np.ndarray) -> Slots | None:
        """Of the bundles, each as often as it runs; None where the compiler has not written it down."""
        lines = self._utilization.splitlines()
        if len(lines) < 4:
            return None
        kinds = [name.strip() for name in lines[1].split(",")]
        capacity = np.array(lines[2].split(), float)
        rows = np.array([line.split() for line in lines[4:] if line.strip()], float)
        filled = dict(zip(kinds, runs[: len(rows)] @ rows))
        spills, fills = filled.pop("VSTORE:SPILL", 0.0), filled.pop("VLOAD:FILL", 0.0)
        there = dict(zip(kinds, capacity * runs.sum()))
        return Slots({kind: float(n / there[kind]) for kind, n in filled.items()}, float(spills), float(fills))


def _read_bundles(text: str) -> list[str]:
    """The text of each bundle, which may go over several lines."""
    found: list[str] = []
    for line in text.splitlines():
        head = _BUNDLE.match(line)
        if head:
            found.append(head[1])
        elif found:
            found[-1] += "\n" + line
    return found


def _read_bounds(regions: str) -> dict[int, int]:
    """Passes of the loops whose bounds are constants, by the region that is their body."""
    found: dict[int, int] = {}
    pending: dict[str, int] = {}
    for line in regions.splitlines():
        if bounds := _BOUNDS.match(line):
            start, step, limit = (int(bounds[i]) for i in (2, 3, 4))
            pending[bounds[1]] = max(0, -(-(limit - start) // step))
        elif (body := _LOOP_BODY.match(line)) and body[1] in pending:
            found[int(body[2])] = pending.pop(body[1])
    return found


class Dumps:
    """The files that libtpu has written into a folder for one program.

    simulated: cycles of each kernel and fusion by libtpu's own simulator, where it was asked for and could tell.
    """

    def __init__(self, folder: Path, delay_slots: int):
        self._delay_slots = delay_slots
        self._files: dict[str, dict[str, Path]] = {}
        self._schedules: dict[str, Schedule] = {}
        self._same_as: dict[str, str] = {}
        self.simulated: dict[str, int] = {}
        # The compiler makes other programs on the way, which have names of their own; of equal names the last counts.
        for file in sorted(folder.rglob("*"), key=lambda file: (len(file.name), file.name)):
            if file.name.endswith("_static_llo_profile.textproto"):
                self._read_simulation(file.read_text(errors="replace"))
            elif named := re.match(r"\d+-(.*)-\d+-(.*)\.txt$", file.name):
                stage = next((stage for stage in STAGES if named[2].endswith(stage)), None)
                if stage == "deduplication-map":
                    self._same_as |= _read_duplicates(file.read_text())
                elif stage and not named[2].startswith("schedule-analysis"):
                    self._files.setdefault(named[1], {})[stage] = file

    def _read_simulation(self, text: str) -> None:
        name, cycles = re.search(r'hlo_op_name: "(.*?)"', text), re.search(r"estimated_cycles: (\d+)", text)
        if name and cycles and int(cycles[1]) > 0:  # 0 says that it could not follow
            self.simulated[name[1]] = int(cycles[1])

    def simulated_cycles(self, name: str) -> int | None:
        return self.simulated.get(name, self.simulated.get(self._same_as.get(name, name)))

    def schedule(self, name: str) -> Schedule | None:
        """Of an instruction of the compiled program; None for what has no code of its own."""
        name = name if name in self._files else self._same_as.get(name, name)
        files = self._files.get(name, {})
        if STAGES[0] not in files:
            return None
        if name not in self._schedules:
            texts = [files[stage].read_text(errors="replace") if stage in files else "" for stage in STAGES[:3]]
            self._schedules[name] = Schedule(*texts, delay_slots=self._delay_slots)
        return self._schedules[name]


def _read_duplicates(text: str) -> Mapping[str, str]:
    """Instructions for which the compiler uses the code of an equal one, by name."""
    found, key = {}, ""
    for line in text.splitlines():
        if line.startswith("key:"):
            key = line.removeprefix("key:")
        elif line.startswith("  "):
            found[line.strip()] = key
    return found
