"""Scores within chunks whose decay is per channel, and their gradients, for all chunks at once in plain JAX.

With b the inclusive cumulative sum of the log decay in a chunk, x the rows (queries, or keys) and y the columns (keys):

    P_ij = sum_k x_ik y_jk exp(b_ik - b_jk),  j <= i                                                               (1)

Decay per channel does not factor out of (1), and exp(b_i) exp(-b_j) overflows. So each pair is met between its two
positions (Yang et al. 2023, arXiv 2312.06635, section 4). Cut the chunk into blocks of 2 h positions, for h = 16, 32,
... C / 2. The pairs of a later half with the earlier half of its block meet at the last position r of the earlier one:

    X_i = x_i * exp(b_i - b_r)       Y_j = y_j * exp(b_r - b_j)       P_ij = X_i Y_j                               (2)

one small product of matrices for each block, whose factors are rounded to the dtype of the operator's inputs and whose
exponents are not positive. The pairs inside blocks of 16 are (1) as it stands, in float32. Backward, of (2),

    dX_i = sum_j dP_ij Y_j           dY_j = sum_i dP_ij X_i                                                        (3)
    dx_i = dX_i * exp(b_i - b_r)     dy_j = dY_j * exp(b_r - b_j)     db_i = X_i * dX_i,  db_j = -Y_j * dY_j       (4)

Both parts of db are sums of the same terms X_i dP_ij Y_j, of the same rounded factors: over the positions of a pair
they cancel, to the precision of float32. A position with itself has no decay, and no part in db.

    name     shape        dtype
    x, y     [..., C, k]  any; computed with in float32
    b        [..., C, k]  float32
    P, dP    [..., C, C]  float32; zero above the diagonal, and dP where a pair does not see each other
"""

import jax
import jax.numpy as jnp

Array = jax.Array

GROUP = 16  # positions whose pairs are met one by one: the rows of the smallest product of matrices


def scores(x: Array, y: Array, b: Array, dtype: jnp.dtype) -> Array:
    """P of (1). C is GROUP times a power of two; dtype: of the factors of (2)."""
    P = jnp.sum(_groups(x, -2) * _groups(y, -3) * _pair_decay(b, strict=False), axis=-1)
    half = GROUP
    while half < x.shape[-2]:
        X, Y = _factors(x, y, b, half, dtype)
        later = jnp.einsum("...ik,...jk->...ij", X, Y, preferred_element_type=jnp.float32)
        P = P.reshape(*later.shape[:-2], 2, half, half)
        top = jnp.concatenate([P[..., 0, :, :], jnp.zeros_like(later)], axis=-1)
        P = jnp.concatenate([top, jnp.concatenate([later, P[..., 1, :, :]], axis=-1)], axis=-2)
        half *= 2
    return P[..., 0, :, :]


def scores_backward(dP: Array, x: Array, y: Array, b: Array, dtype: jnp.dtype) -> tuple[Array, Array, Array]:
    """Cotangents of x, y and b in float32, (3) and (4)."""
    dx, dy, db = _backward_in_groups(dP, x, y, b)
    half = GROUP
    while half < x.shape[-2]:
        X, Y = _factors(x, y, b, half, dtype)
        since, until = _decay(b, half)
        d = _blocks(dP, 2 * half)[..., half:, :half].astype(dtype)
        dX = jnp.einsum("...ij,...jk->...ik", d, Y, preferred_element_type=jnp.float32)
        dY = jnp.einsum("...ij,...ik->...jk", d, X, preferred_element_type=jnp.float32)
        nothing = jnp.zeros_like(dX)
        dx += _together(nothing, dX * since)
        dy += _together(dY * until, nothing)
        db += _together(-Y * dY, X * dX)
        half *= 2
    return dx, dy, db


def _backward_in_groups(dP: Array, x: Array, y: Array, b: Array) -> tuple[Array, Array, Array]:
    """Of the pairs of one group."""
    d = _blocks(dP, GROUP)[..., None]
    with_decay = d * _pair_decay(b, strict=True)
    own = jnp.diagonal(dP, axis1=-2, axis2=-1)[..., None]
    dx = jnp.sum(with_decay * _groups(y, -3), axis=-2).reshape(x.shape)
    dy = jnp.sum(with_decay * _groups(x, -2), axis=-3).reshape(y.shape)
    x, y = (z.astype(jnp.float32) for z in (x, y))
    return dx + own * y, dy + own * x, x * dx - y * dy


def _groups(x: Array, axis: int) -> Array:
    """[..., C, k] -> [..., C / 16, 16, 1, k], or with the new axis at another place."""
    x = x.astype(jnp.float32).reshape(*x.shape[:-2], -1, GROUP, x.shape[-1])
    return jnp.expand_dims(x, axis)


def _pair_decay(b: Array, *, strict: bool) -> Array:
    """[..., C / 16, 16, 16, k]: exp(b_i - b_j) for j <= i, or if `strict` for j < i, else 0."""
    pairs = jnp.tri(GROUP, k=-int(strict), dtype=bool)[..., None]
    return jnp.where(pairs, jnp.exp(jnp.minimum(_groups(b, -2) - _groups(b, -3), 0)), 0)


def _decay(b: Array, half: int) -> tuple[Array, Array]:
    """exp(b_i - b_r) of later halves and exp(b_r - b_j) of earlier ones."""
    earlier, later = _halves(b, half)
    middle = earlier[..., -1:, :]
    return jnp.exp(later - middle), jnp.exp(middle - earlier)


def _factors(x: Array, y: Array, b: Array, half: int, dtype: jnp.dtype) -> tuple[Array, Array]:
    """X and Y of (2), [..., C / (2 half), half, k]."""
    since, until = _decay(b, half)
    return (_halves(x, half)[1] * since).astype(dtype), (_halves(y, half)[0] * until).astype(dtype)


def _halves(x: Array, half: int) -> tuple[Array, Array]:
    """[..., C, k] -> the earlier and the later halves of its blocks, [..., C / (2 half), half, k] each."""
    x = x.reshape(*x.shape[:-2], -1, 2, half, x.shape[-1])
    return x[..., 0, :, :], x[..., 1, :, :]


def _together(earlier: Array, later: Array) -> Array:
    """What `_halves` took apart."""
    x = jnp.concatenate([earlier, later], axis=-2)
    return x.reshape(*x.shape[:-3], -1, x.shape[-1])


def _blocks(pairs: Array, size: int) -> Array:
    """[..., C, C] -> the blocks on its diagonal, [..., C / size, size, size]."""
    starts = range(0, pairs.shape[-1], size)
    return jnp.stack([pairs[..., n : n + size, n : n + size] for n in starts], axis=-3)
