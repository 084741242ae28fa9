"""Linear attention (Katharopoulos, Vyas, Pappas, Fleuret 2020, arXiv 2006.16236)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from seqmodels.layers._linear_mixer import LinearMixer
from seqmodels.layers._mixer import Stream, dense_flops, merge_heads
from seqmodels.layers.norms import make_norm
from seqmodels.notation import Activations, Array, Keys
from seqmodels.ops._heads import by_head
from seqmodels.ops.cross_attention import linear_cross_attention
from seqmodels.ops.feature_maps import LEARNED, feature_map


class LinearAttention(LinearMixer):
    """phi(q) phi(k)^T V, normalised by phi(q) phi(k)^T 1, in linear time.

    feature_map   name of phi, one of `seqmodels.ops.feature_maps.FEATURE_MAPS`. A learned one, `hedgehog`, has a
                  matrix for each head's queries and one for its keys: `feature_map_q`, `feature_map_k`
    normalize     divide by the sum of the weights; only for a phi whose products are positive
    output_norm   RMSNorm of each head's output: what keeps it bounded when `normalize` is off
    """

    feature_map: str = "elu+1"
    normalize: bool = True
    output_norm: bool = False

    sees_whole = True
    cross = staticmethod(linear_cross_attention)

    @property
    def state_features(self) -> int:
        return feature_map(self.feature_map)(jnp.zeros(self.key_width // self.num_heads)).shape[0]

    @property
    def normalized(self) -> bool:
        return self.normalize

    def setup(self) -> None:
        super().setup()
        self.phi = feature_map(self.feature_map)
        if self.feature_map in LEARNED:
            self.feature_map_q, self.feature_map_k = (HeadProjection(self.dtype, self.param_dtype) for _ in range(2))
        if self.output_norm:
            self.norm = make_norm("rmsnorm", dtype=self.dtype, param_dtype=self.param_dtype)

    def project(self, x: Activations, stream: Stream) -> dict:
        q, k, v = self.qkv(x, stream)
        if self.feature_map in LEARNED:
            q, k = self.feature_map_q(q), self.feature_map_k(k)
        return {"q": self.phi(q), "k": self.phi(k), "v": v, "normalize": self.normalize}

    def readout(self, o: Array, x: Activations) -> Activations:
        return self.o_proj(merge_heads(by_head(self.norm, o) if self.output_norm else o))

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        channels = self.key_width // self.num_heads
        learned = 2 * self.num_heads * dense_flops(channels, channels) if self.feature_map in LEARNED else 0
        return super().flops_per_token(length, decoding=decoding) + learned


class HeadProjection(nn.Module):
    """x W with a square W for each head, the identity at first; parameter `kernel` [heads, d, d]."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Keys) -> Keys:
        heads, d = x.shape[2:]
        identity = jnp.broadcast_to(jnp.eye(d, dtype=self.param_dtype), (heads, d, d))
        kernel = self.param("kernel", lambda key: identity)
        return jnp.einsum("bthd,hdf->bthf", x, kernel.astype(self.dtype))
