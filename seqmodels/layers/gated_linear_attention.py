"""Gated linear attention: a decay per key channel, read from the input (GLA, Yang et al. 2023, arXiv 2312.06635)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.layers._linear_mixer import LinearMixer
from seqmodels.layers._mixer import Stream, dense_flops, merge_heads, split_heads
from seqmodels.layers.norms import make_norm
from seqmodels.notation import Activations, Array
from seqmodels.ops._heads import by_head


class GatedLinearAttention(LinearMixer):
    """g = logsigmoid(low-rank projection of x) / gate_logit_normalizer; a norm per head, a silu gate on the output.

    gate_low_rank_dim       inner width of the projection to g
    gate_logit_normalizer   divisor of g: the larger, the slower the state forgets at initialisation
    """

    num_heads: int = 4
    expand_k: float = 0.5
    gate_low_rank_dim: int = 16
    gate_logit_normalizer: float = 16.0

    @property
    def decays(self) -> int:
        return self.state_features

    def setup(self) -> None:
        super().setup()
        self.gk_proj_0 = self.dense(self.gate_low_rank_dim)
        self.gk_proj_1 = nn.Dense(self.key_width, dtype=jnp.float32, param_dtype=self.param_dtype)
        self.g_proj = self.dense(self.value_width)
        self.g_norm = make_norm("rmsnorm", dtype=self.dtype, param_dtype=self.param_dtype)

    def project(self, x: Activations, stream: Stream) -> dict:
        q, k, v = self.qkv(x, stream)
        logits = self.gk_proj_1(self.gk_proj_0(x).astype(jnp.float32))
        g = split_heads(jax.nn.log_sigmoid(logits) / self.gate_logit_normalizer, self.num_heads)
        return {"q": q, "k": k, "v": v, "g": g}

    def readout(self, o: Array, x: Activations) -> Activations:
        gate = split_heads(self.g_proj(x), self.num_heads)
        return self.o_proj(merge_heads(by_head(self.g_norm, o) * jax.nn.silu(gate)))

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        decay = dense_flops(self.d_model, self.gate_low_rank_dim, self.key_width)
        gate = dense_flops(self.d_model, self.value_width)
        return super().flops_per_token(length, decoding=decoding) + decay + gate
