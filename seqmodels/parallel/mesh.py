"""The device mesh, and how a batch lies on it.

Every program of this package runs on one mesh with the same four axes, whatever their sizes:

    data     the batch is split; parameters are copied
    fsdp     the batch is split, and parameters with it
    seq      the time axis is split
    tensor   heads and features are split

Where devices come in slices with a slow network between them, slices are the outer part of `data`: only gradients,
summed once per update, cross it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from seqmodels.errors import InputError
from seqmodels.notation import MESH_AXES, ROW_AXES, TIME_AXIS


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    seq: int = 1,
    tensor: int = 1,
    *,
    slices: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh over `devices`, None for all devices of all processes; one axis may be -1 and takes the devices that the
    others leave.

    slices: groups of devices with a slow network between them: TPU slices, or else as many equal parts of `devices` as
        they come. They split `data`.

    Raises `InputError` when the sizes do not multiply to the number of devices, or slices do not divide `data`.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = tuple(mesh_sizes(len(devices), data, fsdp, seq, tensor, slices).values())
    inner = (sizes[0] // slices, *sizes[1:])
    if slices == 1:
        # Where an axis of the mesh matches no axes of the network, as 64 on 16 x 16, it takes a part of one.
        placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    elif len({getattr(device, "slice_index", None) for device in devices}) == slices:
        placed = mesh_utils.create_hybrid_device_mesh(
            inner, (slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    else:
        placed = np.array(devices).reshape(sizes)
    # Auto axes: the default (Explicit) refuses the partitioning annotations of linen modules.
    return Mesh(placed, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def mesh_sizes(count: int, data: int, fsdp: int, seq: int, tensor: int, slices: int) -> dict[str, int]:
    """Devices along each axis where there are `count` of them; raises as `make_mesh` does."""
    sizes = [data, fsdp, seq, tensor]
    asked = describe_mesh(dict(zip(MESH_AXES, sizes)))
    if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
        raise InputError(f"mesh ({asked}): sizes are positive, and at most one of them is -1")
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count:
        raise InputError(f"mesh ({asked}) does not fit {count} devices: the sizes must multiply to {count}")
    if slices < 1 or sizes[0] % slices:
        raise InputError(f"mesh ({asked}): slices={slices} does not divide data={sizes[0]}")
    return dict(zip(MESH_AXES, sizes))


def describe_mesh(sizes: Mapping[str, int]) -> str:
    """Sizes by axis, for a person."""
    return ", ".join(f"{axis}={size}" for axis, size in sizes.items())


def must_take_turns(devices: Iterable[jax.Device]) -> bool:
    """Whether a program on these devices is to end before the next one starts.

    So it is on several CPU devices, of one process or many: they share threads, and programs that run ahead of each
    other can wait in their collectives for each other for ever.
    """
    devices = list(devices)
    return len(devices) > 1 and devices[0].platform == "cpu"


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays [B, T, ...]."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES, TIME_AXIS))


def batch_shards(mesh: Mesh) -> int:
    """How many pieces the batch axis is cut into."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def rows_of_process(mesh: Mesh) -> tuple[int, int]:
    """(i, n): the devices of this process need the i-th of n equal parts of every batch's rows.

    Processes whose devices split time or features alone need the same rows. Where a process would need rows from
    several parts it reads all of them, (0, 1).
    """
    shards = batch_shards(mesh)
    indices = NamedSharding(mesh, PartitionSpec(ROW_AXES)).addressable_devices_indices_map((shards,))
    places = {index[0].indices(shards)[0] for index in indices.values()}
    first, count = min(places), max(places) - min(places) + 1
    if shards % count or first % count:
        return 0, 1
    return first // count, shards // count


def place_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """The global batch, of the part `[B / n, T, ...]` of it that each process has read: see `rows_of_process`."""
    part, parts = rows_of_process(mesh)
    sharding = batch_sharding(mesh)

    def place(rows: np.ndarray) -> jax.Array:
        first = part * len(rows)

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(parts * len(rows))
            return rows[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback((parts * len(rows), *rows.shape[1:]), sharding, shard)

    return {name: place(np.asarray(rows)) for name, rows in batch.items()}
