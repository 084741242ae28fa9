"""The gates of the linear neural memory as weights of what a mini-batch reads and writes, for the kernels of all
platforms: equations (2) to (4) of `pallas_kernels.tpu.neural_memory`.
"""

from functools import partial

import jax
import jax.numpy as jnp


def coefficients(
    theta: jax.Array, alpha: jax.Array | None, eta: jax.Array | None, size: int, token: jax.Array | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Gamma [b, h, c, t] with j before t, and of b, f, m and mu [b, h, t] those that are needed.

    theta, alpha, eta [b, t, h], t whole mini-batches of `size` tokens. alpha is None for 0, eta for no momentum: then
    there is b alone. token [b, t]: whether there is one at a position, None for everywhere. A position without one
    leaves W and S as they are: it has alpha = 0, eta = 1, theta = 0, and adds no M_tj, m_t in (2), (3).
    """
    token = None if token is None else token[:, None]

    def where_token(x: jax.Array | None, empty: float) -> jax.Array | None:
        return x if x is None or token is None else jnp.where(token, x, empty)

    theta, alpha, eta = (None if x is None else jnp.swapaxes(x, 1, 2) for x in (theta, alpha, eta))
    theta, alpha, eta = where_token(theta, 0), where_token(alpha, 0), where_token(eta, 1)
    place = jnp.arange(theta.shape[2]) % size
    written = jnp.where(jnp.arange(size)[:, None] == place, theta[:, :, None], 0)
    keep = jnp.ones_like(theta) if alpha is None else 1 - alpha
    b = _products(keep, size, 1)
    if eta is None:
        return _decayed_sums(keep, written, size), {"b": b}
    m = _products(eta, size, 1)
    f = _decayed_sums(keep, where_token(m, 0)[:, :, None], size)[:, :, 0]
    # Of the gates of the tokens after.
    mu = theta * _products(_shifted(eta, -1, size, 1), size, -1)
    written = _decayed_sums(eta, written, size)
    written = written if token is None else jnp.where(token[:, :, None], written, 0)
    return _decayed_sums(keep, written, size), {"b": b, "f": f, "m": m, "mu": mu}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _decayed_sums(decay: jax.Array, x: jax.Array, size: int) -> jax.Array:
    """y_t = decay_t y_{t-1} + x_t within each mini-batch: decay [b, h, t], x [b, h, c, t]."""
    return _doubled(decay, x, size, 1)


def _decayed_sums_forward(decay: jax.Array, x: jax.Array, size: int) -> tuple[jax.Array, tuple]:
    y = _doubled(decay, x, size, 1)
    return y, (decay, y)


def _decayed_sums_backward(size: int, kept: tuple, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    """dx_t = dy_t + decay_{t+1} dx_{t+1}, and ddecay_t = sum over c of dx_t y_{t-1}: nothing but y is kept."""
    decay, y = kept
    dx = _doubled(_shifted(decay, -1, size, 1), dy, size, -1)
    return jnp.sum(dx * _shifted(y, 1, size, 0), axis=2), dx


_decayed_sums.defvjp(_decayed_sums_forward, _decayed_sums_backward)


def _doubled(decay: jax.Array, x: jax.Array, size: int, stride: int) -> jax.Array:
    """y_t = decay_t y_{t-stride} + x_t, stride 1 or -1, by doubling of spans."""
    decay = decay[:, :, None]
    while abs(stride) < size:
        x = x + decay * _shifted(x, stride, size, 0)
        decay = decay * _shifted(decay, stride, size, 1)
        stride *= 2
    return x


def _products(x: jax.Array, size: int, stride: int) -> jax.Array:
    """Within each mini-batch the product of x_s over s <= t, or with stride -1 over s >= t."""
    while abs(stride) < size:
        x = x * _shifted(x, stride, size, 1)
        stride *= 2
    return x


def _shifted(x: jax.Array, stride: int, size: int, empty: float) -> jax.Array:
    """x_{t-stride}, or `empty` where that is in another mini-batch."""
    length = x.shape[-1]
    place = jnp.arange(length) % size - stride
    widths = [(0, 0)] * (x.ndim - 1) + [(max(stride, 0), max(-stride, 0))]
    moved = jnp.pad(x, widths)[..., max(-stride, 0) :][..., :length]
    return jnp.where((place >= 0) & (place < size), moved, empty)
