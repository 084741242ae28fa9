"""Every Pallas call of a traced program: its grid, what its pipeline moves, what its body computes.

A Pallas kernel is a body that runs once for every step of a grid. Between steps the pipeline copies blocks of the
operands between HBM and VMEM, and a block that the next step needs again stays where it is: how often it moves is found
by evaluating the index maps over the whole grid. In the same way it is found how often each `pl.when` of the body holds
whose condition depends on the place in the grid alone.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

# Index maps and conditions are evaluated for all steps of a grid at once, up to so many.
MOST_STEPS = 2_000_000


class Block(NamedTuple):
    """What the pipeline keeps of an operand in VMEM.

    bytes: of one block. copies: how often one is moved in a run of the whole grid; `exact` is False where that depends
    on data, and every step is counted. buffers: blocks in VMEM at a time.
    """

    shape: tuple[int, ...]
    dtype: str
    bytes: int
    copies: int
    exact: bool
    buffers: int
    is_output: bool


class PallasCall(NamedTuple):
    """One call, in the order of the traced program.

    times             how often the program runs it
    grid, semantics   sizes of the grid, and of each axis "parallel" or "arbitrary"
    blocks            by operand, outputs last; None for one that the kernel copies itself, whose bytes are not known
    operations        of matrix products in all steps of one call
    shares            of each condition in the body, in order, the share of steps in which it holds, 1 where that
                      depends on data; those with two branches are there twice
    signature         arrays that it reads and writes, as "bf16[8,128]", sorted
    """

    name: str
    times: int
    grid: tuple[int, ...]
    semantics: tuple[str, ...]
    blocks: tuple[Block | None, ...]
    operations: float
    shares: tuple[float, ...]
    signature: tuple[str, ...]

    @property
    def steps(self) -> int:
        return math.prod(self.grid)

    def traffic(self, on_chip: Sequence[bool] = ()) -> int:
        """Bytes that the pipeline moves from and to HBM in one call. on_chip: operands that are in VMEM anyway."""
        on_chip = [*on_chip, *[False] * (len(self.blocks) - len(on_chip))]
        return sum(x.copies * x.bytes for x, here in zip(self.blocks, on_chip) if x is not None and not here)

    @property
    def unknown_traffic(self) -> bool:
        """Whether `traffic` leaves out copies of the kernel's own, or counts some that depend on data."""
        return any(x is None or not x.exact for x in self.blocks)


def pallas_calls(jaxpr: Any, times: int = 1) -> Iterator[PallasCall]:
    """Of a jaxpr and all that it calls; loops of known length are multiplied out."""
    for x in jaxpr.eqns:
        if x.primitive.name == "pallas_call":
            yield _read(x, times)
            continue
        inner = times * x.params["length"] if x.primitive.name == "scan" else times
        for called in _called(x):
            yield from pallas_calls(called, inner)


def operations(jaxpr: Any) -> float:
    """Of matrix products, Pallas kernels included; loops of unknown length once, of branches the longest."""
    total = 0.0
    for x in jaxpr.eqns:
        if x.primitive.name == "pallas_call":
            total += _read(x, 1).operations
        elif x.primitive.name == "cond":
            total += max(map(operations, map(_plain, x.params["branches"])))
        else:
            times = x.params["length"] if x.primitive.name == "scan" else 1
            total += _product(x) + times * sum(map(operations, _called(x)))
    return total


def _plain(jaxpr: Any) -> Any:
    """A jaxpr without its constants."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _called(equation: Any) -> list[Any]:
    values = [y for x in equation.params.values() for y in (x if isinstance(x, (tuple, list)) else [x])]
    return [jaxpr for jaxpr in map(_plain, values) if hasattr(jaxpr, "eqns")]


def _product(x: Any) -> float:
    if x.primitive.name != "dot_general":
        return 0.0
    (contracted, _), _ = x.params["dimension_numbers"]
    return 2.0 * math.prod(x.outvars[0].aval.shape) * math.prod(x.invars[0].aval.shape[i] for i in contracted)


def _read(x: Any, times: int) -> PallasCall:
    mapping = x.params["grid_mapping"]
    grid = tuple(size if isinstance(size, int) else 1 for size in mapping.grid)
    # The operands that steer the grid come first, and have no blocks.
    operands = [*x.invars[len(x.invars) - mapping.num_inputs :], *x.outvars]
    blocks = [_block(block, grid, i >= mapping.num_inputs) for i, block in enumerate(mapping.block_mappings)]
    arrays = [v.aval for v in [*x.invars, *x.outvars] if hasattr(v.aval, "shape")]
    assert len(operands) == len(blocks), (len(operands), len(blocks))
    body = _Body(x.params["jaxpr"], grid)
    semantics = getattr(x.params["compiler_params"], "dimension_semantics", None) or ("arbitrary",) * len(grid)
    return PallasCall(
        name=x.params["name"] or "",
        times=times,
        grid=grid,
        semantics=tuple(str(getattr(each, "value", each)) for each in semantics),
        blocks=tuple(blocks),
        operations=body.operations * math.prod(grid),
        shares=tuple(body.shares),
        signature=tuple(sorted(signature(array.dtype, array.shape) for array in arrays)),
    )


def signature(dtype: Any, shape: Sequence[int]) -> str:
    """As the compiled program writes an array's type: "bf16[8,128]"."""
    dtype = np.dtype(dtype)
    if dtype.kind == "b":
        name = "pred"
    elif dtype.name == "bfloat16":
        name = "bf16"
    else:
        name = {"f": "f", "i": "s", "u": "u"}.get(dtype.kind, dtype.name) + str(8 * dtype.itemsize)
    return f"{name}[{','.join(map(str, shape))}]"


def _block(block: Any, grid: tuple[int, ...], is_output: bool) -> Block | None:
    space = str(getattr(block.transformed_block_aval, "memory_space", "")).lower()
    if any(name in space for name in ("any", "hbm", "semaphore")):
        return None
    shape = tuple(_size(size) for size in block.block_shape)
    dtype = np.dtype(block.array_aval.dtype)
    copies = _copies(block.index_map_jaxpr, grid)
    buffers = getattr(block.pipeline_mode, "buffer_count", 2)
    steps = math.prod(grid)
    return Block(
        shape=shape,
        dtype=dtype.name,
        # What is in SMEM is not moved by steps but is small; it is counted like the rest.
        bytes=math.prod(shape) * dtype.itemsize,
        copies=steps if copies is None else copies,
        exact=copies is not None,
        buffers=buffers if steps > 1 else 1,
        is_output=is_output,
    )


def _size(size: Any) -> int:
    """Of an axis of a block, which has several ways to be said; None and Squeezed are one element."""
    if isinstance(size, int):
        return size
    return int(getattr(size, "block_size", 1))


def _places(grid: tuple[int, ...]) -> list[np.ndarray]:
    """The coordinates of all steps, in order."""
    return [x.reshape(-1).astype(np.int32) for x in np.indices(grid)]


def _copies(index_map: Any, grid: tuple[int, ...]) -> int | None:
    """Changes of the block between one step and the next, and the first; None where it depends on data."""
    steps = math.prod(grid)
    if steps <= 1 or len(index_map.jaxpr.invars) != len(grid):
        return 1 if steps <= 1 else None
    if steps > MOST_STEPS:
        return None
    with jax.default_device(jax.local_devices(backend="cpu")[0]), jax.enable_x64(False):
        evaluate = jax.vmap(lambda *place: jax.core.eval_jaxpr(index_map.jaxpr, index_map.consts, *place))
        indices = [np.asarray(x) for x in evaluate(*_places(grid))]
    changed = np.zeros(steps - 1, bool)
    for index in indices:
        changed |= index[1:] != index[:-1]
    return 1 + int(changed.sum())


class _Body:
    """What a kernel's body computes in a step, on average over the grid.

    Scalars that depend on the place in the grid alone are followed through the body, as an array with one value for
    each step; all else is unknown.
    """

    def __init__(self, jaxpr: Any, grid: tuple[int, ...]):
        self._grid = grid
        self._places = _places(grid) if math.prod(grid) <= MOST_STEPS else None
        self.operations = 0.0
        self.shares: list[float] = []
        with jax.default_device(jax.local_devices(backend="cpu")[0]), jax.enable_x64(False):
            self._walk(jaxpr, [None] * len(jaxpr.invars), 1.0, 1.0)

    def _walk(self, jaxpr: Any, arguments: Sequence[np.ndarray | None], share: float, times: float) -> list:
        """share: of the steps, in which this runs at all; times: how often, then."""
        known: dict[Any, np.ndarray | None] = dict(zip(jaxpr.invars, arguments))

        def value(x: Any) -> Any:
            return np.asarray(x.val, x.aval.dtype) if hasattr(x, "val") else known.get(x)

        for x in jaxpr.eqns:
            name, inputs = x.primitive.name, [value(v) for v in x.invars]
            outputs = [None] * len(x.outvars)
            self.operations += share * times * _product(x)
            if name == "program_id" and self._places is not None:
                outputs = [self._places[x.params["axis"]]]
            elif name == "num_programs":
                outputs = [np.int32(self._grid[x.params["axis"]])]
            elif name == "cond":
                self._branch(x, inputs, share, times)
            elif name == "scan":
                (body,) = _called(x)
                self._walk(body, [None] * len(body.invars), share, times * x.params["length"])
            elif name in ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call"):
                called = x.params.get("jaxpr", x.params.get("call_jaxpr"))
                constants = getattr(called, "consts", ())
                outputs = self._walk(_plain(called), inputs, share, times) if not constants else outputs
            elif _called(x):
                for body in _called(x):
                    self._walk(body, [None] * len(body.invars), share, times)
            elif name in _SCALAR and all(y is not None for y in inputs):
                outputs = [np.asarray(x.primitive.bind(*self._alike(inputs), **x.params))]
            known.update(zip(x.outvars, outputs))
        return [value(v) for v in jaxpr.outvars]

    def _alike(self, values: Sequence[Any]) -> list[Any]:
        """Primitives want equal shapes: a constant beside values of steps becomes one of every step."""
        shape = np.broadcast_shapes(*map(np.shape, values))
        return [np.broadcast_to(np.asarray(x), shape) for x in values]

    def _branch(self, x: Any, inputs: list, share: float, times: float) -> None:
        branches = [_plain(branch) for branch in x.params["branches"]]
        chosen = inputs[0]
        # The compiler has a region for each branch that does anything; of two, first that of a true condition.
        for i in reversed(range(len(branches))):
            if not branches[i].eqns:
                continue
            here = 1.0 if chosen is None else float(np.mean(np.asarray(chosen) == i))
            self.shares.append(here)
            # A condition inside another is taken to hold as often there as elsewhere.
            self._walk(branches[i], inputs[1:], share * here, times)


_SCALAR = {
    *("add", "sub", "mul", "div", "rem", "neg", "sign", "abs", "max", "min", "clamp"),
    *("select_n", "convert_element_type", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "xor", "not"),
    *("shift_left", "shift_right_arithmetic", "shift_right_logical"),
}
