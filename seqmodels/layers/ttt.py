"""Test-time training layers, TTT-Linear and TTT-MLP (Sun et al. 2024, arXiv 2407.04620)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.errors import InputError, nearest
from seqmodels.layers._memory_weights import empty_state, memory_bytes, memory_weights
from seqmodels.layers._mixer import (
    CURSOR_BYTES,
    Mixer,
    MixerState,
    ShortConvolution,
    Stream,
    convolution_bytes,
    dense_flops,
    merge_heads,
    split_heads,
    start_cursor,
)
from seqmodels.layers.norms import make_norm
from seqmodels.layers.positions import rotary
from seqmodels.notation import Activations, Array
from seqmodels.ops._memory_network import Norm
from seqmodels.ops.neural_memory import fresh_state, neural_memory, neural_memory_flops
from seqmodels.ops.short_conv import zero_inputs

# Learning rate of the inner model, by its kind.
BASE_LR = {"linear": 1.0, "mlp": 0.1}
MLP_EXPAND = 4


class TTT(Mixer):
    """y = o_proj(gelu(g_proj(x)) * post_norm(o)), where o is read from a model that learns, as it reads, k to v:

        q, k    = conv_q(q_proj(x)), conv_k(q_proj(x)), turned by their place in the mini-batch (rotary positions)
        f(k)    = norm(k W_1 + b_1), or norm(gelu(k W_1 + b_1) W_2 + b_2)
        loss_j  = |f(k_j) - (v_j - k_j)|^2 / 2            o_t = q_t + f(q_t), f after steps of size eta_tj, j <= t
        eta_tj  = max(0, 1 / (t + 1) + token_bias_t) base_lr sigmoid(lr_proj(x_j)) / head_dim       t, j from 0 in it

    Gradients are taken at the weights of the mini-batch's start, which for the next are those after its last token.

    num_heads     heads
    inner_model   f: "linear" or "mlp", whose hidden layer is four times as wide
    mini_batch    tokens of a mini-batch
    base_lr       as above; None is 1 for "linear", 0.1 for "mlp"
    conv_size     width of the convolutions on q and k
    rope_base     base of the rotary positions
    norm_eps      epsilon of both norms
    """

    num_heads: int = 4
    inner_model: str = "linear"
    mini_batch: int = 16
    base_lr: float | None = None
    conv_size: int = 4
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6

    op = staticmethod(neural_memory)

    @property
    def head_dim(self) -> int:
        return self.divide(self.d_model, self.num_heads, "d_model")

    @property
    def memory_widths(self) -> tuple[int, ...]:
        """Channels of a key, of the hidden layer if there is one, and of a value."""
        if self.inner_model not in BASE_LR:
            raise InputError(
                f"TTT: inner_model={self.inner_model!r} does not exist; {nearest(self.inner_model, BASE_LR)}"
            )
        hidden = (MLP_EXPAND * self.head_dim,) if self.inner_model == "mlp" else ()
        return self.head_dim, *hidden, self.head_dim

    def setup(self) -> None:
        if self.head_dim % 2:
            raise InputError(
                f"TTT: a head has d_model / num_heads = {self.head_dim} channels; expected an even number, "
                "for rotary positions"
            )
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.q_proj, self.v_proj, self.g_proj, self.o_proj = (self.dense(self.d_model) for _ in range(4))
        self.q_conv1d, self.k_conv1d = (
            ShortConvolution(self.d_model, self.conv_size, use_bias=True, activation=None, **dtypes) for _ in range(2)
        )
        self.lr_proj = nn.Dense(self.num_heads, dtype=jnp.float32, param_dtype=self.param_dtype)
        self.token_bias = self.param("token_bias", nn.initializers.zeros, (self.mini_batch,), self.param_dtype)
        start = nn.initializers.normal(0.02)
        self.memory = memory_weights(self, self.num_heads, self.memory_widths, start, use_bias=True)
        shape = (self.num_heads, self.head_dim)
        self.inner_norm = Norm(
            self.param("inner_norm_scale", nn.initializers.ones, shape, self.param_dtype),
            self.param("inner_norm_bias", nn.initializers.zeros, shape, self.param_dtype),
        )
        self.post_norm = make_norm("layernorm", epsilon=self.norm_eps, **dtypes)

    def project(self, x: Activations, stream: Stream) -> dict:
        shared, place = self.q_proj(x), jnp.maximum(stream.positions, 0) % self.mini_batch
        q, k = (split_heads(conv(shared, stream), self.num_heads) for conv in (self.q_conv1d, self.k_conv1d))
        q, k = (rotary(y, place, self.rope_base) for y in (q, k))
        base_lr = BASE_LR[self.inner_model] if self.base_lr is None else self.base_lr
        theta = base_lr / self.head_dim * jax.nn.sigmoid(self.lr_proj(x))
        reach = jnp.maximum(0, 1 / (place + 1) + self.token_bias.astype(jnp.float32)[place])
        return {
            "q": q,
            "k": k,
            "v": split_heads(self.v_proj(x), self.num_heads),
            "theta": theta,
            "reach": jnp.broadcast_to(reach[..., None], theta.shape),
            "weights": self.memory,
            "norm": self.inner_norm,
            "mini_batch": self.mini_batch,
            "residual": True,
            "loss_scale": 0.5,
            "epsilon": self.norm_eps,
            "fresh": fresh_state(x.shape[0], self.memory, None, has_momentum=False),
        }

    def readout(self, o: Array, x: Activations) -> Activations:
        return self.o_proj(jax.nn.gelu(self.g_proj(x)) * self.post_norm(merge_heads(o)))

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        memory = empty_state(batch_size, self.num_heads, self.memory_widths, use_bias=True, has_momentum=False)
        state = {"cursor": start_cursor(batch_size), "memory": memory}
        return state | {f"{name}_conv1d": zero_inputs(batch_size, self.conv_size, self.d_model) for name in "qk"}

    def state_bytes(self, length: int = 0) -> int:
        memory = memory_bytes(self.num_heads, self.memory_widths, use_bias=True, has_momentum=False)
        return CURSOR_BYTES + memory + 2 * convolution_bytes(self.conv_size, self.d_model)

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        projections = 4 * dense_flops(self.d_model, self.d_model) + dense_flops(self.d_model, self.num_heads)
        network = {"heads": self.num_heads, "widths": self.memory_widths, "mini_batch": self.mini_batch}
        how = {"has_momentum": False, "has_reach": True, "decoding": decoding}
        return projections + neural_memory_flops(length, **network, **how)
