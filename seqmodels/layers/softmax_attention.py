"""Causal softmax attention with rotary positions, grouped heads, a window and sink tokens."""

from seqmodels.errors import InputError
from seqmodels.layers._mixer import MixerState, Stream, merge_heads
from seqmodels.layers._qkv_mixer import QKVMixer
from seqmodels.layers.norms import make_norm
from seqmodels.layers.positions import rotary
from seqmodels.notation import Activations, Array
from seqmodels.ops.softmax_attention import empty_cache, softmax_attention


class SoftmaxAttention(QKVMixer):
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv 1706.03762) as decoders use it.

    num_heads      query heads
    num_kv_heads   key and value heads, each shared by num_heads / num_kv_heads query heads (Ainslie et al. 2023,
                   arXiv 2305.13245); None is num_heads
    head_dim       channels per head; None is d_model / num_heads
    window         a token sees itself and the window - 1 tokens before it; None is all. With a window the state has a
                   fixed size; without one it grows with the stream
    sinks          number of first tokens that stay visible beside the window (Xiao et al. 2023, arXiv 2309.17453)
    rope_base      base of the rotary angles (Su et al. 2021, arXiv 2104.09864); None for no position encoding
    qk_norm        RMSNorm of each head's queries and keys (Dehghani et al. 2023, arXiv 2302.05442)
    conv_size      as in `QKVMixer`
    """

    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    sinks: int = 0
    rope_base: float | None = 10_000.0
    qk_norm: bool = False

    sees_whole = True
    op = staticmethod(softmax_attention)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def channels(self) -> int:
        return self.head_dim or self.divide(self.d_model, self.num_heads, "d_model")

    @property
    def qkv_heads(self) -> tuple[int, int, int]:
        return self.num_heads, self.kv_heads, self.kv_heads

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        return tuple(heads * self.channels for heads in self.qkv_heads)

    def setup(self) -> None:
        self.divide(self.num_heads, self.kv_heads, "num_heads")
        super().setup()
        if self.qk_norm:
            self.q_norm, self.k_norm = (
                make_norm("rmsnorm", dtype=self.dtype, param_dtype=self.param_dtype) for _ in range(2)
            )

    def placed(self, x: Activations, stream: Stream, positions: Array) -> dict[str, Array]:
        """Queries, keys and values of tokens at these positions [b, t]."""
        q, k, v = self.qkv(x, stream)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_base is not None:
            q, k = (rotary(y, positions, self.rope_base) for y in (q, k))
        return {"q": q, "k": k, "v": v}

    def project(self, x: Activations, stream: Stream) -> dict:
        return {**self.placed(x, stream, stream.positions), "window": self.window, "sinks": self.sinks}

    def readout(self, o: Array, x: Activations) -> Activations:
        return self.o_proj(merge_heads(o))

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        if self.window is not None:
            capacity = self.window + self.sinks
        elif capacity is None:
            raise InputError(
                "SoftmaxAttention.initial_state: capacity is needed without a window: the number of tokens to come"
            )
        cache = empty_cache(batch_size, capacity, self.kv_heads, self.channels, self.channels, self.dtype)
        return self.state_around(cache, batch_size)
