"""How large the states of a model are after a text: whether a memory stays bounded as it reads."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.notation import Array, Tokens


def state_norms(model: nn.Module, params: Any, tokens: Tokens) -> dict[str, Array]:
    """The norm of every part of the state after `tokens` [b, t], by path: that of the row where it is largest.

    Parts that are not numbers of the mathematics, such as positions, are left out. Where the layers of a stack are
    scanned, the layers of one kind are one part. May be jitted.
    """
    _, state = model.apply({"params": params}, tokens)
    batch = tokens.shape[0]
    norms = {}
    for path, x in jax.tree.leaves_with_path(state):
        if jnp.issubdtype(x.dtype, jnp.floating):
            axis = x.shape.index(batch)
            rows = jnp.moveaxis(x, axis, 0).reshape(batch, -1)
            norms[jax.tree_util.keystr(path)] = jnp.max(jnp.linalg.norm(rows, axis=-1))
    return norms
