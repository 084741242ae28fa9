"""What the layers around `delta_rule` share: unit queries and keys, the write strength, decay from learned rates."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.errors import InputError
from seqmodels.layers._mixer import FLOAT32, MixerState, Stream, dense_flops, merge_heads, split_heads
from seqmodels.layers._qkv_mixer import QKVMixer
from seqmodels.layers.norms import make_norm, unit
from seqmodels.notation import Activations, Array
from seqmodels.ops._heads import by_head
from seqmodels.ops.delta_rule import delta_rule, delta_rule_flops, zero_state


class DeltaMixer(QKVMixer):
    """Base class of mixers whose memory is a matrix per head that corrects itself.

    num_heads         heads of queries and keys
    head_dim          channels of a query or key; None is d_model / num_heads
    num_v_heads       heads of values, each num_v_heads / num_heads of which share a query and a key; None is num_heads
    expand_v          channels of a value, as a multiple of head_dim
    conv_size         width of the short convolution with silu on q, k and v; None for silu alone
    allow_neg_eigval  beta in (0, 2) instead of (0, 1): a write may turn what it finds into its opposite, which tracks
                      states such as parity (Grazzi et al. 2024, arXiv 2411.12537)
    norm_eps          epsilon of the norm per head
    """

    num_heads: int = 4
    head_dim: int | None = None
    num_v_heads: int | None = None
    expand_v: float = 1.0
    conv_size: int | None = 4
    allow_neg_eigval: bool = False
    norm_eps: float = 1e-5

    op = staticmethod(delta_rule)

    @property
    def key_dim(self) -> int:
        """Channels of one head's queries and keys."""
        return self.head_dim or self.divide(self.d_model, self.num_heads, "d_model")

    @property
    def value_dim(self) -> int:
        """Channels of one head's values."""
        width = self.key_dim * self.expand_v
        if width < 1 or width != int(width):
            raise InputError(
                f"{type(self).__name__}: a value head has head_dim * expand_v = {width:g} channels; expected a "
                "positive whole number"
            )
        return int(width)

    @property
    def value_heads(self) -> int:
        return self.num_v_heads or self.num_heads

    @property
    def qkv_heads(self) -> tuple[int, int, int]:
        return self.num_heads, self.num_heads, self.value_heads

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        return self.num_heads * self.key_dim, self.num_heads * self.key_dim, self.value_heads * self.value_dim

    @property
    def decays(self) -> int:
        """Numbers of decay of a head: 0, 1, or key_dim."""
        return 0

    def setup(self) -> None:
        self.divide(self.value_heads, self.num_heads, "num_v_heads")
        super().setup()
        self.b_proj = self.gate_dense(self.value_heads)
        self.o_norm = make_norm("rmsnorm", epsilon=self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype)

    def gate_dense(self, features: int) -> nn.Dense:
        """A projection to gates, in float32."""
        return nn.Dense(features, use_bias=False, dtype=jnp.float32, param_dtype=self.param_dtype)

    def project(self, x: Activations, stream: Stream) -> dict:
        q, k, v = self.qkv(x, stream)
        if not self.conv_size:
            q, k, v = map(jax.nn.silu, (q, k, v))
        beta = jax.nn.sigmoid(self.b_proj(x))
        return {"q": unit(q), "k": unit(k), "v": v, "beta": 2 * beta if self.allow_neg_eigval else beta}

    def output_gate(self, x: Activations) -> Array | None:
        """Factor on the normalised output, [b, t, hv, v]; None for none."""
        raise NotImplementedError

    def readout(self, o: Array, x: Activations) -> Activations:
        o, gate = by_head(self.o_norm, o), self.output_gate(x)
        return self.o_proj(merge_heads(o if gate is None else o * gate))

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        return self.state_around(zero_state(batch_size, self.value_heads, self.key_dim, self.value_dim), batch_size)

    def state_bytes(self, length: int = 0) -> int:
        return self.bytes_around(FLOAT32 * self.value_heads * self.key_dim * self.value_dim)

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        beta = dense_flops(self.d_model, self.value_heads)
        return self.qkvo_flops + beta + delta_rule_flops(
            length,
            heads=self.value_heads,
            key_heads=self.num_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            decays=self.decays,
            chunk_size=self.chunk_size,
            decoding=decoding,
        )


def head_gate(gate: Array, heads: int) -> Array:
    """silu of a projected gate, split into heads."""
    return jax.nn.silu(split_heads(gate, heads))
