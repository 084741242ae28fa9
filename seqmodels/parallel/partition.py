"""How the parameters, and what an optimizer keeps beside them, lie on the mesh: a table of (regular expression, axes).

An expression may match anywhere in a parameter's path (`re.search`), and the first rule that matches decides. Axes are
those of the parameter's last dimensions; the dimensions before them, layers that a scan has stacked, are not split. An
axis that does not divide its dimension leaves it whole.

What a matrix maps to is split over `tensor` where heads or hidden features come out, what it maps from where they go
in, so that a layer is computed on the heads of its device and summed up once; `fsdp` splits the other side, for memory
alone.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seqmodels.errors import InputError
from seqmodels.parameter_rules import parameter_paths, values_by_rules

Axes = Sequence[str | Sequence[str] | None]
PartitionRules = Sequence[tuple[str, Axes]]

DEFAULT_RULES: PartitionRules = (
    (r"(^|/)embedding$", ("tensor", "fsdp")),
    (r"(^|/)(o_proj|out_proj|down_proj)/kernel$", ("tensor", "fsdp")),
    (r"(^|/)\w*conv\w*/kernel$", (None, "tensor")),
    (r"(^|/)memory_kernel\w*$", ("tensor", "fsdp", None)),
    (r"(^|/)kernel$", ("fsdp", "tensor")),
    (r"(^|/)(gate_proj|up_proj)$", (None, "fsdp", "tensor")),
    (r"(^|/)down_proj$", (None, "tensor", "fsdp")),
    (r"", ()),
)


def partition(parameters: Any, mesh: Mesh, rules: PartitionRules = (), table: str = "DeviceMesh.rules") -> Any:
    """A tree like `parameters` (arrays or shapes) of NamedShardings, by `rules` and then `DEFAULT_RULES`.

    Raises InputError, which names the `table`, for what is no rule, names no axis of the mesh, or decides no parameter.
    """

    def check(pattern: str, axes: Any) -> None:
        if not isinstance(axes, (tuple, list)):
            raise InputError(f"{table}: the axes of {pattern!r} are a tuple such as (None, 'fsdp'), not {axes!r}")
        for axis in jax.tree.leaves(list(axes)):
            if axis not in mesh.shape:
                raise InputError(f"{table}: {pattern!r} names the axis {axis!r}; expected {', '.join(mesh.shape)}")

    axes_of_all = values_by_rules(rules, parameters, otherwise=DEFAULT_RULES, table=table, check=check)
    leaves, structure = jax.tree.flatten(parameters)
    shardings = [NamedSharding(mesh, _fitted(axes, x.shape, mesh)) for axes, x in zip(axes_of_all, leaves)]
    return jax.tree.unflatten(structure, shardings)


def partition_like(tree: Any, parameters: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that holds arrays of parameters, by their paths and shapes: those of the parameters; what is
    none, a counter say, or a parameter's moments in another shape, is whole on every device."""
    paths, leaves = parameter_paths(parameters), jax.tree.leaves(parameters)
    known = {(path, x.shape): sharding for path, x, sharding in zip(paths, leaves, jax.tree.leaves(shardings))}

    def sharding(path: str, x: Any) -> NamedSharding:
        parts = path.split("/")
        for start in range(len(parts)):
            found = known.get(("/".join(parts[start:]), x.shape))
            if found is not None:
                return found
        return NamedSharding(mesh, PartitionSpec())

    found = [sharding(path, x) for path, x in zip(parameter_paths(tree), jax.tree.leaves(tree))]
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def _fitted(axes: Axes, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """`axes` on the last dimensions of `shape`, without those that do not divide theirs."""
    axes = tuple(axes)[max(len(axes) - len(shape), 0) :]
    sizes = shape[len(shape) - len(axes) :]
    parts = [math.prod(mesh.shape[name] for name in jax.tree.leaves([axis])) for axis in axes]
    fitted = [axis if size % n == 0 else None for axis, size, n in zip(axes, sizes, parts)]
    return PartitionSpec(*[None] * (len(shape) - len(axes)), *fitted)


def partition_table(parameters: Any, shardings: Any) -> str:
    """How every parameter is split, and its bytes on a device, as text."""
    rows, total = [], 0
    leaves = jax.tree.leaves(parameters), jax.tree.leaves(shardings)
    for path, x, sharding in zip(parameter_paths(parameters), *leaves):
        shape = sharding.shard_shape(x.shape)
        size = math.prod(shape) * x.dtype.itemsize
        total += size
        axes = ", ".join("+".join(jax.tree.leaves([axis])) if axis else "-" for axis in sharding.spec)
        rows.append((path, str(list(x.shape)), f"({axes})", str(list(shape)), f"{size:,}"))
    rows = [("parameter", "shape", "split over", "on a device", "bytes"), *rows, ("all", "", "", "", f"{total:,}")]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row[:4], widths)) for row in rows)
    return "\n".join(f"{line}  {row[4].rjust(widths[4])}".rstrip() for line, row in zip(lines, rows))
