"""The inverse of unit lower triangular matrices, by blocks.

    (I + N)^-1 = X,   N strictly lower triangular                                                                 (1)
    x_i = e_i - sum_{j < i} N_ij x_j                       rows of X, one after the other, in blocks of 16        (2)
    [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]]     two neighbouring blocks made one of twice the size (3)

N of the delta rule has entries near 1 where keys resemble each other. The products (I - N)(I + N^2)(I + N^4)... are
equal to (1) too, and need no substitution, but then they add terms as large as binomial coefficients of the size, with
alternating signs: at 64 rows nothing of a float32 is left. (2) and (3) use rows of inverses alone, which stay small.

XLA's own triangular solve calls LAPACK on CPUs, once per matrix and not always safely.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from seqmodels.notation import Array

BLOCK = 16


def unit_lower_inverse(N: Float[Array, "... c c"]) -> Float[Array, "... c c"]:
    """(I + N)^-1 for strictly lower triangular N; c is a power of two."""
    size = N.shape[-1]
    block = min(size, BLOCK)
    X = _substitute(jnp.stack([_part(N, at, at, block) for at in range(0, size, block)]))
    while block < size:
        A, D = X[0::2], X[1::2]
        B = jnp.stack([_part(N, at + block, at, block) for at in range(0, size, 2 * block)])
        corner = -jnp.matmul(jnp.matmul(D, B, precision="highest"), A, precision="highest")
        upper = jnp.concatenate([A, jnp.zeros_like(A)], axis=-1)
        X = jnp.concatenate([upper, jnp.concatenate([corner, D], axis=-1)], axis=-2)
        block *= 2
    return X[0]


def _part(N: Array, row: int, column: int, size: int) -> Array:
    return N[..., row : row + size, column : column + size]


def _substitute(N: Array) -> Array:
    """Equation (2). All matrices take the same step at once: they lie along the last axis."""
    size = N.shape[-1]
    N, shape = jnp.moveaxis(N, (-2, -1), (0, 1)).reshape(size, size, -1), N.shape
    identity = jnp.eye(size, dtype=N.dtype)[..., None]

    def row(i: Array, X: Array) -> Array:
        return X.at[i].set(identity[i] - jnp.sum(N[i][:, None] * X, axis=0))

    X = jax.lax.fori_loop(0, size, row, jnp.zeros_like(N))
    return jnp.moveaxis(X.reshape(size, size, *shape[:-2]), (0, 1), (-2, -1))
