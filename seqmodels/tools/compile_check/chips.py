"""TPU slices as targets of the compiler, which runs on any Linux machine, and what their chips can do."""

import importlib.util
import os
import re
from typing import NamedTuple

# Before jax is imported, which would look for TPUs of this machine, and before libtpu is, which would ask a metadata
# server what machine this is, refuse to be loaded by two processes, and fill a folder with its log.
for _name, _value in {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_LOG_DIR": "disabled",
}.items():
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402

from seqmodels.errors import InputError, nearest  # noqa: E402

GIB = 2**30


class Chip(NamedTuple):
    """Of one core; a jax device has one or two.

    kind         what jax calls the device
    dimensions   of the torus in which chips of this generation are wired
    flops        bfloat16 operations per second
    bandwidth    of its memory, bytes per second
    memory       bytes that a program can have, as the compiler says
    link         bytes per second of a link to a neighbour, one way, as published; of a device
    clock        cycles per second
    """

    kind: str
    dimensions: int
    flops: float
    bandwidth: float
    memory: float
    link: float
    clock: float

    def of_device(self, cores: int) -> "Chip":
        """The same for a device with so many cores."""
        return self._replace(flops=self.flops * cores, bandwidth=self.bandwidth * cores, memory=self.memory * cores)


CHIPS = {
    "v4": Chip("TPU v4", 3, 137.5e12, 0.614e12, 15.25 * GIB, 45e9, 1.05e9),
    "v5e": Chip("TPU v5 lite", 2, 197e12, 0.819e12, 15.75 * GIB, 45e9, 1.5e9),
    "v5p": Chip("TPU v5", 3, 229.5e12, 1.3825e12, 47.87 * GIB, 90e9, 1.75e9),
    "v6e": Chip("TPU v6 lite", 2, 918e12, 1.638e12, 31.25 * GIB, 90e9, 1.75e9),
    "tpu7x": Chip("TPU7x", 3, 1153e12, 3.7e12, 94.75 * GIB, 100e9, 2.2e9),
}


class Target(NamedTuple):
    """A slice, or several equal ones, to compile for. chip: what a device is."""

    name: str
    generation: str
    chip: Chip
    devices: list[jax.Device]


def generation_of(topology: str) -> str:
    """The generation in a topology such as v5p:8x8x8. Raises InputError for what is none."""
    name, _, shape = topology.partition(":")
    if name not in CHIPS:
        raise InputError(f"--topology {topology}: there is no TPU generation {name!r}; {nearest(name, CHIPS)}")
    sides = "x".join("N" * CHIPS[name].dimensions)
    if not re.fullmatch("x".join([r"[1-9]\d*"] * CHIPS[name].dimensions), shape):
        raise InputError(f"--topology {topology}: expected the slice's shape in chips, {name}:{sides}")
    return name


def target(topology: str, slices: int = 1) -> Target:
    """`slices` slices of the topology's shape as targets.

    Raises InputError where there is no such slice, or no compiler for it.
    """
    generation = generation_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("the TPU compiler is not installed; expected libtpu, as `pip install -e '.[tpu]'` brings it")
    from jax.experimental import topologies

    more = {"num_slices": slices} if slices > 1 else {}
    if generation == "v4":
        more["chip_config_name"] = "megacore"  # two cores that are one device, as on a machine that has them
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology, **more).devices
    except Exception as error:  # jax raises whatever libtpu says
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--topology {topology}: the compiler knows no such slice: {reason}") from error
    chip = CHIPS[generation].of_device(getattr(devices[0], "num_cores", 1) or 1)
    assert devices[0].device_kind == chip.kind, devices[0].device_kind
    return Target(topology if slices == 1 else f"{slices} x {topology}", generation, chip, list(devices))
