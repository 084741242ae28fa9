"""Linear attention (Katharopoulos, Vyas, Pappas, Fleuret 2020, arXiv 2006.16236)."""

import jax.numpy as jnp

from seqmodels.layers._linear_mixer import LinearMixer
from seqmodels.layers._mixer import Stream, merge_heads
from seqmodels.layers.norms import make_norm
from seqmodels.notation import Activations, Array
from seqmodels.ops.feature_maps import feature_map


class LinearAttention(LinearMixer):
    """phi(q) phi(k)^T V, normalised by phi(q) phi(k)^T 1, in linear time.

    feature_map   name of phi, one of `seqmodels.ops.feature_maps.FEATURE_MAPS`
    normalize     divide by the sum of the weights; only for a phi whose products are positive
    output_norm   RMSNorm of each head's output: what keeps it bounded when `normalize` is off
    """

    feature_map: str = "elu+1"
    normalize: bool = True
    output_norm: bool = False

    @property
    def state_features(self) -> int:
        return feature_map(self.feature_map)(jnp.zeros(self.key_width // self.num_heads)).shape[0]

    @property
    def normalized(self) -> bool:
        return self.normalize

    def setup(self) -> None:
        super().setup()
        self.phi = feature_map(self.feature_map)
        if self.output_norm:
            self.norm = make_norm("rmsnorm", dtype=self.dtype, param_dtype=self.param_dtype)

    def project(self, x: Activations, stream: Stream) -> dict:
        q, k, v = self.qkv(x, stream)
        return {"q": self.phi(q), "k": self.phi(k), "v": v, "normalize": self.normalize}

    def readout(self, o: Array, x: Activations) -> Activations:
        return self.o_proj(merge_heads(self.norm(o) if self.output_norm else o))
