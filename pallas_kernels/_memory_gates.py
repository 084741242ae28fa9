"""The gates of the linear neural memory as weights of what a mini-batch reads and writes, for the kernels of all
platforms: equations (2) to (4) of `pallas_kernels.tpu.neural_memory`.
"""

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
    b = _products(keep, place, size)
    if eta is None:
        return _decayed_sums(keep, written, place, size), {"b": b}
    m = _products(eta, place, size)
    f = _decayed_sums(keep, where_token(m, 0)[:, :, None], place, size)[:, :, 0]
    # From the end, of the gates of the tokens after.
    mu = theta * jnp.flip(_products(jnp.flip(_of_next(eta, place), axis=2), place, size), axis=2)
    written = _decayed_sums(eta, written, place, size)
    written = written if token is None else jnp.where(token[:, :, None], written, 0)
    return _decayed_sums(keep, written, place, size), {"b": b, "f": f, "m": m, "mu": mu}


def _of_next(x: jax.Array, place: jax.Array) -> jax.Array:
    """x_{t + 1}, or 1 where that is in another mini-batch."""
    return jnp.flip(_shifted(jnp.flip(x, axis=2), 1, place, 1), axis=2)


def _decayed_sums(decay: jax.Array, x: jax.Array, place: jax.Array, size: int) -> jax.Array:
    """y_t = decay_t y_{t-1} + x_t within each mini-batch: decay [b, h, t], x [b, h, c, t]; by doubling of spans."""
    decay, stride = decay[:, :, None], 1
    while stride < size:
        x = x + decay * _shifted(x, stride, place, 0)
        decay = decay * _shifted(decay, stride, place, 1)
        stride *= 2
    return x


def _products(x: jax.Array, place: jax.Array, size: int) -> jax.Array:
    """prod_{s <= t} x_s within each mini-batch."""
    stride = 1
    while stride < size:
        x = x * _shifted(x, stride, place, 1)
        stride *= 2
    return x


def _shifted(x: jax.Array, stride: int, place: jax.Array, empty: float) -> jax.Array:
    """x_{t - stride}, or `empty` where that is in another mini-batch."""
    widths = [(0, 0)] * (x.ndim - 1) + [(stride, 0)]
    return jnp.where(place >= stride, jnp.pad(x, widths)[..., : x.shape[-1]], empty)
