"""What papers' equations are made of, in NumPy float64, token by token: nothing is shared with the package."""

from typing import Any

import jax
import numpy as np


def random_variables(layer: Any, x: np.ndarray, seed: int = 0) -> tuple[dict, dict[str, np.ndarray]]:
    """A layer's variables, moved at random from where they start; and the same in float64, by path: "o_proj/kernel"."""
    variables = jax.jit(layer.init)(jax.random.key(seed), x)
    random = np.random.default_rng(seed)
    variables = jax.tree.map(lambda p: p + 0.3 * random.standard_normal(p.shape, np.float32), variables)
    by_path = jax.tree_util.tree_leaves_with_path(variables["params"])
    return variables, {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(p, np.float64) for path, p in by_path
    }


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x, 0)


def rmsnorm(x: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon)


def heads(x: np.ndarray, count: int) -> np.ndarray:
    return x.reshape(*x.shape[:2], count, -1)


def merged(x: np.ndarray) -> np.ndarray:
    return x.reshape(*x.shape[:2], -1)


def shifted(x: np.ndarray) -> np.ndarray:
    """The token before, 0 before the first."""
    return np.concatenate([np.zeros_like(x[:, :1]), x[:, :-1]], axis=1)


def convolution(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Causal, by channel; the last row of the kernel is for the current token."""
    y = np.zeros_like(x) + bias
    for w in reversed(kernel):
        y, x = y + w * x, shifted(x)
    return y


def decayed_memory(q: np.ndarray, k: np.ndarray, v: np.ndarray, decay: np.ndarray, bonus: Any = None) -> np.ndarray:
    """o_t = q_t S_t, S_t = decay_t S_{t-1} + k_t^T v_t; with a bonus u, o_t = q_t (S_{t-1} + u k_t^T v_t) instead.

    q, k: [b, t, h, k]; v: [b, t, h, v]; decay: [b, t, h, 1 or k].
    """
    S, outputs = np.zeros((*k.shape[:1], *k.shape[2:], v.shape[-1])), []
    for t in range(q.shape[1]):
        written = k[:, t, ..., None] * v[:, t, :, None]
        after = decay[:, t, ..., None] * S + written
        read = after if bonus is None else S + bonus[..., None] * written
        outputs.append(np.einsum("bhk,bhkv->bhv", q[:, t], read))
        S = after
    return np.stack(outputs, axis=1)


def normalized_attention(weights: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal: weights [b, h, i, j], v [b, t, h, v]."""
    weights = np.tril(weights)
    return np.einsum("bhij,bjhv->bihv", weights / weights.sum(axis=-1, keepdims=True), v)
