"""The device mesh, and how a batch and a state lie on it.

Every program of this package runs on one mesh with the same four axes, whatever their sizes:

    data     the batch is split; parameters are copied
    fsdp     the batch is split, and parameters with it
    seq      the time axis is split
    tensor   heads and features are split
"""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from seqmodels.errors import InputError

AXES = ("data", "fsdp", "seq", "tensor")


def make_mesh(data: int = -1, fsdp: int = 1, seq: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices of all processes; one axis may be -1 and takes the devices that the others
    leave.

    Raises `InputError` when the sizes do not multiply to the number of devices.
    """
    sizes, devices = [data, fsdp, seq, tensor], jax.device_count()
    asked = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise InputError(f"mesh ({asked}): sizes are positive, and at most one of them is -1")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and devices % known == 0:
        sizes[sizes.index(-1)] = devices // known
    if math.prod(sizes) != devices:
        raise InputError(
            f"mesh ({asked}) does not fit {devices} devices: the sizes must multiply to {devices}"
        )
    # Auto axes: the default (Explicit) refuses the partitioning annotations of linen modules.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh) -> int:
    """How many pieces the batch axis is cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch, made of the part `[B / processes, T, ...]` that each process has read."""
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "seq"))
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
        for name, rows in batch.items()
    }
