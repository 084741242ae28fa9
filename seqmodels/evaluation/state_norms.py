"""How large the states of a model are after a text: whether a memory stays bounded as it reads."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.notation import Array, Tokens


def state_norms(model: nn.Module, params: Any, tokens: Tokens) -> dict[str, Array]:
    """The norm of every part of the state after `tokens` [b, t], by path: that of the row where it is largest.

    Parts that are integers, such as positions, are left out. Layers that are scanned are one part. May be jitted.
    """

    def of_row(row: Array) -> dict[str, Array]:
        _, state = model.apply({"params": params}, row[None])
        parts = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(state)}
        return {
            path: jnp.linalg.norm(x.ravel()) for path, x in parts.items() if jnp.issubdtype(x.dtype, jnp.floating)
        }

    return jax.tree.map(jnp.max, jax.vmap(of_row)(tokens))
