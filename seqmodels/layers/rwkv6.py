"""RWKV-6: token shift, a decay per channel from the input, a bonus for the current token.

(Peng et al. 2024, "Eagle and Finch", arXiv 2404.05892.)
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float

from seqmodels.layers._mixer import (
    CURSOR_BYTES,
    FLOAT32,
    Mixer,
    MixerState,
    Stream,
    convolution_bytes,
    dense_flops,
    merge_heads,
    split_heads,
    start_cursor,
)
from seqmodels.notation import Activations, Array
from seqmodels.ops.linear_attention import zero_state
from seqmodels.ops.short_conv import short_conv, zero_inputs
from seqmodels.ops.wkv6 import wkv6, wkv6_flops

# What the token before is mixed into, in the order of the rows of `x_bias` and `x_proj_2`.
MIXED = "rwkvg"


class RWKV6(Mixer):
    """The time mixing of RWKV-6, with d_t = x_{t-1} - x_t (x_0 = 0):

        a   = tanh((x + d * mu) x_proj_0), five parts of proj_low_rank_dim channels
        x_i = x + d * (x_bias_i + a_i x_proj_2_i)                        for i = r, w, k, v, g
        r, k, v, gate = x_r r_proj, x_k k_proj, x_v v_proj, x_g g_proj
        g   = -exp(tanh(x_w w_proj_0) w_proj_2)                          the log of the decay w = exp(-exp(.))
        y   = o_proj(g_norm(wkv6(r, k, v, g, bonus)) * silu(gate))

    Parameters have the names of flash-linear-attention's RWKV6Attention, whose `x_proj.0.mu` is `mu`, `x_proj.2.weight`
    is `x_proj_2` [5, rank, d_model], `r_proj.linear` is `r_proj` and `w_proj.linear.lora.0` is `w_proj_0`. They start
    as in the authors' code, which lets early layers and early channels take more from the token before.

    head_dim            channels of a head; a narrower layer is one head
    proj_low_rank_dim   rank of what the input adds to the mixing weights
    gate_low_rank_dim   rank of the projection to the decay
    norm_eps            added to the variance in g_norm, a group norm with one group per head
    """

    head_dim: int = 64
    proj_low_rank_dim: int = 32
    gate_low_rank_dim: int = 64
    norm_eps: float = 64e-5

    op = staticmethod(wkv6)

    @property
    def num_heads(self) -> int:
        return self.heads_of(self.head_dim, self.d_model, "d_model")

    def setup(self) -> None:
        dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        rank, count = self.proj_low_rank_dim, len(MIXED)

        def start(name: str) -> Callable[..., Array]:
            def init(key: Array, *_: Any) -> Array:
                return starting_values(self.d_model, self.layer_index, self.n_layers)[name].astype(self.param_dtype)

            return init

        self.mu, self.x_bias = self.param("mu", start("mu")), self.param("x_bias", start("x_bias"))
        self.x_proj_0 = nn.Dense(count * rank, use_bias=False, kernel_init=nn.initializers.zeros, **dtypes)
        self.x_proj_2 = self.param("x_proj_2", _small, (count, rank, self.d_model), self.param_dtype)
        self.r_proj, self.k_proj, self.v_proj, self.g_proj, self.o_proj = (self.dense(self.d_model) for _ in range(5))
        self.w_proj_0 = nn.Dense(self.gate_low_rank_dim, use_bias=False, kernel_init=nn.initializers.zeros, **dtypes)
        in_float32 = {**dtypes, "dtype": jnp.float32}
        self.w_proj_2 = nn.Dense(self.d_model, kernel_init=_small, bias_init=start("w_proj_2/bias"), **in_float32)
        self.bonus = self.param("bonus", lambda key: start("bonus")(key).reshape(self.num_heads, -1))
        norm = {"reduction_axes": (-1,), "use_fast_variance": False, "epsilon": self.norm_eps}
        self.g_norm = nn.GroupNorm(self.num_heads, **norm, **dtypes)

    def mix(self, x: Activations, stream: Stream) -> Activations:
        r, w, k, v, gate = self.token_shift(x, stream)
        decay = self.w_proj_2(jnp.tanh(self.w_proj_0(w)).astype(jnp.float32))
        heads = {"q": self.r_proj(r), "k": self.k_proj(k), "v": self.v_proj(v), "g": -jnp.exp(decay)}
        heads = {name: split_heads(y, self.num_heads) for name, y in heads.items()}
        o = self.operate(stream, **heads, u=self.bonus, scale=1.0)
        return self.o_proj(self.g_norm(merge_heads(o)) * jax.nn.silu(self.g_proj(gate)))

    def token_shift(self, x: Activations, stream: Stream) -> Float[Array, "5 b t d"]:
        """x with some of the token before, five times in different proportions."""
        only_before = jnp.stack([jnp.ones(self.d_model, self.dtype), jnp.zeros(self.d_model, self.dtype)])
        difference = stream("token_shift", short_conv, x, only_before) - x
        a = jnp.tanh(self.x_proj_0(x + difference * self.mu.astype(self.dtype)))
        a = a.reshape(*a.shape[:2], *self.x_proj_2.shape[:2])
        weight = jnp.einsum("btnr,nrd->nbtd", a, self.x_proj_2.astype(self.dtype))
        return x + difference * (weight + self.x_bias.astype(self.dtype)[:, None, None])

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        channels = self.d_model // self.num_heads
        return {
            "cursor": start_cursor(batch_size),
            "memory": zero_state(batch_size, self.num_heads, channels, channels),
            "token_shift": zero_inputs(batch_size, 2, self.d_model),
        }

    def state_bytes(self, length: int = 0) -> int:
        memory = FLOAT32 * self.d_model * (self.d_model // self.num_heads)
        return CURSOR_BYTES + memory + convolution_bytes(2, self.d_model)

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        d, channels = self.d_model, self.d_model // self.num_heads
        mixing = len(MIXED) * dense_flops(d, self.proj_low_rank_dim, d)
        projections = 5 * dense_flops(d, d) + dense_flops(d, self.gate_low_rank_dim, d)
        sizes = {"heads": self.num_heads, "key_dim": channels, "value_dim": channels}
        how = {"chunk_size": self.chunk_size, "decoding": decoding}
        return mixing + projections + wkv6_flops(length, **sizes, **how)


def starting_values(d_model: int, layer_index: int | Array, n_layers: int) -> dict[str, Array]:
    """Where parameters start, by name. The weight of the token before falls from 1 over the channels."""
    channel = jnp.arange(d_model, dtype=jnp.float32)
    part, place = channel / d_model, channel / max(d_model - 1, 1)
    depth, shallow = layer_index / max(n_layers - 1, 1), 1 - layer_index / n_layers
    even, steep = 1 - part**shallow, 1 - part ** (shallow / 2)
    mixing = {"r": steep, "w": even, "k": even, "v": even - 0.3 * depth, "g": steep}
    return {
        "mu": even,
        "x_bias": jnp.stack([mixing[name] for name in MIXED]),
        "w_proj_2/bias": -6 + 5 * place ** (0.7 + 1.3 * depth),
        "bonus": depth * (1 - place) + 0.1 * ((channel + 1) % 3 - 1),
    }


def _small(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jax.random.uniform(key, shape, dtype, -0.01, 0.01)
