"""Retention: linear attention with a fixed decay per head (RetNet, Sun et al. 2023, arXiv 2307.08621)."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from seqmodels.layers._linear_mixer import LinearMixer
from seqmodels.layers._mixer import Stream, dense_flops, merge_heads, split_heads
from seqmodels.layers.norms import make_norm
from seqmodels.layers.positions import rotary
from seqmodels.notation import Activations, Array
from seqmodels.ops._heads import by_head


def retention_decay(num_heads: int) -> Float[Array, " h"]:
    """log(1 - 2^(-5-h)) for head h = 0, 1, ...: the later the head, the longer its memory."""
    return jnp.log1p(-(2.0 ** (-5 - jnp.arange(num_heads, dtype=jnp.float32))))


class Retention(LinearMixer):
    """Multi-scale retention: rotated queries and keys, decay 1 - 2^(-5-h), a norm per head, a silu gate.

    The authors' code also divides the decay mask by its row sums; the norm that follows cancels that.

    rope_base   base of the rotary angles
    """

    expand_v: float = 2.0
    rope_base: float = 10_000.0

    @property
    def decays(self) -> int:
        return 1

    def setup(self) -> None:
        super().setup()
        self.g_proj = self.dense(self.value_width)
        self.g_norm = make_norm("rmsnorm", dtype=self.dtype, param_dtype=self.param_dtype)

    def project(self, x: Activations, stream: Stream) -> dict:
        q, k, v = self.qkv(x, stream)
        q, k = (rotary(y, stream.positions, self.rope_base) for y in (q, k))
        return {"q": q, "k": k, "v": v, "g": retention_decay(self.num_heads)}

    def readout(self, o: Array, x: Activations) -> Activations:
        gate = split_heads(self.g_proj(x), self.num_heads)
        return self.o_proj(merge_heads(by_head(self.g_norm, o) * jax.nn.silu(gate)))

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        gate = dense_flops(self.d_model, self.value_width)
        return super().flops_per_token(length, decoding=decoding) + gate
