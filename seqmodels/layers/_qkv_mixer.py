"""What mixers of queries, keys and values share: the projections, and short convolutions after them."""

from seqmodels.errors import InputError
from seqmodels.layers._mixer import (
    CURSOR_BYTES,
    Mixer,
    MixerState,
    ShortConvolution,
    Stream,
    convolution_bytes,
    dense_flops,
    split_heads,
    start_cursor,
)
from seqmodels.notation import Activations, Keys, Queries, Values
from seqmodels.ops.short_conv import zero_inputs


class QKVMixer(Mixer):
    """Base class of mixers that project x to queries, keys and values, and their operator's outputs back.

    num_heads   heads
    conv_size   width of a short convolution with silu on q, k and v (So et al. 2021, arXiv 2109.08668); None for none
    """

    num_heads: int = 8
    conv_size: int | None = None

    @property
    def qkv_heads(self) -> tuple[int, int, int]:
        """Heads of the queries, of the keys and of the values."""
        return (self.num_heads,) * 3

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        """Channels of the queries, of the keys and of the values, over all heads."""
        raise NotImplementedError

    @property
    def biases(self) -> tuple[bool, bool]:
        """Whether the projections to queries, keys and values have biases, and whether that to the output has."""
        return False, False

    def setup(self) -> None:
        q_bias, o_bias = self.biases
        self.q_proj, self.k_proj, self.v_proj = (self.dense(width, use_bias=q_bias) for width in self.qkv_widths)
        self.o_proj = self.dense(self.d_model, use_bias=o_bias)
        if self.conv_size:
            self.q_conv1d, self.k_conv1d, self.v_conv1d = (
                ShortConvolution(width, self.conv_size, self.dtype, self.param_dtype) for width in self.qkv_widths
            )

    def qkv(self, x: Activations, stream: Stream) -> tuple[Queries, Keys, Values]:
        """Projected, convolved where the layer does so, and split into heads."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.conv_size:
            q, k, v = self.q_conv1d(q, stream), self.k_conv1d(k, stream), self.v_conv1d(v, stream)
        return tuple(map(split_heads, (q, k, v), self.qkv_heads))

    def check_across(self) -> None:
        if self.conv_size:
            raise InputError(
                f"{type(self).__name__}: conv_size = {self.conv_size} with a context; expected None, cross-attention "
                "has no short convolutions"
            )

    def state_around(self, memory: object, batch_size: int) -> MixerState:
        """The state before the first token, with `memory` as the operator's part."""
        state = {"cursor": start_cursor(batch_size), "memory": memory}
        if self.conv_size:
            for name, width in zip("qkv", self.qkv_widths, strict=True):
                state[f"{name}_conv1d"] = zero_inputs(batch_size, self.conv_size, width)
        return state

    def bytes_around(self, memory: int) -> int:
        """Bytes of the state of one sequence, of which the operator's part takes `memory`."""
        convolutions = [convolution_bytes(self.conv_size, width) for width in self.qkv_widths if self.conv_size]
        return CURSOR_BYTES + memory + sum(convolutions)

    @property
    def qkvo_flops(self) -> float:
        """FLOPs of the projections to q, k and v and from the outputs, for one token."""
        (q_heads, _, v_heads), (*_, v_width) = self.qkv_heads, self.qkv_widths
        o_width = v_width // v_heads * max(q_heads, v_heads)
        return sum(dense_flops(self.d_model, width) for width in (*self.qkv_widths, o_width))
