"""Position encodings that rotate or modulate queries and keys. All angles are float32."""

import jax.numpy as jnp
from jaxtyping import Float, Int

from seqmodels.notation import Array


def rotary(
    x: Float[Array, "b t h k"], positions: Int[Array, "b t"], base: float = 10_000.0, turning: int | None = None
) -> Float[Array, "b t h k"]:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), the two halves of the channels paired.

    Channel c and c + n/2 turn by position * base^(-2c/n), of the first n = `turning` channels; the others stay as they
    are. None is all of them. n must be even.
    """
    if turning is not None and turning < x.shape[-1]:
        return jnp.concatenate([rotary(x[..., :turning], positions, base), x[..., turning:]], axis=-1)
    half = x.shape[-1] // 2
    angle = positions[..., None] * base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
    first, second = x[..., :half].astype(jnp.float32), x[..., half:].astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def lrpe(
    x: Float[Array, "b t h k"], positions: Int[Array, "b t"], theta: Float[Array, "h k"]
) -> Float[Array, "b t h 2*k"]:
    """Linearised relative position encoding, cosine form (Qin et al. 2023, arXiv 2307.09270): k channels become 2 k.

    x -> [x cos(p theta), x sin(p theta)], so that q_t . k_s becomes sum_c q_tc k_sc cos(theta_c (t - s)).
    """
    angle = positions[..., None, None] * theta.astype(jnp.float32)
    return jnp.concatenate([x * jnp.cos(angle), x * jnp.sin(angle)], axis=-1).astype(x.dtype)
