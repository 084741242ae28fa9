"""A mixture of gated feed-forward experts (Shazeer et al. 2017, arXiv 1701.06538).

As in Mixtral (Jiang et al. 2024, arXiv 2401.04088):

    p   = softmax(x W_r)                                     float32, over the experts
    y   = sum over the k largest p_e of  w_e down_e(silu(gate_e(x)) * up_e(x)),    w_e = p_e / (their sum)
    y  += sigmoid(x W_s) shared(x)                           where there is a shared expert (DeepSeekMoE, 2401.06066)

Every token goes through exactly its k experts: none is dropped, and no expert sees a token that is not its own. To that
end the pairs (token, expert) are sorted by expert, multiplied by `jax.lax.ragged_dot`, and put back.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.errors import InputError
from seqmodels.layers.mlp import SwiGLU
from seqmodels.notation import Activations, Array


class MoE(nn.Module):
    """Each token through `top_k` of `num_experts` SwiGLU layers, and through a shared one.

    hidden_dim    inner width of an expert; None as in `SwiGLU`
    renormalize   the weights of a token's experts sum to 1; otherwise they are what the softmax gives
    shared_dim    inner width of an expert that every token goes through, gated by a sigmoid; None for none

    Parameters `router` [d_model, num_experts], `gate_proj` and `up_proj` [num_experts, d_model, hidden], `down_proj`
    [num_experts, hidden, d_model]. There is no loss that balances the experts.
    """

    d_model: int
    num_experts: int = 8
    top_k: int = 2
    hidden_dim: int | None = None
    renormalize: bool = True
    shared_dim: int | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def width(self) -> int:
        return SwiGLU(self.d_model, self.hidden_dim, parent=None).width

    @nn.compact
    def __call__(self, x: Activations) -> Activations:
        if not 1 <= self.top_k <= self.num_experts:
            raise InputError(f"MoE: top_k = {self.top_k}; expected 1 to num_experts = {self.num_experts}")
        tokens = x.reshape(-1, self.d_model)
        y = self._experts(tokens, *self._route(tokens)).reshape(x.shape)
        if self.shared_dim is not None:
            dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            gate = nn.Dense(1, use_bias=False, name="shared_expert_gate", **dtypes)(x)
            y = y + jax.nn.sigmoid(gate) * SwiGLU(self.d_model, self.shared_dim, name="shared_expert", **dtypes)(x)
        return y

    def _route(self, tokens: Array) -> tuple[Array, Array]:
        """The experts of each token and their weights, both [tokens, top_k], the weights in float32."""
        shape = (self.d_model, self.num_experts)
        router = self.param("router", nn.initializers.lecun_normal(), shape, self.param_dtype).astype(self.dtype)
        logits = jnp.dot(tokens, router, preferred_element_type=jnp.float32)
        weights, chosen = jax.lax.top_k(jax.nn.softmax(logits), self.top_k)
        if self.renormalize:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return chosen, weights

    def _experts(self, tokens: Array, chosen: Array, weights: Array) -> Array:
        init = nn.initializers.lecun_normal(batch_axis=0)

        def matrices(name: str, rows: int, columns: int) -> Array:
            return self.param(name, init, (self.num_experts, rows, columns), self.param_dtype).astype(self.dtype)

        gate, up = (matrices(name, self.d_model, self.width) for name in ("gate_proj", "up_proj"))
        down = matrices("down_proj", self.width, self.d_model)
        order = jnp.argsort(chosen.reshape(-1))  # stable: pair i belongs to token i // top_k
        sizes = jnp.bincount(chosen.reshape(-1), length=self.num_experts).astype(jnp.int32)
        pairs = tokens[order // self.top_k]
        hidden = jax.nn.silu(jax.lax.ragged_dot(pairs, gate, sizes)) * jax.lax.ragged_dot(pairs, up, sizes)
        sorted_outputs = jax.lax.ragged_dot(hidden, down, sizes)
        outputs = sorted_outputs[jnp.argsort(order)].reshape(*chosen.shape, self.d_model)
        y = jnp.einsum("nkd,nk->nd", outputs, weights, preferred_element_type=jnp.float32)
        return y.astype(self.dtype)
