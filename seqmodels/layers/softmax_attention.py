"""Causal softmax attention with rotary positions, grouped heads, a window and sink tokens."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from seqmodels.errors import InputError
from seqmodels.layers._mixer import MixerState, Stream, dense_flops, merge_heads
from seqmodels.layers._qkv_mixer import QKVMixer
from seqmodels.layers.norms import make_norm
from seqmodels.layers.positions import rotary
from seqmodels.notation import FIRST_WEIGHT, SOWN, Activations, Array, Keys, Queries, Values
from seqmodels.ops._heads import by_head
from seqmodels.ops._kv_cache import cache_bytes
from seqmodels.ops.cross_attention import softmax_cross_attention
from seqmodels.ops.softmax_attention import empty_cache, softmax_attention, softmax_attention_flops


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
    rope_fraction  share of a head's channels that turn, the first ones
    qk_norm        norm of each head's queries and keys (Dehghani et al. 2023, arXiv 2302.05442), of the kind
    norm           a name in `seqmodels.layers.norms`, with
    norm_eps       as its epsilon
    use_gate       multiply the outputs by sigmoid(x W) (Qiu et al. 2025, arXiv 2505.06708)
    qkv_bias, out_bias   biases of the projections to q, k, v and the gate, and of that to y
    conv_size      as in `QKVMixer`
    """

    num_kv_heads: int | None = None
    head_dim: int | None = None
    window: int | None = None
    sinks: int = 0
    rope_base: float | None = 10_000.0
    rope_fraction: float = 1.0
    qk_norm: bool = False
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    use_gate: bool = False
    qkv_bias: bool = False
    out_bias: bool = False

    sees_whole = True
    op = staticmethod(softmax_attention)
    cross = staticmethod(softmax_cross_attention)

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

    @property
    def biases(self) -> tuple[bool, bool]:
        return self.qkv_bias, self.out_bias

    @property
    def turning(self) -> int:
        """Channels of a head that rotary positions turn."""
        channels = self.channels * self.rope_fraction
        if self.rope_base is not None and (not 0 < self.rope_fraction <= 1 or channels % 2):
            raise InputError(
                f"SoftmaxAttention: rope_fraction = {self.rope_fraction:g} of {self.channels} channels makes "
                f"{channels:g}; expected an even number up to {self.channels}"
            )
        return int(channels)

    def setup(self) -> None:
        self.divide(self.num_heads, self.kv_heads, "num_heads")
        super().setup()
        if self.use_gate:
            self.g_proj = self.dense(self.qkv_widths[0], use_bias=self.qkv_bias)
        if self.qk_norm:
            dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            self.q_norm, self.k_norm = (make_norm(self.norm, epsilon=self.norm_eps, **dtypes) for _ in range(2))

    def placed(self, x: Activations, stream: Stream, positions: Array) -> dict[str, Array]:
        """Queries, keys and values of tokens at these positions [b, t]."""
        q, k, v = self.qkv(x, stream)
        if self.qk_norm:
            q, k = by_head(self.q_norm, q), by_head(self.k_norm, k)
        if self.rope_base is not None:
            q, k = (rotary(y, positions, self.rope_base, self.turning) for y in (q, k))
        return {"q": q, "k": k, "v": v}

    def project(self, x: Activations, stream: Stream) -> dict:
        return {**self.placed(x, stream, stream.positions), "window": self.window, "sinks": self.sinks}

    def operate(self, stream: Stream, **arguments: Any) -> Array:
        if self.is_mutable_collection(SOWN):
            self.sow(SOWN, FIRST_WEIGHT, self.first_weight(**arguments, segment_ids=stream.documents))
        return super().operate(stream, **arguments)

    def first_weight(self, q: Queries, k: Keys, v: Values, **options: Any) -> Float[Array, "b t h"]:
        """How much each query of a span without a past weighs its first token: attention is linear in the values."""
        is_first = jnp.zeros((*k.shape[:3], 1), k.dtype).at[:, 0].set(1)
        weight, _ = softmax_attention(q, k, is_first, causal=self.causal, **options)
        return weight[..., 0].astype(jnp.float32)

    def project_across(self, x: Activations, stream: Stream) -> dict:
        """Places in two sequences do not compare: all tokens stand at place 0, where rotary positions turn nothing."""
        return self.placed(x, stream, jnp.zeros_like(stream.positions))

    def check_across(self) -> None:
        super().check_across()
        if self.window is not None:
            raise InputError(f"SoftmaxAttention: window = {self.window} with a context; expected None")

    def readout(self, o: Array, x: Activations) -> Activations:
        o = merge_heads(o)
        return self.o_proj(o * jax.nn.sigmoid(self.g_proj(x)) if self.use_gate else o)

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        if self.window is not None:
            capacity = self.window + self.sinks
        elif capacity is None:
            raise InputError(
                "SoftmaxAttention.initial_state: capacity is needed without a window: the number of tokens to come"
            )
        cache = empty_cache(batch_size, capacity, self.kv_heads, self.channels, self.channels, self.dtype)
        return self.state_around(cache, batch_size)

    def state_bytes(self, length: int = 0) -> int:
        slots = length if self.window is None else self.window + self.sinks
        return self.bytes_around(cache_bytes(slots, self.kv_heads, self.channels, self.channels, self.dtype))

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        gate = dense_flops(self.d_model, self.qkv_widths[0]) if self.use_gate else 0
        return self.qkvo_flops + gate + self.attention_flops(length, decoding=decoding)

    def attention_flops(self, length: int, *, prefix: int = 0, decoding: bool = False) -> float:
        """Those of the operator, with a prefix of so many keys."""
        return softmax_attention_flops(
            length,
            heads=self.num_heads,
            key_dim=self.channels,
            value_dim=self.channels,
            window=self.window,
            sinks=self.sinks,
            prefix=prefix,
            chunk_size=self.chunk_size,
            decoding=decoding,
        )
