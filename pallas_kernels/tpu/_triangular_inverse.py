"""Inverses of two unit triangular matrices at a time, one lower and one upper, which share their products.

    (I + N)^-1 and (I + M)^-1,   N strictly lower, M strictly upper triangular, of one size                        (1)

Blocks of 8 on the diagonal are inverted by substitution, exactly. Then two neighbours make one of twice the size:

    [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]                                                        (2)

and the same for M with rows and columns exchanged. (2) multiplies inverses alone, which stay small where powers of N
grow like binomial coefficients.

What limits a matrix unit is the rows it is given, however few of their columns are used. So blocks of s lie side by
side, in a strip [s, c] where each has the columns that it has in the matrix, and one product of a strip with a block
diagonal matrix multiplies all of them. Of N the products (2) leave every second block of the strip empty, and it is
just those that M fills: where A belongs to N and D to M, the strip B holds N's below the diagonal and M's above it.
"""

from collections.abc import Generator

import jax
import jax.numpy as jnp

from pallas_kernels.tpu._tiles import LANES, product

SMALL = 8


def inverses(matrix: jax.Array, passes: int) -> Generator[None, None, tuple[jax.Array, jax.Array]]:
    """(I + N)^-1 and (I + M)^-1 from [c, c] float32 with N below its diagonal, M above it; c a power of two.

    passes: of bfloat16 in every product: 3, or 6 for all that float32 holds. It yields where it waits for a product.
    """
    lower, upper = _substitute(_strip(matrix, SMALL))
    block = SMALL
    while block < matrix.shape[0]:
        lower, upper = yield from _merge(matrix, lower, upper, block, passes)
        block *= 2
    return lower, upper


def _substitute(strip: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Strips [8, c] of the inverses of blocks of 8."""
    lane, row = (jax.lax.broadcasted_iota(jnp.int32, strip.shape, axis) for axis in (1, 0))
    lower = upper = jnp.where((lane & SMALL - 1) == row, 1.0, 0.0)
    columns = [_column(strip, n) for n in range(SMALL)]
    for n in range(SMALL - 1):
        lower -= jnp.where(row > n, columns[n], 0.0) * lower[n : n + 1]
        last = SMALL - 1 - n
        upper -= jnp.where(row < last, columns[last], 0.0) * upper[last : last + 1]
    return lower, upper


def _column(strip: jax.Array, n: int) -> jax.Array:
    """The n-th column of each block of 8, in all its columns."""
    parts = [strip[:, at : at + LANES] for at in range(0, strip.shape[1], LANES)]
    lane = jax.lax.broadcasted_iota(jnp.int32, parts[0].shape, 1)
    index = (lane & -SMALL) + n
    return jnp.concatenate(
        [jnp.take_along_axis(part, index, axis=1, mode="promise_in_bounds") for part in parts], axis=1
    )


def _merge(
    matrix: jax.Array, lower: jax.Array, upper: jax.Array, block: int, passes: int
) -> Generator[None, None, tuple[jax.Array, jax.Array]]:
    """Equation (2): strips [2 s, c] of inverses from strips [s, c]."""
    row, column = (jax.lax.broadcasted_iota(jnp.int32, matrix.shape, axis) for axis in (0, 1))
    apart = (row ^ column) & -block
    even = (column[:block] & block) == 0
    inner = _multiply(_strip(matrix, block, partner=True), jnp.where(even, lower, upper), apart == 0, passes)
    yield
    corner = -_multiply(jnp.where(even, upper, lower), inner, apart == block, passes)
    yield
    return (
        jnp.concatenate([jnp.where(even, lower, 0.0), jnp.where(even, corner, lower)], axis=0),
        jnp.concatenate([jnp.where(even, upper, corner), jnp.where(even, 0.0, upper)], axis=0),
    )


def _strip(matrix: jax.Array, block: int, partner: bool = False) -> jax.Array:
    """Blocks on the diagonal of a matrix [c, c] side by side [s, c]; partner: those below or above instead."""
    size = matrix.shape[0]
    lane = jax.lax.broadcasted_iota(jnp.int32, (block, size), 1)
    strip = None
    for at in range(0, size, block):
        rows = at ^ block if partner else at
        part = matrix[rows : rows + block]
        strip = part if strip is None else jnp.where(lane >= at, part, strip)
    return strip


def _multiply(strip: jax.Array, blocks: jax.Array, where: jax.Array, passes: int) -> jax.Array:
    """strip [s, c] times the matrix [c, c] that has the strip `blocks` in all its rows, and zeros elsewhere."""

    def spread(x: jax.Array) -> jax.Array:
        return jnp.where(where, jnp.concatenate([x] * (where.shape[0] // x.shape[0]), axis=0), 0.0)

    if passes == 6:
        return product(strip, spread(blocks))
    high, low = _split(strip)
    blocks_high, blocks_low = (spread(x.astype(jnp.float32)).astype(jnp.bfloat16) for x in _split(blocks))
    # One product where two would load the same factor into the matrix units twice.
    found = product(jnp.concatenate([high, low], axis=0), blocks_high)
    return found[: high.shape[0]] + found[high.shape[0] :] + product(high, blocks_low)


def _split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two of bfloat16 whose sum is x to 16 bits."""
    high = x.astype(jnp.bfloat16)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)
