"""The matrix LSTM of xLSTM (Beck et al. 2024, arXiv 2405.04517), as the layer of xLSTM 7B (2025, arXiv 2503.13427)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.layers._mixer import FLOAT32, MixerState, Stream, dense_flops, merge_heads, split_heads
from seqmodels.layers._qkv_mixer import QKVMixer
from seqmodels.notation import Activations, Array
from seqmodels.ops.mlstm import mlstm, mlstm_flops, zero_state


class MLSTM(QKVMixer):
    """y_t = W_o (sigmoid(W_og x_t) * LayerNorm(o_t)), where o is the matrix LSTM of q, k, v with a gate per head:

        log i_t = cap(w_i . x_t + b_i)        log f_t = log_sigmoid(cap(w_f . x_t + b_f))        cap(z) = c tanh(z / c)

    This is the layer of xLSTM 7B: keys half as wide as the values, capped gates, no convolution. In the block of the
    first paper a convolution comes before q and k; `conv_size` puts one on q, k and v. The gates start independent of
    x, the input gates nearly closed (b_i = -10), the forget gates open, from b_f = 3 in the first head to 6 in the
    last.

    Parameters map onto `transformers`' xLSTM one to one: q, k, v, out_proj there are q_proj, k_proj, v_proj, o_proj
    here; igate_preact, fgate_preact, ogate_preact and multihead_norm are called the same.

    num_heads       heads; the models up to 1.3B of the first paper have 4, xLSTM 7B has 8
    qk_dim_factor   width of the queries and of the keys, as a multiple of d_model
    v_dim_factor    width of the values, likewise
    gate_soft_cap   c above; None for gates without a cap
    norm_eps        epsilon of the LayerNorm, which is over the channels of a head, with a scale for each channel
    """

    num_heads: int = 4
    qk_dim_factor: float = 0.5
    v_dim_factor: float = 1.0
    gate_soft_cap: float | None = 15.0
    norm_eps: float = 1e-6

    op = staticmethod(mlstm)

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        qk_width = int(self.d_model * self.qk_dim_factor)
        return qk_width, qk_width, int(self.d_model * self.v_dim_factor)

    @property
    def head_dims(self) -> tuple[int, int]:
        """Channels of a key and of a value."""
        qk_width, _, v_width = self.qkv_widths
        return (
            self.divide(qk_width, self.num_heads, "d_model * qk_dim_factor"),
            self.divide(v_width, self.num_heads, "d_model * v_dim_factor"),
        )

    def setup(self) -> None:
        _, value_dim = self.head_dims
        super().setup()
        self.igate_preact = self._gate(nn.initializers.constant(-10.0))
        self.fgate_preact = self._gate(lambda key, shape, dtype: jnp.linspace(3.0, 6.0, *shape, dtype=dtype))
        self.ogate_preact = self.dense(self.num_heads * value_dim)
        self.multihead_norm = nn.LayerNorm(
            epsilon=self.norm_eps,
            use_bias=False,
            reduction_axes=-1,
            feature_axes=(-2, -1),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    def _gate(self, bias_init: nn.initializers.Initializer) -> nn.Dense:
        """x to a number per head, in float32."""
        return nn.Dense(
            self.num_heads,
            kernel_init=nn.initializers.zeros,
            bias_init=bias_init,
            dtype=jnp.float32,
            param_dtype=self.param_dtype,
        )

    def _capped(self, logits: Array) -> Array:
        cap = self.gate_soft_cap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def project(self, x: Activations, stream: Stream) -> dict:
        q, k, v = self.qkv(x, stream)
        i, f = self._capped(self.igate_preact(x)), self._capped(self.fgate_preact(x))
        return {"q": q, "k": k, "v": v, "g": jax.nn.log_sigmoid(f), "i": i}

    def readout(self, o: Array, x: Activations) -> Activations:
        gate = split_heads(jax.nn.sigmoid(self.ogate_preact(x)), self.num_heads)
        return self.o_proj(merge_heads(gate * self.multihead_norm(o)))

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        return self.state_around(zero_state(batch_size, self.num_heads, *self.head_dims), batch_size)

    def state_bytes(self, length: int = 0) -> int:
        key_dim, value_dim = self.head_dims
        return self.bytes_around(FLOAT32 * self.num_heads * (key_dim * value_dim + key_dim + 1))

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        key_dim, value_dim = self.head_dims
        gates = 2 * dense_flops(self.d_model, self.num_heads) + dense_flops(self.d_model, self.num_heads * value_dim)
        sizes = {"heads": self.num_heads, "key_dim": key_dim, "value_dim": value_dim}
        how = {"chunk_size": self.chunk_size, "decoding": decoding}
        return self.qkvo_flops + gates + mlstm_flops(length, **sizes, **how)
