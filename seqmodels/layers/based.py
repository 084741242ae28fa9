"""Based: linear attention that imitates softmax by a Taylor expansion (Arora et al. 2024, arXiv 2402.18668)."""

from seqmodels.layers._mixer import FLOAT32, MixerState, Stream, merge_heads
from seqmodels.layers._qkv_mixer import QKVMixer
from seqmodels.notation import Activations, Array
from seqmodels.ops.cross_attention import linear_cross_attention
from seqmodels.ops.feature_maps import taylor
from seqmodels.ops.linear_attention import linear_attention, linear_attention_flops, zero_state


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

    @property
    def state_features(self) -> int:
        """Rows of a head's state."""
        d = self.feature_dim
        return 1 + d + d * (d + 1) // 2

    def setup(self) -> None:
        self.divide(self.d_model, self.num_heads, "d_model")
        super().setup()

    def project(self, x: Activations, stream: Stream) -> dict:
        q, k, v = self.qkv(x, stream)
        return {"q": taylor(q), "k": taylor(k), "v": v, "scale": 1.0, "normalize": True}

    def readout(self, o: Array, x: Activations) -> Activations:
        return self.o_proj(merge_heads(o))

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        dims = (self.num_heads, self.state_features, self.d_model // self.num_heads)
        return self.state_around(zero_state(batch_size, *dims, normalize=True), batch_size)

    def state_bytes(self, length: int = 0) -> int:
        value_dim = self.d_model // self.num_heads
        return self.bytes_around(FLOAT32 * self.num_heads * self.state_features * (value_dim + 1))

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        return self.qkvo_flops + linear_attention_flops(
            length,
            heads=self.num_heads,
            key_dim=self.state_features,
            value_dim=self.d_model // self.num_heads,
            normalize=True,
            chunk_size=self.chunk_size,
            decoding=decoding,
        )
