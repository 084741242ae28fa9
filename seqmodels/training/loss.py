"""Cross entropy over weighted positions, with z-loss.

    nll[b,t] = logsumexp(logits[b,t]) - logits[b,t,target]        z[b,t] = logsumexp(logits[b,t])^2

The z term keeps the normaliser near 0, where low precision is best (PaLM, Chowdhery et al. 2022, 2204.02311).
Sums are returned, not means, so that parts of a batch add up to the whole whatever their weights. Data that are numbers
have the squared error in its place.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class LossSums(NamedTuple):
    """Sums over positions, each position counted with its weight; float32 scalars. `correct` is None where nothing is
    simply right or wrong, and `nll` stands for whatever the loss is."""

    nll: jax.Array
    z: jax.Array
    correct: jax.Array | None
    weight: jax.Array

    def means(self, weight: jax.Array) -> dict[str, jax.Array]:
        """`loss` and, where there is one, `accuracy`, per unit of `weight`."""
        accuracy = {} if self.correct is None else {"accuracy": self.correct / weight}
        return {"loss": self.nll / weight, **accuracy}


Loss = Callable[[jax.Array, jax.Array, jax.Array], LossSums]


def loss_sums(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> LossSums:
    """Loss of next-token predictions.

    Args:
        logits: `[B, T, V]`, any float dtype; the arithmetic is float32.
        targets: `[B, T]` int32 in `0..V-1`.
        weights: `[B, T]` float32; positions of weight 0 have no influence, on the gradient either.
    """
    logits = logits.astype(jnp.float32)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    # A masked sum and not a gather: the comparison is fused into it, forward and backward, so nothing of size
    # V is stored beside the logits, and a vocabulary split over devices needs one sum over them.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    correct = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
    return LossSums(
        nll=jnp.sum((log_normalizer - target_logit) * weights),
        z=jnp.sum(log_normalizer**2 * weights),
        correct=jnp.sum(correct * weights),
        weight=jnp.sum(weights),
    )


def squared_error_sums(predictions: jax.Array, targets: jax.Array, weights: jax.Array) -> LossSums:
    """Squared error of predictions `[B, T, 1]` of the numbers `targets` `[B, T]`; arguments as in `loss_sums`."""
    error = predictions[..., 0].astype(jnp.float32) - targets
    zero = jnp.zeros((), jnp.float32)
    return LossSums(nll=jnp.sum(error**2 * weights), z=zero, correct=None, weight=jnp.sum(weights))


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Loss in a unit that does not depend on the tokeniser."""
    return nats_per_token / math.log(2) / bytes_per_token
