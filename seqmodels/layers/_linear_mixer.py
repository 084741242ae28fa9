"""What the layers around `linear_attention` share: projections to q, k, v, short convolutions, the matrix state."""

from seqmodels.layers._mixer import Mixer, MixerState, ShortConvolution, Stream, split_heads, start_cursor
from seqmodels.notation import Activations, Keys, Queries, Values
from seqmodels.ops.linear_attention import linear_attention, zero_state
from seqmodels.ops.short_conv import zero_inputs


class LinearMixer(Mixer):
    """Base class of mixers whose memory is one matrix per head.

    num_heads             heads
    expand_k, expand_v    width of the keys and of the values, as multiples of d_model
    conv_size             width of a short convolution with silu on q, k and v; None for none
    """

    num_heads: int = 8
    expand_k: float = 1.0
    expand_v: float = 1.0
    conv_size: int | None = None

    op = staticmethod(linear_attention)

    @property
    def key_width(self) -> int:
        return int(self.d_model * self.expand_k)

    @property
    def value_width(self) -> int:
        return int(self.d_model * self.expand_v)

    @property
    def state_features(self) -> int:
        """Rows of a head's state: the key channels after feature map and position encoding."""
        return self.key_width // self.num_heads

    @property
    def normalized(self) -> bool:
        """Whether the state has a normaliser."""
        return False

    def setup(self) -> None:
        self.divide(self.key_width, self.num_heads, "d_model * expand_k")
        self.divide(self.value_width, self.num_heads, "d_model * expand_v")
        self.q_proj, self.k_proj = self.dense(self.key_width), self.dense(self.key_width)
        self.v_proj, self.o_proj = self.dense(self.value_width), self.dense(self.d_model)
        if self.conv_size:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (
                ShortConvolution(width, self.conv_size, self.dtype, self.param_dtype)
                for width in (self.key_width, self.key_width, self.value_width)
            )

    def qkv(self, x: Activations, stream: Stream) -> tuple[Queries, Keys, Values]:
        """Projected, convolved where the layer does so, and split into heads."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.conv_size:
            q, k, v = self.q_conv1d(q, stream), self.k_conv1d(k, stream), self.v_conv1d(v, stream)
        return tuple(split_heads(y, self.num_heads) for y in (q, k, v))

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        value_dim = self.value_width // self.num_heads
        state = {
            "cursor": start_cursor(batch_size),
            "memory": zero_state(
                batch_size, self.num_heads, self.state_features, value_dim, normalize=self.normalized
            ),
        }
        if self.conv_size:
            widths = {"q_conv1d": self.key_width, "k_conv1d": self.key_width, "v_conv1d": self.value_width}
            for name, width in widths.items():
                state[name] = zero_inputs(batch_size, self.conv_size, width)
        return state
