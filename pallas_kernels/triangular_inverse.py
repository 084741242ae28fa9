"""The inverse of unit lower triangular matrices, by merging blocks.

    (I + N)^-1 = X,   N strictly lower triangular                                                                 (1)
    [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]                                                       (2)

The blocks on the diagonal begin as single ones, which are their own inverse; (2) makes two neighbours one of twice the
size. Blocks up to 16 are too small to be worth cutting out: there (2) is X - X L X over all of them, L the part of N
that lies between the two halves.

N of the delta rule has entries near 1 where keys resemble each other. The products (I - N)(I + N^2)(I + N^4)... are
equal to (1) too, but then they add terms as large as binomial coefficients of the size, with alternating signs: at 64
rows nothing of a float32 is left. (2) multiplies inverses alone, which stay small. Substitution row by row is as exact,
and slower wherever a loop is; XLA's own triangular solve calls LAPACK on CPUs, matrix by matrix.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

SMALL = 16


def unit_lower_inverse(N: Array) -> Array:
    """(I + N)^-1 for strictly lower triangular N [..., c, c]; c is a power of two."""
    size = N.shape[-1]
    block = min(size, SMALL)
    X = _small_inverse(jnp.stack([_part(N, at, at, block) for at in range(0, size, block)]))
    while block < size:
        A, D = X[0::2], X[1::2]
        B = jnp.stack([_part(N, at + block, at, block) for at in range(0, size, 2 * block)])
        corner = -_product(_product(D, B), A)
        upper = jnp.concatenate([A, jnp.zeros_like(A)], axis=-1)
        X = jnp.concatenate([upper, jnp.concatenate([corner, D], axis=-1)], axis=-2)
        block *= 2
    return X[0]


def inverse_flops(size: int) -> float:
    """FLOPs of the products of `unit_lower_inverse` for a row of a matrix [size, size]."""
    block = min(size, SMALL)
    # Two products of whole blocks for every half from 2 on, which is shared by the rows of a block,
    flops = 2 * 2 * block**2 * max(block.bit_length() - 2, 0)
    # and two of halves for every pair of blocks that are merged, shared by the rows of both.
    while block < size:
        flops += 2 * 2 * block**3 / (2 * block)
        block *= 2
    return float(flops)


def _small_inverse(N: Array) -> Array:
    """Equation (2) on whole matrices."""
    size = N.shape[-1]
    position = jnp.arange(size)
    X, half = jnp.eye(size, dtype=N.dtype), 1
    while half < size:
        between = jnp.where((position[:, None] ^ position) // half == 1, N, 0)
        X = X - (_product(_product(X, between), X) if half > 1 else between)
        half *= 2
    return jnp.broadcast_to(X, N.shape)


def _part(N: Array, row: int, column: int, size: int) -> Array:
    return N[..., row : row + size, column : column + size]


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")
