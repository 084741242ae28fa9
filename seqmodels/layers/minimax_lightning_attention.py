"""Lightning attention as MiniMax-01 uses it (MiniMax 2025, arXiv 2501.08313)."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

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


def minimax_decay(num_heads: int, layer_index: int | Array, n_layers: int) -> Float[Array, " h"]:
    """-2^(-8(h+1)/H) (1 - l / (L - 1 + 1e-5) + 1e-5), for any number of heads H; the last layer hardly forgets."""
    slopes = 2.0 ** (-8 * (jnp.arange(num_heads, dtype=jnp.float32) + 1) / num_heads)
    return -slopes * (1 - layer_index / (n_layers - 1 + 1e-5) + 1e-5)


class MiniMaxLightningAttention(Mixer):
    """q, k, v = silu(qkv_proj x); decay fixed by head and depth; out_proj(sigmoid(output_gate x) * norm(o)).

    Unlike in TransNormerLLM (`LightningAttention`), the values pass silu too, nothing encodes positions, the norm over
    all heads jointly has a scale, and the gate is a sigmoid. The columns of qkv_proj hold q, k and v of one head, then
    those of the next. Parameters have the names of Hugging Face's MiniMax. In MiniMax-Text-01 every eighth layer is
    softmax attention instead.

    head_dim   channels per head; None is d_model / num_heads
    """

    num_heads: int = 8
    head_dim: int | None = None

    op = staticmethod(linear_attention)

    @property
    def channels(self) -> int:
        return self.head_dim or self.divide(self.d_model, self.num_heads, "d_model")

    def setup(self) -> None:
        width = self.num_heads * self.channels
        self.qkv_proj, self.output_gate = self.dense(3 * width), self.dense(width)
        self.norm = make_norm("rmsnorm", epsilon=1e-6, dtype=self.dtype, param_dtype=self.param_dtype)
        self.out_proj = self.dense(self.d_model)

    def project(self, x: Activations, stream: Stream) -> dict:
        q, k, v = jnp.split(split_heads(jax.nn.silu(self.qkv_proj(x)), self.num_heads), 3, axis=-1)
        decay = minimax_decay(self.num_heads, self.layer_index, self.n_layers)
        return {"q": q, "k": k, "v": v, "g": decay, "scale": 1.0}

    def readout(self, o: Array, x: Activations) -> Activations:
        return self.out_proj(jax.nn.sigmoid(self.output_gate(x)) * self.norm(merge_heads(o)))

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        memory = zero_state(batch_size, self.num_heads, self.channels, self.channels)
        return {"cursor": start_cursor(batch_size), "memory": memory}

    def state_bytes(self, length: int = 0) -> int:
        return CURSOR_BYTES + FLOAT32 * self.num_heads * self.channels**2

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        width = self.num_heads * self.channels
        projections = 4 * dense_flops(self.d_model, width) + dense_flops(width, self.d_model)  # qkv and gate; out
        sizes = {"heads": self.num_heads, "key_dim": self.channels, "value_dim": self.channels, "decays": 1}
        how = {"chunk_size": self.chunk_size, "decoding": decoding}
        return projections + linear_attention_flops(length, **sizes, **how)
