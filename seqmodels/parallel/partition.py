"""How the parameters, and what an optimizer keeps beside them, lie on the mesh: a table of (regular expression, axes).

An expression may match anywhere in a parameter's path (`re.search`), and the first rule that matches decides. Axes are
those of the parameter's last dimensions; the dimensions before them, layers that a scan has stacked, are not split. An
axis that does not divide its dimension leaves it whole.

What a matrix maps to is split over `tensor` where heads or hidden features come out, what it maps from where they go
in, so that a layer is computed on the heads of its device and summed up once; `fsdp` splits the other side, for memory
alone.
"""

import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from seqmodels.errors import InputError

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


def check_rules(rules: PartitionRules, mesh: Mesh, table: str) -> None:
    """Raise InputError for what is no rule, or names an axis that the mesh does not have."""
    for rule in rules:
        if not (isinstance(rule, (tuple, list)) and len(rule) == 2 and isinstance(rule[0], str)):
            raise InputError(f"{table}: a rule is a pair ('regular expression', axes), not {rule!r}")
        if isinstance(rule[1], str) or not isinstance(rule[1], (tuple, list)):
            raise InputError(f"{table}: the axes of {rule[0]!r} are a tuple such as (None, 'fsdp'), not {rule[1]!r}")
        try:
            re.compile(rule[0])
        except re.error as error:
            raise InputError(f"{table}: {rule[0]!r} is not a regular expression: {error}") from None
        for axis in jax.tree.leaves(list(rule[1])):
            if axis not in mesh.shape:
                raise InputError(f"{table}: {rule[0]!r} names the axis {axis!r}; expected {', '.join(mesh.shape)}")


def partition(parameters: Any, mesh: Mesh, rules: PartitionRules = ()) -> Any:
    """A tree like `parameters` (arrays or shapes) of NamedShardings, by `rules` and then `DEFAULT_RULES`."""
    table, used = (*rules, *DEFAULT_RULES), set()

    def sharding(keys: tuple, x: Any) -> NamedSharding:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        pattern, axes = next(rule for rule in table if re.search(rule[0], path))
        used.add(pattern)
        return NamedSharding(mesh, _fitted(axes, x.shape, mesh))

    shardings = jax.tree_util.tree_map_with_path(sharding, parameters)
    paths = [jax.tree_util.keystr(k, simple=True, separator="/") for k, _ in jax.tree.leaves_with_path(parameters)]
    for pattern, _ in rules:
        if pattern not in used:
            closest = difflib.get_close_matches(pattern, paths, n=1, cutoff=0.0)[0]
            raise InputError(f"partition rules: {pattern!r} decides no parameter; the nearest is {closest!r}")
    return shardings


def partition_like(tree: Any, parameters: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that holds arrays of parameters, by their paths and shapes: those of the parameters; what is
    none, a counter say, or a parameter's moments in another shape, is whole on every device."""
    leaves = jax.tree_util.tree_leaves_with_path(parameters)
    known = {
        (jax.tree_util.keystr(keys, simple=True, separator="/"), x.shape): sharding
        for (keys, x), sharding in zip(leaves, jax.tree.leaves(shardings))
    }

    def sharding(keys: tuple, x: Any) -> NamedSharding:
        parts = jax.tree_util.keystr(keys, simple=True, separator="/").split("/")
        for start in range(len(parts)):
            found = known.get(("/".join(parts[start:]), x.shape))
            if found is not None:
                return found
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree_util.tree_map_with_path(sharding, tree)


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
    for (keys, x), sharding in zip(jax.tree_util.tree_leaves_with_path(parameters), jax.tree.leaves(shardings)):
        shape = sharding.shard_shape(x.shape)
        size = math.prod(shape) * x.dtype.itemsize
        total += size
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        axes = ", ".join("+".join(jax.tree.leaves([axis])) if axis else "-" for axis in sharding.spec)
        rows.append((path, str(list(x.shape)), f"({axes})", str(list(shape)), f"{size:,}"))
    rows = [("parameter", "shape", "split over", "on a device", "bytes"), *rows, ("all", "", "", "", f"{total:,}")]
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row[:4], widths)) for row in rows)
    return "\n".join(f"{line}  {row[4].rjust(widths[4])}".rstrip() for line, row in zip(lines, rows))
