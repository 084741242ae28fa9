"""Scores of a chunk whose decay is per channel, and their cotangents.

With g the log decay and b its inclusive cumulative sum, x the rows and k the columns (queries, or keys, against keys):

    A_ij = sum_k x_ik k_jk exp(b_ik - b_jk),  j <= i                                                               (1)

Decay per channel does not factor out of (1), and exp(b_i) exp(-b_j) overflows. So each pair is met between its two
positions (Yang et al. 2023, arXiv 2312.06635, section 4). Cut the chunk into blocks of h = 8, 16, 32, ... C positions.
Let x^h be the rows decayed since the start of their block of h, k^h the columns decayed to the end of theirs, and e
the decay of a whole block:

    A_ij = sum_k x^h_ik k^h_jk          i in the later, j in the earlier half of one block of 2 h                  (2)
    x^2h = x^h * e_earlier              in later halves; x^2h = x^h in earlier ones                                (3)
    k^2h = k^h * e_later                in earlier halves; k^2h = k^h in later ones                                (4)

(2) is one product of matrices for every h. x^C reads the state that enters the chunk, k^C writes the one that leaves.
What is left are the pairs of one block of 8. With m the mean of b at its fourth and fifth position,

    A_ij = sum_k (x_ik exp(b_ik - m_k)) (k_jk exp(m_k - b_jk))                                                     (5)

whose exponents are of either sign, and at most 3.5 times the strongest log decay of one step. So that they stay in
range, no step forgets further than exp(STRONGEST) = 6e-9, which a float32 sum of old and new does not hold. Values and
gradients are those of the operator with that decay.

Backward, (dA + dA^T) restricted to the pairs of (2), times the factors of (2), x^h in later and k^h in earlier halves,
is dx^h in the later and dk^h in the earlier ones. (3) and (4) take them from the widest blocks to those of 8.

    code    symbol   shape    dtype
    g       g        [c, k]   float32, natural log, <= 0; c is 8 times a power of two
    x, k    x, k     [c, k]   float32; the factors of (2) and (5) are of the dtype of the operator's inputs
    A       A        [c, c]   float32

For scores of keys against keys, k is both x and k, and the caller drops the diagonal.
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

    since, until   exp(b - m), exp(m - b) of (5): [c, k]
    first, last    decay of a group of 8 from its start to m and from m to its end: [c / 8, 8, k], in every position
    through        e of the blocks of 8, 16, ... c: [8 c / size, k] each, a block's in 8 rows
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
    """Sum of x [c, k] from each position to the chunk's end, and `after` [1, k]."""
    sums = _sums_in_groups(x.reshape(-1, GROUP, x.shape[1]), backwards=True)
    groups = []
    for n in reversed(range(sums.shape[0])):
        groups.append(sums[n] + after)
        after = groups[-1][:1]
    return jnp.concatenate(groups[::-1], axis=0)


class Decayed(NamedTuple):
    """Rows or columns as (5) and (2) take them.

    middle   decayed since m, or until m
    blocks   x^h or k^h for h = 8, 16, ... c
    """

    middle: jax.Array
    blocks: list[jax.Array]


def since_start(x: jax.Array, d: Decay) -> Decayed:
    """x as rows, equation (3)."""
    middle = x * d.since
    blocks = [_times(middle, d.first)]
    for through in d.through[:-1]:
        earlier, later = _halves(blocks[-1], GROUP << len(blocks) - 1)
        blocks.append(_together(earlier, _times(later, _halves(through, GROUP)[0])))
    return Decayed(middle, blocks)


def until_end(k: jax.Array, d: Decay) -> Decayed:
    """k as columns, equation (4)."""
    middle = k * d.until
    blocks = [_times(middle, d.last)]
    for through in d.through[:-1]:
        earlier, later = _halves(blocks[-1], GROUP << len(blocks) - 1)
        blocks.append(_together(_times(earlier, _halves(through, GROUP)[1]), later))
    return Decayed(middle, blocks)


class Meetings(NamedTuple):
    """Factors of the products of rows and columns.

    rows, columns   of (5): [c, k]
    blocks          of (2), for h = 8, ... c / 2: k^h in earlier halves, x^h in later ones, [c, k] each
    halves          the earlier ones and the later ones of each, [c / 2, k]
    """

    rows: jax.Array
    columns: jax.Array
    blocks: list[jax.Array]
    halves: list[tuple[jax.Array, jax.Array]]


def meetings(x: Decayed, k: Decayed, dtype: jnp.dtype) -> Meetings:
    """dtype: of the factors."""
    blocks, halves = [], []
    for n, (rows, columns) in enumerate(zip(x.blocks[:-1], k.blocks[:-1])):
        earlier, later = _halves(columns, GROUP << n)[0], _halves(rows, GROUP << n)[1]
        blocks.append(_together(earlier, later).astype(dtype))
        halves.append(tuple(y.reshape(-1, y.shape[2]).astype(dtype) for y in (earlier, later)))
    return Meetings(x.middle.astype(dtype), k.middle.astype(dtype), blocks, halves)


def scores(m: Meetings, *, transposed: bool = False) -> jax.Array:
    """A, or A^T; where j > i anything, which may be infinite or not a number."""
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

    both     [c, c]: dA on and below the diagonal, dA^T above it; zero where a pair does not see each other
    dx, dk   cotangents of x^C and k^C, from what the state does with them
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
    """Number of the block of `size` that holds the position."""
    # Not //, whose lowering asks which TPU this process has.
    return jax.lax.shift_right_logical(position, jnp.int32(size.bit_length() - 1))
