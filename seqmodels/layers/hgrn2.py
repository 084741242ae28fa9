"""HGRN2: gated linear attention whose keys are what the forget gates let go (Qin et al. 2024, arXiv 2404.07904)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.layers._mixer import (
    CURSOR_BYTES,
    FLOAT32,
    Mixer,
    MixerState,
    Stream,
    dense_flops,
    merge_heads,
    split_heads,
    start_cursor,
)
from seqmodels.layers.norms import make_norm
from seqmodels.notation import Activations, Array
from seqmodels.ops.linear_attention import linear_attention, linear_attention_flops, zero_state


def forget_gate(logits: Array, bound_logit: Array) -> tuple[Array, Array]:
    """f = bound + (1 - bound) sigmoid(logits) with bound = sigmoid(bound_logit): log f and 1 - f.

    Neither loses digits where f is near 1, nor where it is near 0. A bound_logit of -inf is a bound of 0.
    """
    k = jax.nn.sigmoid(-bound_logit) * jax.nn.sigmoid(-logits)
    of_large_f = jnp.log1p(-jnp.minimum(k, 0.5))
    of_small_f = jnp.logaddexp(
        jax.nn.log_sigmoid(bound_logit), jax.nn.log_sigmoid(-bound_logit) + jax.nn.log_sigmoid(logits)
    )
    return jnp.where(k < 0.5, of_large_f, of_small_f), k


class HGRN2(Mixer):
    """q = silu(q_proj x), f = bound + (1 - bound) sigmoid(f_proj x), k = 1 - f, v = i_proj x, decay f; norm; o_proj.

    The bound on f rises with the depth from 0, so that deep layers remember long. In layer l of L it is
    sigmoid(log(l / (L - l)) + lower_bound), by channel: l / L at the start. The paper learns the bounds of all layers
    as one cumulative softmax over the layers, which starts from the same values and keeps them rising with the depth;
    here each layer owns its bound, so that a layer is complete by itself.

    expand_ratio   key channels of a head, of which d_model / expand_ratio make up the layer; a narrower layer is one
                   head
    """

    expand_ratio: int = 128

    op = staticmethod(linear_attention)

    @property
    def num_heads(self) -> int:
        return self.heads_of(self.expand_ratio, self.d_model, "d_model")

    def setup(self) -> None:
        self.q_proj, self.f_proj, self.i_proj, self.o_proj = (self.dense(self.d_model) for _ in range(4))
        self.lower_bound = self.param("lower_bound", nn.initializers.zeros, (self.d_model,), jnp.float32)
        self.g_norm = make_norm("rmsnorm", dtype=self.dtype, param_dtype=self.param_dtype)

    def project(self, x: Activations, stream: Stream) -> dict:
        depth = jnp.asarray(self.layer_index, jnp.float32)
        bound_logit = jnp.log(depth) - jnp.log(self.n_layers - depth) + self.lower_bound
        g, k = forget_gate(self.f_proj(x).astype(jnp.float32), bound_logit)
        q, k, v = jax.nn.silu(self.q_proj(x)), k.astype(self.dtype), self.i_proj(x)
        return {name: split_heads(y, self.num_heads) for name, y in {"q": q, "k": k, "v": v, "g": g}.items()}

    def readout(self, o: Array, x: Activations) -> Activations:
        return self.o_proj(self.g_norm(merge_heads(o)))

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        channels = self.d_model // self.num_heads
        memory = zero_state(batch_size, self.num_heads, channels, channels)
        return {"cursor": start_cursor(batch_size), "memory": memory}

    def state_bytes(self, length: int = 0) -> int:
        return CURSOR_BYTES + FLOAT32 * self.d_model * (self.d_model // self.num_heads)

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        channels = self.d_model // self.num_heads
        sizes = {"heads": self.num_heads, "key_dim": channels, "value_dim": channels, "decays": channels}
        how = {"chunk_size": self.chunk_size, "decoding": decoding}
        return 4 * dense_flops(self.d_model, self.d_model) + linear_attention_flops(length, **sizes, **how)
