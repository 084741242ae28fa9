"""The table of TPU slices: what they are made of, and what each of the parties involved calls them.

A slice of 256 chips of v5e has four names: `v5e-256` here, `v5litepod-256` in the Cloud TPU API, an accelerator
label with a topology on GKE, `v5e:16x16` for the compiler. The number in a name counts chips for v5e and v6e, and
cores, of which a chip has two, for v4, v5p and TPU7x: v5p-128 has 64 chips.

Sources: the accelerator tables of xpk 1.16 and MaxText, Google's pages on GKE node pools and on runtime versions, as of
2026; memory as the compiler of libtpu 0.0.42 gives it.
"""

import math
from typing import NamedTuple

from seqmodels.errors import InputError, nearest

CHIPS_PER_HOST = 4


class Generation(NamedTuple):
    """What the slices of a generation have in common.

    counts_cores: whether the number in a slice's name is one of cores, two to a chip.
    api_prefix: of the type's name in the Cloud TPU API; None where that API does not have the generation.
    runtime: of the virtual machine's software in the Cloud TPU API.
    label, machine_type: of node pools on GKE.
    devices_per_chip: as JAX counts them. memory_gib: of a device, what a program can have.
    topologies: number in the name -> chips along each axis.
    """

    counts_cores: bool
    api_prefix: str | None
    runtime: str | None
    label: str
    machine_type: str
    devices_per_chip: int
    memory_gib: float
    topologies: dict[int, str]


_FLAT = {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    8: "2x2x1",
    16: "2x2x2",
    32: "2x2x4",
    64: "2x4x4",
    128: "4x4x4",
    256: "4x4x8",
    512: "4x8x8",
    1024: "8x8x8",
    2048: "8x8x16",
    4096: "8x16x16",
}
# v5e-8 is two machines for some products and one for others.
_FLAT_V5E = {number: topology for number, topology in _FLAT.items() if number != 8}

# fmt: off
GENERATIONS = {
    "v4": Generation(True, "v4", "tpu-ubuntu2204-base", "tpu-v4-podslice", "ct4p-hightpu-4t", 1, 30.5, _CUBES),
    "v5e": Generation(
        False, "v5litepod", "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice", "ct5lp-hightpu-4t", 1, 15.75, _FLAT_V5E
    ),
    "v5p": Generation(True, "v5p", "v2-alpha-tpuv5", "tpu-v5p-slice", "ct5p-hightpu-4t", 1, 95.74, _CUBES),
    "v6e": Generation(False, "v6e", "v2-alpha-tpuv6e", "tpu-v6e-slice", "ct6e-standard-4t", 1, 31.25, _FLAT),
    "tpu7x": Generation(True, None, None, "tpu7x", "tpu7x-standard-4t", 2, 94.75, _CUBES),
}
# fmt: on


class Slice(NamedTuple):
    """A row of the table: a kind of slice, by the name that a job file gives it."""

    name: str
    generation: str
    topology: str
    chips: int
    hosts: int

    @property
    def _generation(self) -> Generation:
        return GENERATIONS[self.generation]

    @property
    def devices(self) -> int:
        """As JAX counts them."""
        return self.chips * self._generation.devices_per_chip

    @property
    def memory_gib(self) -> float:
        """Of a device, what a program can have."""
        return self._generation.memory_gib

    @property
    def label(self) -> str:
        """GKE's `cloud.google.com/gke-tpu-accelerator`."""
        return self._generation.label

    @property
    def machine_type(self) -> str:
        """Of a node pool on GKE."""
        return self._generation.machine_type

    @property
    def check_name(self) -> str:
        """What `seqmodels.tools.compile_check --topology` takes."""
        return f"{self.generation}:{self.topology}"

    @property
    def api_type(self) -> str | None:
        """--accelerator-type of the Cloud TPU API; None where that API does not have it."""
        prefix, number = self._generation.api_prefix, self.name.rpartition("-")[2]
        return f"{prefix}-{number}" if prefix else None

    @property
    def runtime(self) -> str | None:
        """--runtime-version of the Cloud TPU API; None where that API does not have it."""
        return self._generation.runtime


def _rows() -> dict[str, Slice]:
    rows = {}
    for generation, facts in GENERATIONS.items():
        for number, topology in facts.topologies.items():
            chips = math.prod(map(int, topology.split("x")))
            name = f"{generation}-{number}"
            rows[name] = Slice(name, generation, topology, chips, chips // CHIPS_PER_HOST)
    return rows


SLICES = _rows()


def find_slice(name: str) -> Slice:
    """The slice of that name, in the spelling of the Cloud TPU API too. Raises `InputError`."""
    spelling = name.replace("v5litepod-", "v5e-")
    if spelling not in SLICES:
        generation = spelling.partition("-")[0]
        sizes = [row.name for row in SLICES.values() if row.generation == generation]
        valid = f"valid: {', '.join(sizes)}" if sizes else nearest(generation, GENERATIONS)
        raise InputError(f"tpu is {name!r}: there is no such slice; {valid}")
    return SLICES[spelling]
