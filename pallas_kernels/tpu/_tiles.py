"""What the TPU kernels share: products, sums along a chunk, documents, and the way a grid walks heads and chunks.

A kernel reads arrays [b, t, heads * channels], as projections write them, in blocks of some positions of some heads; a
head is a range of lanes. The grid is (rows, blocks of heads, blocks of positions); the state stays in VMEM scratch
over the last, which runs in order.

Weights of positions, [c], are needed beside every channel. They are broadcast over the lanes once, as [c, 128], and
then used: every broadcast on its own would keep the unit that moves data across lanes busier than the products.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.late import late
from pallas_kernels.tpu._generations import Sizes

LANES = 128
MOST_HEADS = 8
MOST_UNITS = 32
DTYPES = {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}
WIDEST = 256


def declined(g: jax.Array | None = None, **arrays: jax.Array) -> str | None:
    """Why no kernel takes these arrays of heads, with the log decay g, or None."""
    dtypes = [x.dtype for x in arrays.values()]
    if len(set(dtypes)) > 1 or not set(dtypes) <= DTYPES:
        return f"{', '.join(arrays)} are {', '.join(map(str, dtypes))}; expected all bfloat16 or all float32"
    if g is not None and g.dtype != jnp.float32:
        return f"g is {g.dtype}; expected float32"
    for name, x in arrays.items():
        if x.shape[-1] > WIDEST:
            return f"the heads of {name} have {x.shape[-1]} channels; expected at most {WIDEST}"
    return None


# ----- products -----------------------------------------------------------------------------------------------------


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b, accumulated in float32; float32 operands are not rounded."""
    return _product(a, b, 1, 0)


def product_nt(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b^T."""
    return _product(a, b, 1, 1)


def product_tn(a: jax.Array, b: jax.Array) -> jax.Array:
    """a^T b."""
    return _product(a, b, 0, 0)


def _product(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    axes = (((of_a,), (of_b,)), ((), ()))
    return jax.lax.dot_general(a, b, axes, precision=precision, preferred_element_type=jnp.float32)


def triangle(size: int) -> jax.Array:
    """[c, c] of bfloat16: 1 where column <= row."""
    return jnp.where(earlier(size), 1.0, 0.0).astype(jnp.bfloat16)


def earlier(size: int) -> jax.Array:
    """[c, c]: column <= row."""
    return _iota(size, 0) >= _iota(size, 1)


def _iota(size: int, axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, (size, size), axis)


def sums_to(g: jax.Array, ones: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cumulative sums of g [h, c] along the chunk: as rows [h, c] and as columns [c, h]. ones: `triangle`."""
    parts = in_parts(g)
    rows, columns = product_nt(parts, ones), product_nt(ones, parts)
    h = g.shape[0]
    return rows[:h] + rows[h : 2 * h] + rows[2 * h :], columns[:, :h] + columns[:, h : 2 * h] + columns[:, 2 * h :]


def sums_from(x: jax.Array, ones: jax.Array) -> jax.Array:
    """[h, c]: the sum of x from each position to the chunk's end."""
    sums, h = product(in_parts(x), ones), x.shape[0]
    return sums[:h] + sums[h : 2 * h] + sums[2 * h :]


def in_parts(x: jax.Array) -> jax.Array:
    """[3 h, c] of bfloat16 whose sum over the three is x exactly: its products with ones lose nothing in one pass."""
    high = x.astype(jnp.bfloat16).astype(jnp.float32)
    middle = (x - high).astype(jnp.bfloat16).astype(jnp.float32)
    return jnp.concatenate([high, middle, x - high - middle], axis=0).astype(jnp.bfloat16)


def put_column(columns: jax.Array | None, n: int, column: jax.Array) -> jax.Array:
    """Columns [c, 128] with [c, 1] for the n-th; None are zeros."""
    lane = jax.lax.broadcasted_iota(jnp.int32, (column.shape[0], LANES), 1)
    return jnp.where(lane == n, column, 0.0 if columns is None else columns)


def beside(column: jax.Array, channels: int) -> jax.Array:
    """[c, 128], the same in all lanes -> [c, channels]."""
    if channels <= LANES:
        return column[:, :channels]
    return jnp.concatenate([column] * (channels // LANES), axis=1)


# ----- documents ----------------------------------------------------------------------------------------------------


class Marks(NamedTuple):
    """Which positions of a chunk see which.

    pairs      [c, c] bool: the column is of the row's document, and not after it
    pairs_t    its transpose
    first      [c, 128] bool: of the document that the entering state belongs to. None: all are
    last       [c, 128] bool: of the document that the leaving state belongs to. None: all are
    unbroken   [1, 1] bool: first and last are one document. None: they are
    """

    pairs: jax.Array
    pairs_t: jax.Array
    first: jax.Array | None = None
    last: jax.Array | None = None
    unbroken: jax.Array | None = None


def marks(index: jax.Array | None, size: int) -> Marks:
    """index: [1, c] int32, number of documents that started since the state that enters; None: no document starts."""
    before, after = earlier(size), _iota(size, 0) <= _iota(size, 1)
    if index is None:
        return Marks(before, after)
    row = index.astype(jnp.float32)
    column = jnp.transpose(jnp.broadcast_to(row, (LANES, size)))
    same = beside(column, size) == row
    end = row[:, size - 1 :]
    return Marks(before & same, after & same, column == 0, column == end, end == 0)


# ----- the grid -----------------------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """How a kernel walks its arrays.

    rows, positions     b and t, t a multiple of `block`
    key_heads, heads    h and hv
    key_dim, value_dim  channels of a head, padded
    chunk, block        positions of a chunk and of a step
    step_heads          value heads of a step
    memory              bytes of VMEM that a step may take
    """

    rows: int
    positions: int
    key_heads: int
    heads: int
    key_dim: int
    value_dim: int
    chunk: int
    block: int
    step_heads: int
    memory: int

    @property
    def group(self) -> int:
        """Value heads that share a key head."""
        return self.heads // self.key_heads

    @property
    def step_keys(self) -> int:
        """Key heads of a step."""
        return max(1, self.step_heads // self.group)

    @property
    def sharing(self) -> int:
        """Value heads of a step that share a key head of it."""
        return self.step_heads // self.step_keys

    @property
    def shares(self) -> int:
        """Steps that read the same key head, and write a part each of its gradient."""
        return max(1, self.group // self.step_heads)

    @property
    def blocks(self) -> int:
        return self.positions // self.block

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.rows, self.heads // self.step_heads, self.blocks

    def chunks(self) -> list[slice]:
        """The positions of each chunk of a step."""
        return [slice(at, at + self.chunk) for at in range(0, self.block, self.chunk)]

    def key_lanes(self, head: int) -> slice:
        """Lanes of a step's block of keys that the value head `head` of the step reads."""
        at = head // self.sharing * self.key_dim
        return slice(at, at + self.key_dim)

    def decay_lanes(self, head: int) -> slice:
        """Lanes of a step's block of decay per channel, whose heads are those of values."""
        return slice(head * self.key_dim, (head + 1) * self.key_dim)

    def value_lanes(self, head: int) -> slice:
        return slice(head * self.value_dim, (head + 1) * self.value_dim)


class Chunk(NamedTuple):
    """A chunk of a step, for all its heads.

    at     its positions within the step
    units  the chunk and each of its heads, numbered through the step
    """

    at: slice
    units: range
    marks: Marks


def chunks(refs: SimpleNamespace, plan: Grid) -> list[Chunk]:
    """Those of a step."""
    found = []
    for n, at in enumerate(plan.chunks()):
        seen = marks(None if refs.index is None else refs.index[0, :, at], plan.chunk)
        found.append(Chunk(at, range(n * plan.step_heads, (n + 1) * plan.step_heads), seen))
    return found


def grid(
    q_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    itemsize: int,
    sizes: Sizes,
    chunk: int | None,
    *,
    by_channel: bool = False,
) -> Grid:
    """For q [b, t, h, k] and v [b, t, hv, v].

    chunk: None takes that of `sizes`, others are made multiples of 128. by_channel: there is a decay [b, t, hv, k] too.
    """
    rows, length, key_heads, key_dim = q_shape
    heads, value_dim = v_shape[2:]
    if by_channel and key_heads != heads:
        # The lanes of the decay, whose heads are those of v, are to divide among the steps as those of v do.
        key_dim = round_up(key_dim, LANES)
    chunk = round_up(chunk or sizes.chunk, LANES)
    chunk = min(chunk, round_up(length, LANES))
    key_dim, value_dim = (
        dim if dim % 64 == 0 and dim < LANES else round_up(dim, LANES)
        for dim in (round_up(key_dim, 64), round_up(value_dim, 64))
    )
    found = step_heads(rows, key_heads, heads, key_dim, value_dim, cores=sizes.cores)
    if found is None:
        # Halves of the lanes of a register do not divide among the steps: a head takes all of them.
        key_dim, value_dim = round_up(key_dim, LANES), round_up(value_dim, LANES)
        found = step_heads(rows, key_heads, heads, key_dim, value_dim, cores=sizes.cores)
    unit = chunk * max(key_dim, value_dim) * itemsize
    units = max(1, min(MOST_UNITS * LANES // chunk, sizes.step_bytes // unit))
    if found > units:
        found = step_heads(rows, key_heads, heads, key_dim, value_dim, units, cores=sizes.cores) or found
    chunks = -(-length // chunk)
    blocks = -(-chunks // max(1, units // found))
    block = chunk * -(-chunks // blocks)
    return Grid(rows, blocks * block, key_heads, heads, key_dim, value_dim, chunk, block, found, sizes.memory)


def power_of_two(chunk: int | None, length: int) -> int:
    """Positions of a chunk that is to be halved: 256 where more than 128 are asked for and there, else 128."""
    return 2 * LANES if chunk is not None and min(chunk, length) > LANES else LANES


def step_heads(
    rows: int, key_heads: int, heads: int, key_dim: int, value_dim: int, most: int = MOST_HEADS, *, cores: int
) -> int | None:
    """The most value heads for a step, of those that divide evenly and fill lanes, and leave a step for each core."""
    group = heads // key_heads
    found = None
    for n in range(1, most + 1):
        keys = max(1, n // group)
        divides = heads % n == 0 and (n % group == 0 or group % n == 0)
        fills = all(
            heads_of_step * dim % LANES == 0 or heads_of_step == all_heads
            for heads_of_step, dim, all_heads in ((keys, key_dim, key_heads), (n, value_dim, heads))
        )
        if divides and fills and (found is None or rows * heads // n >= cores):
            found = n
    return found


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def lay_out(x: jax.Array, plan: Grid, channels: int) -> jax.Array:
    """[b, t, h, d] -> [b, positions, h * channels], with zeros at the end of time and of channels."""
    widths = ((0, 0), (0, plan.positions - x.shape[1]), (0, 0), (0, channels - x.shape[3]))
    x = jnp.pad(x, widths) if any(after for _, after in widths) else x
    return x.reshape(*x.shape[:2], -1)


def lay_out_decay(g: jax.Array, plan: Grid) -> jax.Array:
    """[b, t, hv] -> [b, blocks of heads, heads of a step, positions]."""
    g = jnp.pad(g, ((0, 0), (0, plan.positions - g.shape[1]), (0, 0)))
    return jnp.swapaxes(g, 1, 2).reshape(plan.rows, -1, plan.step_heads, plan.positions)


def lay_out_index(index: jax.Array, plan: Grid) -> jax.Array:
    """[b, t] -> [b, 1, positions]: numbers of documents, counted from the one that enters each chunk."""
    index = jnp.pad(index, ((0, 0), (0, plan.positions - index.shape[1])), mode="edge")
    incoming = jnp.pad(index[:, plan.chunk - 1 : -1 : plan.chunk], ((0, 0), (1, 0)))
    return (index - jnp.repeat(incoming, plan.chunk, axis=1))[:, None]


def lay_out_state(S: jax.Array, plan: Grid) -> jax.Array:
    """[b, hv, k, v] with zeros at the end of the channels."""
    return jnp.pad(S, ((0, 0), (0, 0), (0, plan.key_dim - S.shape[2]), (0, plan.value_dim - S.shape[3])))


def sum_shares(x: jax.Array, plan: Grid) -> jax.Array:
    """[b, t, h * shares * k] -> [b, t, h * k]."""
    if plan.shares == 1:
        return x
    parts = x.reshape(*x.shape[:2], plan.key_heads, plan.shares, plan.key_dim)
    return parts.sum(axis=3).reshape(*x.shape[:2], -1)


class Specs:
    """Blocks of the arrays of a kernel. backwards: the steps of one row walk time from its end."""

    def __init__(self, plan: Grid, backwards: bool = False) -> None:
        self.plan, self.backwards = plan, backwards

    def block_at(self, t: jax.Array) -> jax.Array:
        return self.plan.blocks - 1 - t if self.backwards else t

    def keys(self) -> pl.BlockSpec:
        """Of [b, t, h * k]."""
        plan = self.plan
        shape = (1, plan.block, plan.step_keys * plan.key_dim)
        # Not //, whose lowering asks which TPU this process has.
        return pl.BlockSpec(shape, lambda b, h, t: (b, self.block_at(t), jax.lax.div(h, jnp.int32(plan.shares))))

    def key_gradients(self) -> pl.BlockSpec:
        """Of [b, t, h * shares * k]."""
        plan = self.plan
        shape = (1, plan.block, plan.step_keys * plan.key_dim)
        return pl.BlockSpec(shape, lambda b, h, t: (b, self.block_at(t), h))

    def values(self) -> pl.BlockSpec:
        """Of [b, t, hv * v]."""
        shape = (1, self.plan.block, self.plan.step_heads * self.plan.value_dim)
        return pl.BlockSpec(shape, lambda b, h, t: (b, self.block_at(t), h))

    def decay(self) -> pl.BlockSpec:
        """Of [b, blocks of heads, heads of a step, t]."""
        shape = (1, 1, self.plan.step_heads, self.plan.block)
        return pl.BlockSpec(shape, lambda b, h, t: (b, h, 0, self.block_at(t)))

    def key_decay(self) -> pl.BlockSpec:
        """Of [b, t, hv * k]."""
        shape = (1, self.plan.block, self.plan.step_heads * self.plan.key_dim)
        return pl.BlockSpec(shape, lambda b, h, t: (b, self.block_at(t), h))

    def index(self) -> pl.BlockSpec:
        """Of [b, 1, t]."""
        return pl.BlockSpec((1, 1, self.plan.block), lambda b, h, t: (b, 0, self.block_at(t)))

    def state(self, *shape: int) -> pl.BlockSpec:
        """Of [b, hv, *shape]."""
        zeros = (0,) * len(shape)
        return pl.BlockSpec((1, self.plan.step_heads, *shape), lambda b, h, t: (b, h, *zeros))

    def entered(self, *shape: int) -> pl.BlockSpec:
        """Of [b, blocks, hv, *shape]: the states that entered each step."""
        zeros = (0,) * len(shape)
        return pl.BlockSpec((1, 1, self.plan.step_heads, *shape), lambda b, h, t: (b, self.block_at(t), h, *zeros))


def run(
    body: Callable[[SimpleNamespace], None],
    *,
    name: str,
    plan: Grid,
    inputs: Mapping[str, tuple[jax.Array | None, pl.BlockSpec]],
    outputs: Mapping[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec] | None],
    scratch: Mapping[str, tuple[int, ...] | None],
    interpret: Any,
) -> SimpleNamespace:
    """`body(refs)` at every step of the grid: the outputs by name. scratch: shapes of float32 in VMEM.

    The attributes of `refs` have the names of inputs, outputs and scratch; of those that are not there they are None.
    """
    given = {key: x for key, x in inputs.items() if x[0] is not None}
    wanted = {key: x for key, x in outputs.items() if x is not None}
    used = {key: shape for key, shape in scratch.items() if shape is not None}
    absent = dict.fromkeys((*inputs, *outputs, *scratch))

    def kernel(*refs):
        body(SimpleNamespace(**(absent | dict(zip((*given, *wanted, *used), refs)))))

    shapes = [shape for shape, _ in wanted.values()]
    call = pl.pallas_call(
        kernel,
        name=name,
        grid=plan.shape,
        in_specs=[spec for _, spec in given.values()],
        out_specs=[spec for _, spec in wanted.values()],
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in used.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=plan.memory
        ),
        interpret=interpret,
    )
    call = call if interpret else late(call, shapes)
    found = call(*(x for x, _ in given.values()))
    return SimpleNamespace(**(dict.fromkeys(outputs) | dict(zip(wanted, found))))
