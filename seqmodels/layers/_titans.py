"""What the layers of Titans share (Behrouz, Zhong, Mirrokni 2024, arXiv 2501.00663): the memory with its gates and
persistent tokens, and attention with persistent tokens in front."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.errors import InputError
from seqmodels.layers._memory_weights import empty_state, memory_bytes, memory_weights
from seqmodels.layers._mixer import MixerState, Stream, dense_flops, split_heads
from seqmodels.layers._qkv_mixer import QKVMixer
from seqmodels.layers.norms import make_norm, unit
from seqmodels.layers.positions import rotary
from seqmodels.layers.softmax_attention import SoftmaxAttention
from seqmodels.notation import Activations, Array, Keys, Queries, Values
from seqmodels.ops._kv_cache import cache_bytes, empty_cache
from seqmodels.ops._memory_network import Norm, Weights
from seqmodels.ops.neural_memory import fresh_start, fresh_state, neural_memory, neural_memory_flops, recall_flops
from seqmodels.ops.softmax_attention import softmax_attention


class MemoryMixer(QKVMixer):
    """Base class of the layers around a memory per head: a network that is trained as it reads.

        q, k, v  = silu(conv(x W)), q and k over their length
        eta      = sigmoid(eta_proj(x))                          momentum
        alpha    = sigmoid(alpha_proj(x))                        forgetting
        theta    = step / mini_batch * (1 - eta) * sigmoid(theta_proj(x))

    The paper's theta is the sigmoid alone. With it the gradients of a mini-batch, all taken at the same weights, add up
    to a step many times too long, and momentum lengthens it by 1 / (1 - eta). The factors take both back: while eta
    stays the same, the steps of a mini-batch add up to at most `step`, and a matrix memory of unit keys is stable for
    `step` <= 1. Every layer of a deep memory adds to the curvature, so `step` is 1 / memory_depth by default.

    num_heads         heads, each with a memory of its own
    memory_depth      linear layers of the memory; 1 is a matrix
    memory_expand     width of its hidden layers, as a multiple of a key's
    memory_residual   M(k) = k + ...
    memory_norm       a norm at the memory's end, whose scale and bias it does not change
    activation        of the memory: "gelu", "gelu_exact", "silu"
    mini_batch        tokens whose gradients are taken at the same weights
    step              largest sum of the steps of a mini-batch; None is 1 / memory_depth
    persistent        learned tokens P that every document starts with; the convolutions of the document do not see them
    conv_size         width of the short convolution with silu on q, k and v; None for silu alone
    norm_eps          epsilon of the norms

    At the start alpha is about 0.001, eta and the share of theta 1/2. Alpha starts so low because a deep memory that
    forgets faster than it learns ends with all weights near zero, where its gradients vanish as well, and how it leaves
    from there depends on its inputs without bound: so do the gradients of a training step.
    """

    num_heads: int = 4
    memory_depth: int = 2
    memory_expand: float = 2.0
    memory_residual: bool = False
    memory_norm: bool = False
    activation: str = "gelu"
    mini_batch: int = 32
    step: float | None = None
    persistent: int = 0
    conv_size: int | None = 4
    norm_eps: float = 1e-5

    op = staticmethod(neural_memory)

    @property
    def head_dim(self) -> int:
        return self.divide(self.d_model, self.num_heads, "d_model")

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        return (self.d_model,) * 3

    @property
    def memory_widths(self) -> tuple[int, ...]:
        """Channels of a key, of the memory's hidden layers, and of a value."""
        hidden = int(self.head_dim * self.memory_expand)
        if self.memory_depth < 1 or hidden < 1:
            raise InputError(
                f"{type(self).__name__}: memory_depth = {self.memory_depth}, memory_expand = {self.memory_expand:g}; "
                "expected at least one layer, and at least one hidden channel"
            )
        return self.head_dim, *(hidden,) * (self.memory_depth - 1), self.head_dim

    def setup(self) -> None:
        super().setup()
        self.theta_proj, self.alpha_proj, self.eta_proj = map(self._gate, (0.0, -7.0, 0.0))
        fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-2, out_axis=-1, batch_axis=0)
        self.memory = memory_weights(self, self.num_heads, self.memory_widths, fan_in, use_bias=False)
        self.inner_norm = None
        if self.memory_norm:
            shape = (self.num_heads, self.head_dim)
            self.inner_norm = Norm(
                self.param("memory_norm_scale", nn.initializers.ones, shape, self.param_dtype),
                self.param("memory_norm_bias", nn.initializers.zeros, shape, self.param_dtype),
            )
        if self.persistent:
            shape, start = (self.persistent, self.d_model), nn.initializers.normal(1.0)
            self.persistent_tokens = self.param("persistent_tokens", start, shape, self.param_dtype)

    def _gate(self, bias: float) -> nn.Dense:
        """x to a number per head, in float32."""
        bias_init = nn.initializers.constant(bias)
        return nn.Dense(self.num_heads, bias_init=bias_init, dtype=jnp.float32, param_dtype=self.param_dtype)

    def rms_norm(self) -> nn.Module:
        """A norm with a learned scale."""
        return make_norm("rmsnorm", epsilon=self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype)

    def in_front(self) -> Activations | None:
        """P as a row of activations [1, n, d_model], or None."""
        return self.persistent_tokens.astype(self.dtype)[None] if self.persistent else None

    def after_persistent(self) -> tuple[Array | None, Weights, Weights | None]:
        """What the memory answers at P [1, n, h, v], and the weights and momentum that P leaves."""
        if not self.persistent:
            return None, self.memory, None
        tokens = self.in_front()
        alone = Stream(None, None, *tokens.shape[:2])
        inputs = self.written(tokens, alone)
        # They are few: a mini-batch would be mostly empty.
        how = {"mini_batch": self.mini_batch, "form": "recurrent", **self.network}
        o, state = neural_memory(**inputs, weights=self.memory, **how)
        return o, *fresh_start(state)

    def project(self, x: Activations, stream: Stream) -> dict:
        _, weights, momentum = self.after_persistent()
        return self.continued(x, stream, weights, momentum)

    def continued(self, x: Activations, stream: Stream, weights: Weights, momentum: Weights | None) -> dict:
        """The operator's arguments for documents that start from these weights and momentum."""
        fresh = fresh_state(x.shape[0], weights, momentum, has_momentum=True)
        start = {"weights": weights, "momentum": momentum, "fresh": fresh, "mini_batch": self.mini_batch}
        return {**self.written(x, stream), **start, **self.network}

    @property
    def network(self) -> dict:
        """What the memory is besides its weights."""
        return {"norm": self.inner_norm, "activation": self.activation, "residual": self.memory_residual}

    def written(self, x: Activations, stream: Stream) -> dict[str, Array]:
        """q, k, v and the gates of the memory."""
        q, k, v = self.qkv(x, stream)
        if not self.conv_size:
            q, k, v = map(jax.nn.silu, (q, k, v))
        return self.gated_inputs(x, q, k, v)

    def gated_inputs(self, x: Activations, q: Queries, k: Keys, v: Values) -> dict[str, Array]:
        """The memory's inputs from activated projections, with the gates of x."""
        share, alpha, eta = (jax.nn.sigmoid(gate(x)) for gate in (self.theta_proj, self.alpha_proj, self.eta_proj))
        step = 1 / self.memory_depth if self.step is None else self.step
        theta = step / self.mini_batch * (1 - eta) * share
        return {"q": unit(q), "k": unit(k), "v": v, "theta": theta, "alpha": alpha, "eta": eta}

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        memory = empty_state(batch_size, self.num_heads, self.memory_widths, use_bias=False, has_momentum=True)
        return self.state_around(memory, batch_size)

    def state_bytes(self, length: int = 0) -> int:
        return self.bytes_around(memory_bytes(self.num_heads, self.memory_widths, use_bias=False, has_momentum=True))

    @property
    def gate_flops(self) -> float:
        """FLOPs of theta, alpha and eta for a token."""
        return 3 * dense_flops(self.d_model, self.num_heads)

    @property
    def recall_flops(self) -> float:
        """FLOPs of what the memory answers to a token without a write."""
        return recall_flops(self.num_heads, self.memory_widths)

    def memory_flops(self, length: int, *, decoding: bool = False) -> float:
        """FLOPs of the memory with its inputs for a token, and its share of reading P, which every call does."""
        sizes = {"heads": self.num_heads, "widths": self.memory_widths, "has_momentum": True}
        operator = {"mini_batch": self.mini_batch, **sizes}
        query, others = dense_flops(self.d_model, self.d_model), 2 * dense_flops(self.d_model, self.d_model)
        inputs = query + others + self.gate_flops
        # What the memory answers at P is not asked.
        silent = inputs - query + neural_memory_flops(1, **operator, decoding=True) - self.recall_flops
        front = self.persistent * silent / (1 if decoding else length)
        return inputs + neural_memory_flops(length, **operator, decoding=decoding) + front


class MemoryAndAttention(MemoryMixer):
    """Base class of the layers that have attention beside the memory, with as many heads.

    persistent   learned tokens P in front of every document
    rope_base    base of the attention's rotary angles; None for no position encoding
    """

    persistent: int = 4
    rope_base: float | None = 10_000.0

    def attention_with(self, **fields: object) -> "AttentionInFront":
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        how = {"form": self.form, "backend": self.backend}
        shape = {"num_heads": self.num_heads, "rope_base": self.rope_base}
        return AttentionInFront(self.d_model, **shape, **dtypes, **how, **fields)

    def setup(self) -> None:
        super().setup()
        self.y_norm, self.m_norm = self.rms_norm(), self.rms_norm()

    def gated(self, y: Activations, m: Activations) -> Activations:
        """o_proj(y (x) m). The paper: both normalised with learned weights, a non-linearity, and the product."""
        return self.o_proj(jax.nn.silu(self.y_norm(y)) * jax.nn.silu(self.m_norm(m)))

    def front_flops(self, length: int, *, decoding: bool = False) -> float:
        """A token's share of the FLOPs of keys and values of P in the attention, which every call computes."""
        return self.persistent * 2 * dense_flops(self.d_model, self.d_model) / (1 if decoding else length)


class MemoryAndWindow(MemoryAndAttention):
    """Base class of those whose attention has a sliding window.

    window   a token sees itself, the window - 1 tokens before it, and P
    """

    window: int = 64

    def setup(self) -> None:
        super().setup()
        self.attention = self.attention_with(window=self.window)

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        cache = empty_cache(batch_size, self.window, self.num_heads, self.head_dim, self.head_dim, self.dtype)
        return {**super().initial_state(batch_size), "attention": cache}

    def state_bytes(self, length: int = 0) -> int:
        cache = cache_bytes(self.window, self.num_heads, self.head_dim, self.head_dim, self.dtype)
        return super().state_bytes(length) + cache

    def attention_flops(self, length: int, *, decoding: bool = False) -> float:
        """FLOPs of the attention with its projections, for a token."""
        attention = self.attention_with(window=self.window, parent=None)
        attended = attention.attention_flops(length, prefix=self.persistent, decoding=decoding)
        return attention.qkvo_flops + self.front_flops(length, decoding=decoding) + attended


class AttentionInFront(SoftmaxAttention):
    """Attention over [P | x], as a part of a layer: its cache is "attention" in the layer's state."""

    def attend(self, x: Activations, stream: Stream, tokens: Activations | None) -> Activations:
        """y for x. tokens [1, n, d_model]: P, at the n positions before each document; None for none."""
        prefix_k = prefix_v = None
        if tokens is not None:
            count = tokens.shape[1]
            prefix_k, prefix_v = (y[0] for y in self.keys_of(tokens, jnp.arange(-count, 0)[None]))
        prefix = {"prefix_k": prefix_k, "prefix_v": prefix_v}
        how = {"form": self.form, "backend": self.backend}
        o = stream("attention", softmax_attention, **self.project(x, stream), **prefix, **how)
        return self.readout(o, x)

    def keys_of(self, x: Activations, positions: Array) -> tuple[Keys, Values]:
        """Keys and values of tokens at these positions that no convolution sees."""
        k, v = (split_heads(y, self.kv_heads) for y in (self.k_proj(x), self.v_proj(x)))
        if self.qk_norm:
            k = self.k_norm(k)
        return (k if self.rope_base is None else rotary(k, positions, self.rope_base, self.turning)), v
