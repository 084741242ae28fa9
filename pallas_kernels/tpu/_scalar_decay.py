"""Chunks of a step whose decay is one number for each head and position, or none.

With b the inclusive cumulative sum of the log decay in a chunk of C positions: a position reads the state that enters
with the weight exp(b), writes the state that leaves with exp(b_C - b), a pair j <= i meets with exp(b_i - b_j), and
exp(b_C) of the entering state is left. No exponent is positive where it is used; documents are masks on all of these.
"""

from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.tpu import _tiles
from pallas_kernels.tpu._tiles import Chunk, Grid, Marks, beside


class Weights(NamedTuple):
    """Of one head in one chunk; None is 1.

    row, column   b as [1, c] and as [c, 128]; None without decay
    enter, leave  [c, 128]: of the entering state in a position, of a position in the leaving state
    through       [1, 1]: of the entering state in the leaving one
    """

    row: jax.Array | None
    column: jax.Array | None
    enter: jax.Array | None
    leave: jax.Array | None
    through: jax.Array | None


def sums(refs: SimpleNamespace, plan: Grid, chunks: list[Chunk]) -> tuple[jax.Array, jax.Array] | None:
    """b of all units of the step, as rows [units, c] and columns [c, units]; None without decay.

    It is one product for all units, whose cost does not depend on how many there are.
    """
    if refs.g is None:
        return None
    g = jnp.concatenate([refs.g[0, 0, :, chunk.at] for chunk in chunks], axis=0)
    return _tiles.sums_to(g, _tiles.triangle(plan.chunk))


def weights(sums: tuple[jax.Array, jax.Array] | None, chunk: Chunk, head: int) -> Weights:
    marks = chunk.marks
    if sums is None:
        to_number = [None if x is None else jnp.where(x, 1.0, 0.0) for x in marks[2:]]
        return Weights(None, None, *to_number)
    (rows, columns), unit = sums, chunk.units[head]
    row = rows[unit : unit + 1]
    size = row.shape[1]
    column = jnp.broadcast_to(columns[:, unit : unit + 1], (size, _tiles.LANES))
    end = row[:, size - 1 :]
    enter, leave, through = jnp.exp(column), jnp.exp(end - column), jnp.exp(end)
    if marks.first is not None:
        enter, leave = jnp.where(marks.first, enter, 0.0), jnp.where(marks.last, leave, 0.0)
        through = jnp.where(marks.unbroken, through, 0.0)
    return Weights(row, column, enter, leave, through)


def pair_decay(w: Weights, marks: Marks, *, transposed: bool) -> jax.Array:
    """exp(b_i - b_j) for the pairs that see each other, else 0: [c, c], or its transpose."""
    pairs = marks.pairs_t if transposed else marks.pairs
    if w.row is None:
        return jnp.where(pairs, 1.0, 0.0)
    column = beside(w.column, w.row.shape[1])
    return jnp.where(pairs, jnp.exp(w.row - column if transposed else column - w.row), 0.0)


def times(x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """x [c, d] in float32, position by position times the weight; or a state times a number."""
    x = x.astype(jnp.float32)
    if weight is None:
        return x
    return x * (weight if weight.shape == (1, 1) else beside(weight, x.shape[1]))


class DecayGradient:
    """The gradient of the log decay: for each position the sum of what crosses it.

    dg_t = sum_{i >= t} from_here_i + sum_{j < t} up_to_here_j + through
    """

    def __init__(self) -> None:
        self.from_here: jax.Array | None = None
        self.up_to_here: jax.Array | None = None

    def put(self, unit: int, from_here: jax.Array, up_to_here: jax.Array, through: jax.Array) -> None:
        """from_here, up_to_here: [c, 1]; through: a matrix whose sum is in every dg_t of the chunk."""
        total = jnp.sum(jnp.sum(through, axis=0, keepdims=True), axis=1, keepdims=True)
        position = jax.lax.broadcasted_iota(jnp.int32, from_here.shape, 0)
        # The end is in every sum.
        from_here += jnp.where(position == from_here.shape[0] - 1, total, 0.0)
        self.from_here = _tiles.put_column(self.from_here, unit, from_here)
        self.up_to_here = _tiles.put_column(self.up_to_here, unit, up_to_here)

    def write(self, refs: SimpleNamespace, plan: Grid, chunks: list[Chunk]) -> None:
        ones, count = _tiles.triangle(plan.chunk), len(chunks) * plan.step_heads
        from_here, up_to_here = (jnp.transpose(x)[:count] for x in (self.from_here, self.up_to_here))
        dg = _tiles.sums_from(from_here, ones) + _tiles.sums_to(up_to_here, ones)[0] - up_to_here
        for chunk in chunks:
            refs.dg[0, 0, :, chunk.at] = dg[chunk.units.start : chunk.units.stop]
