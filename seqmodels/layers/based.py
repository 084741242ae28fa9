"""Based: linear attention that imitates softmax by a Taylor expansion (Arora et al. 2024, arXiv 2402.18668)."""

import jax.numpy as jnp

from seqmodels.layers._mixer import MixerState, Stream, merge_heads
from seqmodels.layers._qkv_mixer import QKVMixer
from seqmodels.notation import Activations, Array
from seqmodels.ops.cross_attention import linear_cross_attention
from seqmodels.ops.feature_maps import taylor
from seqmodels.ops.linear_attention import linear_attention, zero_state


class Based(QKVMixer):
    """Attention with the weights 1 + s + s^2 / 2 for s = q.k / sqrt(feature_dim), normalised: exp(s) to second order.

    The paper stacks it with sliding-window attention, for what is near, and with short convolutions.

    feature_dim   channels d of a head's queries and keys; its state has 1 + d + d (d + 1) / 2 rows
    num_heads     heads; the values have d_model / num_heads channels each
    conv_size     as in `QKVMixer`
    """

    num_heads: int = 16
    feature_dim: int = 16

    sees_whole = True
    cross = staticmethod(linear_cross_attention)
    op = staticmethod(linear_attention)

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        return self.num_heads * self.feature_dim, self.num_heads * self.feature_dim, self.d_model

    def setup(self) -> None:
        self.divide(self.d_model, self.num_heads, "d_model")
        super().setup()

    def project(self, x: Activations, stream: Stream) -> dict:
        q, k, v = self.qkv(x, stream)
        return {"q": taylor(q), "k": taylor(k), "v": v, "scale": 1.0, "normalize": True}

    def readout(self, o: Array, x: Activations) -> Activations:
        return self.o_proj(merge_heads(o))

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        features = taylor(jnp.zeros(self.feature_dim)).shape[0]
        memory = zero_state(batch_size, self.num_heads, features, self.d_model // self.num_heads, normalize=True)
        return self.state_around(memory, batch_size)
