"""The mesh of devices in context, as operators see it.

Code is written in the global view: arrays are whole, and XLA places their parts on devices. What an operator does it
does inside `jax.shard_map`, where a device sees its own shard; `_sequence_parallel` enters it for all operators.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from seqmodels.notation import HEAD_AXIS, ROW_AXES, TIME_AXIS, Array


class MeshView(NamedTuple):
    """The axes of the mesh in context that can split arrays here.

    names   those that are not split by hand already, all of which a `jax.shard_map` takes over
    rows    the names that split rows, and
    n_rows  into how many parts
    n_time, n_heads   parts of the time axis, and of the heads
    single  names of axes of one device. A PartitionSpec names them with the rows: what it does not name is summed up
            over the axis on the way back, also where there is nothing to sum up
    """

    names: frozenset[str]
    rows: tuple[str, ...]
    n_rows: int
    n_time: int
    n_heads: int
    single: tuple[str, ...]

    def row_axes(self, batch: int) -> tuple[str, ...] | None:
        """What a PartitionSpec says of the axis of `batch` rows. Where there are not as many for each device they are
        not split."""
        axes = (*self.rows, *self.single) if batch % self.n_rows == 0 else self.single
        return axes or None

    @property
    def head_axis(self) -> str | None:
        return HEAD_AXIS if self.n_heads > 1 else None


def view() -> MeshView | None:
    """The mesh in context; None where there is none, or one device, or each device sees its shard already."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    names = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes)
    sizes = {name: mesh.shape[name] for name in names}
    if all(size == 1 for size in sizes.values()):
        return None
    rows = tuple(name for name in ROW_AXES if sizes.get(name, 1) > 1)
    n_rows = functools.reduce(lambda n, name: n * sizes[name], rows, 1)
    single = tuple(name for name in mesh.axis_names if sizes.get(name) == 1)
    return MeshView(names, rows, n_rows, sizes.get(TIME_AXIS, 1), sizes.get(HEAD_AXIS, 1), single)


def is_spread() -> bool:
    """Whether arrays may lie spread over the devices of the mesh in context; inside `jax.shard_map` they do not."""
    return view() is not None


def on_tpus() -> bool:
    """Whether the devices of the mesh in context, or else those of this process, are TPUs."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() == "tpu" if device is None else device.device_kind.startswith("TPU")


def constrain(x: Array) -> Array:
    """Activations [b, t, ...] split over rows and time, as far as these divide; unchanged where there is no mesh."""
    mesh = view()
    if mesh is None:
        return x
    time = TIME_AXIS if mesh.n_time > 1 and x.shape[1] % mesh.n_time == 0 else None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(mesh.row_axes(x.shape[0]), time))


def gathered(x: Array) -> Array:
    """The same, whole on every device; unchanged where there is no mesh."""
    return x if view() is None else jax.lax.with_sharding_constraint(x, PartitionSpec())


def running(kind: str, x: Array, *, exclusive: bool = False) -> Array:
    """Of integers [b, t]: the "sum" or the "max" (at least 0) of what is up to each position, or the "last" of it that
    is not 0; exclusive: of what is before it.

    Where devices share the time axis each looks at its own shard, and they exchange one number per row.
    """

    def local(x: Array) -> Array:
        if kind == "sum":
            return jnp.cumsum(x, axis=1, dtype=x.dtype)
        if kind == "max":
            return jax.lax.cummax(x, axis=1)
        place = jax.lax.cummax(jnp.where(x != 0, jnp.arange(x.shape[1]), 0), axis=1)
        return jnp.take_along_axis(x, place, axis=1)

    def follow(before: Array, y: Array) -> Array:
        if kind == "last":
            return jnp.where(y != 0, y, before)
        return before + y if kind == "sum" else jnp.maximum(before, y)

    def shard(x: Array, before: Array) -> Array:
        """before [b]: the outcome of all that lies before the shard."""
        y = local(x)
        if exclusive:
            y = jnp.pad(y[:, :-1], ((0, 0), (1, 0)))
        return follow(before[:, None], y)

    def with_earlier_shards(x: Array) -> Array:
        ends = jax.lax.all_gather(local(x)[:, -1], TIME_AXIS)
        start = jnp.zeros_like(ends[0])
        rank = jax.lax.axis_index(TIME_AXIS)
        return shard(x, jax.lax.fori_loop(0, rank, lambda j, before: follow(before, ends[j]), start))

    mesh = view()
    if mesh is None or mesh.n_time == 1 or x.shape[1] % mesh.n_time:
        return shard(x, jnp.zeros_like(x[:, 0]))
    spec = PartitionSpec(mesh.row_axes(x.shape[0]), TIME_AXIS)
    return jax.shard_map(
        with_earlier_shards, in_specs=(spec,), out_specs=spec, axis_names=mesh.names, check_vma=False
    )(x)
