"""What the layers around `linear_attention` share: the widths of keys and values, the matrix state."""

from seqmodels.layers._mixer import FLOAT32, MixerState
from seqmodels.layers._qkv_mixer import QKVMixer
from seqmodels.ops.linear_attention import linear_attention, linear_attention_flops, zero_state


class LinearMixer(QKVMixer):
    """Base class of mixers whose memory is one matrix per head.

    expand_k, expand_v    width of the keys and of the values, as multiples of d_model
    num_heads, conv_size  as in `QKVMixer`
    """

    expand_k: float = 1.0
    expand_v: float = 1.0

    op = staticmethod(linear_attention)

    @property
    def key_width(self) -> int:
        return int(self.d_model * self.expand_k)

    @property
    def value_width(self) -> int:
        return int(self.d_model * self.expand_v)

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        return self.key_width, self.key_width, self.value_width

    @property
    def state_features(self) -> int:
        """Rows of a head's state: the key channels after feature map and position encoding."""
        return self.key_width // self.num_heads

    @property
    def value_dim(self) -> int:
        """Columns of a head's state."""
        return self.value_width // self.num_heads

    @property
    def normalized(self) -> bool:
        """Whether the state has a normaliser."""
        return False

    @property
    def decays(self) -> int:
        """Numbers of decay of a head: 0, 1, or one for each row of its state."""
        return 0

    def setup(self) -> None:
        self.divide(self.key_width, self.num_heads, "d_model * expand_k")
        self.divide(self.value_width, self.num_heads, "d_model * expand_v")
        super().setup()

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        dims = (self.num_heads, self.state_features, self.value_dim)
        return self.state_around(zero_state(batch_size, *dims, normalize=self.normalized), batch_size)

    def state_bytes(self, length: int = 0) -> int:
        return self.bytes_around(FLOAT32 * self.num_heads * self.state_features * (self.value_dim + self.normalized))

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        return self.qkvo_flops + linear_attention_flops(
            length,
            heads=self.num_heads,
            key_dim=self.state_features,
            value_dim=self.value_dim,
            decays=self.decays,
            normalize=self.normalized,
            chunk_size=self.chunk_size,
            decoding=decoding,
        )
