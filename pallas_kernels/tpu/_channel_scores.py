"""Scores of a chunk whose log decay g [c, k] is per channel, and their cotangents.

With b the cumulative sum of g, x the rows and k the columns (queries or keys against keys), e a weight exp(...) <= 1:

    A_ij = sum_k x_ik k_jk exp(b_ik - b_jk),  j <= i                                                               (1)

Decay per channel does not factor out of (1), and exp(b_i) exp(-b_j) overflows (Yang et al. 2023, arXiv 2312.06635,
section 4). Each pair is met somewhere between its two positions. Cut the chunk into blocks of 8, 16, 32, ... positions:

    blocks   pairs that are in one block of 2 h and not in one of h: i in its later half, j in its earlier one. With
             x^h the row decayed since the start of its block of h, k^h the column decayed to the end of its own,
                 A_ij = x^h_i k^h_j                                                                                (2)
             which is one product of matrices for each h. Doubling a block multiplies half of the rows by a number per
             channel, the whole decay e of the other half:
                 x^2h = x^h e_earlier in the later half,  k^2h = k^h e_later in the earlier half                   (3)
             x^c are the rows that read the state that enters the chunk, k^c those that write the one that leaves.
    groups   pairs in one group of 8. With m the mean of b at its fourth and fifth position,
                 A_ij = (x_i exp(b_i - m)) (k_j exp(m - b_j))                                                      (4)
             whose exponents are of either sign, and at most 3.5 times the strongest decay of one step.

So that (4) is finite, a step forgets no further than exp(STRONGEST) = 6e-9: less than what a float32 sum of what it
forgets and of what it adds can hold. Everything here has that decay, so that values and gradients are of one operator.

    code     symbol               shape
    x, k     x, k                 [c, k]; c is 8 times a power of two
    dA       cotangent of A       [c, c], zero where the column does not see, or is not seen by, the row

Backward, dA + dA^T on the pairs of one h times the rows of (2), later x^h and earlier k^h together, is the cotangent of
both at once. Those of (3) are added from the widest block to the group.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu._tiles import product, product_nt

GROUP = 8
STRONGEST = -19.0


class Decay(NamedTuple):
    """Of the positions of one chunk.

    since, until   exp(b - m), exp(m - b) in the group: [c, k]
    first, last    decay from the group's start to m, from m to its end: [c / 8, 8, k], the same for all its positions
    through        decay of a whole block, by size from GROUP to c: [8 c / size, k], the same in the 8 rows of each
    """

    since: jax.Array
    until: jax.Array
    first: jax.Array
    last: jax.Array
    through: list[jax.Array]


def decay(g: jax.Array) -> Decay:
    """g: [c, k] float32."""
    size, channels = g.shape
    grouped = (size // GROUP, GROUP, channels)
    b = _sums_in_groups(jnp.maximum(g, STRONGEST).reshape(grouped))
    middle = 0.5 * (b[:, 3:4] + b[:, 4:5])
    since = jnp.exp(b - middle)
    until = jnp.exp(middle - b)
    first = jnp.exp(jnp.broadcast_to(middle, grouped))
    last = jnp.broadcast_to(since[:, GROUP - 1 :], grouped)
    through = [(first * last).reshape(size, channels)]
    while through[-1].shape[0] > GROUP:
        earlier, later = _halves(through[-1], GROUP)
        through.append((earlier * later).reshape(-1, channels))
    return Decay(since.reshape(size, channels), until.reshape(size, channels), first, last, through)


def _sums_in_groups(x: jax.Array, *, backwards: bool = False) -> jax.Array:
    """[n, 8, k]: the sum of x from the group's start to each position, or from each position to the group's end."""
    position = _iota(x.shape, 1)
    for shift in (1, 2, 4):
        if backwards:
            x += jnp.where(position < GROUP - shift, pltpu.roll(x, GROUP - shift, 1), 0.0)
        else:
            x += jnp.where(position >= shift, pltpu.roll(x, shift, 1), 0.0)
    return x


def sums_from(x: jax.Array, after: jax.Array) -> jax.Array:
    """[c, k]: the sum of x [c, k] from each position to the chunk's end, and of `after` [1, k]."""
    sums = _sums_in_groups(x.reshape(-1, GROUP, x.shape[1]), backwards=True)
    groups = []
    for n in reversed(range(sums.shape[0])):
        groups.append(sums[n] + after)
        after = groups[-1][:1]
    return jnp.concatenate(groups[::-1], axis=0)


class Decayed(NamedTuple):
    """Rows or columns of (1) as (4) and (2) take them.

    middle   decayed since the middle of the group, or until it
    blocks   since the start of the block, or until its end, by size from GROUP to c; the last is of the whole chunk
    """

    middle: jax.Array
    blocks: list[jax.Array]


def since_start(x: jax.Array, d: Decay) -> Decayed:
    """Rows x [c, k] of float32."""
    middle = x * d.since
    blocks = [_times(middle, d.first)]
    for through in d.through[:-1]:
        earlier, later = _halves(blocks[-1], GROUP << len(blocks) - 1)
        blocks.append(_together(earlier, _times(later, _halves(through, GROUP)[0])))
    return Decayed(middle, blocks)


def until_end(k: jax.Array, d: Decay) -> Decayed:
    """Columns k [c, k] of float32."""
    middle = k * d.until
    blocks = [_times(middle, d.last)]
    for through in d.through[:-1]:
        earlier, later = _halves(blocks[-1], GROUP << len(blocks) - 1)
        blocks.append(_together(_times(earlier, _halves(through, GROUP)[1]), later))
    return Decayed(middle, blocks)


class Meetings(NamedTuple):
    """Factors of the products of a chunk's rows x and columns k, in their dtype.

    rows, columns    of (4)
    blocks           of (2) for each h: k^h in the earlier halves of the blocks and x^h in the later ones, [c, k]
    halves           the same, [c / 2, k] each
    """

    rows: jax.Array
    columns: jax.Array
    blocks: list[jax.Array]
    halves: list[tuple[jax.Array, jax.Array]]


def meetings(x: Decayed, k: Decayed, dtype: jnp.dtype) -> Meetings:
    blocks, halves = [], []
    for n, (rows, columns) in enumerate(zip(x.blocks[:-1], k.blocks[:-1])):
        earlier, later = _halves(columns, GROUP << n)[0], _halves(rows, GROUP << n)[1]
        blocks.append(_together(earlier, later).astype(dtype))
        halves.append(tuple(y.reshape(-1, y.shape[2]).astype(dtype) for y in (earlier, later)))
    return Meetings(x.middle.astype(dtype), k.middle.astype(dtype), blocks, halves)


def scores(m: Meetings, *, transposed: bool = False) -> jax.Array:
    """A, or A^T, [c, c] of float32, arbitrary where j > i."""
    A = product_nt(m.columns, m.rows) if transposed else product_nt(m.rows, m.columns)
    for n, (block, halves) in enumerate(zip(m.blocks, m.halves)):
        half = GROUP << n
        found = product_nt(halves[0 if transposed else 1], block).reshape(-1, half, A.shape[1])
        earlier, later = _halves(A, half)
        of_row, of_column = _iota(found.shape, 0), _iota(found.shape, 2)
        if transposed:
            earlier = jnp.where(_number(of_column, half) == 2 * of_row + 1, found, earlier)
        else:
            later = jnp.where(_number(of_column, half) == 2 * of_row, found, later)
        A = _together(earlier, later)
    return A


def scores_backward(
    both: jax.Array, m: Meetings, dx: jax.Array, dk: jax.Array, d: Decay
) -> tuple[jax.Array, jax.Array]:
    """Cotangents of the x and k that `since_start` and `until_end` took.

    both     dA on and below the diagonal, dA^T above it
    dx, dk   cotangents of x^c and k^c, from what the state does with them
    """
    row, column = _iota(both.shape, 0), _iota(both.shape, 1)
    both = both.astype(m.rows.dtype)
    for n in reversed(range(len(m.blocks))):
        half, through = GROUP << n, _halves(d.through[n], GROUP)
        pairs = _number(row, half) == _number(column, half) ^ 1
        found = _halves(product(_only(both, pairs), m.blocks[n]), half)
        earlier, later = _halves(dx, half)
        dx = _together(earlier, _times(later, through[0]) + found[1])
        earlier, later = _halves(dk, half)
        dk = _together(_times(earlier, through[1]) + found[0], later)
    group = _number(row, GROUP) == _number(column, GROUP)
    dx = _times(dx, d.first) + product(_only(both, group & (column <= row)), m.columns)
    dk = _times(dk, d.last) + product(_only(both, group & (column >= row)), m.rows)
    return dx * d.since, dk * d.until


def _halves(x: jax.Array, half: int) -> tuple[jax.Array, jax.Array]:
    """[c, d] -> the earlier and the later halves of its blocks, [c / (2 half), half, d] each."""
    x = x.reshape(-1, 2, half, x.shape[1])
    return x[:, 0], x[:, 1]


def _together(earlier: jax.Array, later: jax.Array) -> jax.Array:
    return jnp.concatenate([earlier[:, None], later[:, None]], axis=1).reshape(-1, earlier.shape[-1])


def _times(x: jax.Array, weights: jax.Array) -> jax.Array:
    """x, whose rows are blocks one after the other, times the weights [n, 8, k] of its n blocks."""
    count, _, channels = weights.shape
    return (x.reshape(count, -1, GROUP, channels) * weights[:, None]).reshape(x.shape)


def _only(x: jax.Array, mask: jax.Array) -> jax.Array:
    """x where the mask holds, else 0."""
    if x.dtype == jnp.float32:
        return jnp.where(mask, x, 0.0)
    # As bits: of two numbers in one word a TPU would select after taking them apart.
    bits = pltpu.bitcast(jnp.where(mask, -1, 0).astype(jnp.int16), jnp.int32)
    return pltpu.bitcast(pltpu.bitcast(x, jnp.int32) & bits, x.dtype)


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _number(position: jax.Array, size: int) -> jax.Array:
    """Of the block of `size` that a position is in."""
    # Not //, whose lowering asks which TPU this process has.
    return jax.lax.shift_right_logical(position, jnp.int32(size.bit_length() - 1))
