"""Lightning attention, the mixer of TransNormerLLM (Qin et al. 2023, arXiv 2307.14995; 2024, arXiv 2401.04658)."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Float

from seqmodels.layers._linear_mixer import LinearMixer
from seqmodels.layers._mixer import Stream, dense_flops, merge_heads
from seqmodels.layers.norms import make_norm
from seqmodels.layers.positions import lrpe
from seqmodels.notation import Activations, Array


def alibi_slopes(num_heads: int) -> list[float]:
    """2^(-8(h+1)/H) for a power of two; otherwise those of the power of two below, then every second one of the next.

    (Press, Smith, Lewis 2021, arXiv 2108.12409.)
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (h + 1) / power) for h in range(power)]
    if power < num_heads:
        slopes += alibi_slopes(2 * power)[::2][: num_heads - power]
    return slopes


def lightning_decay(num_heads: int, layer_index: int | Array, n_layers: int) -> Float[Array, " h"]:
    """-slope_h (1 - l / (L - 1) + 1e-5): the deeper the layer, the longer its memory. With L = 1 the ratio is 0."""
    depth = layer_index / max(n_layers - 1, 1)
    return -jnp.array(alibi_slopes(num_heads), jnp.float32) * (1 - depth + 1e-5)


class LightningAttention(LinearMixer):
    """q, k = silu; decay fixed by head and depth; out_proj(u * srmsnorm(o)) with a projected gate u.

    The norm is over all heads jointly and has no parameters, so the operator's scale is 1.

    use_lrpe   modulate q and k by the learned angles of LRPE (which doubles the key channels); TransNormerLLM does so
               in its first layer
    """

    use_lrpe: bool = False

    @property
    def state_features(self) -> int:
        return super().state_features * (2 if self.use_lrpe else 1)

    @property
    def decays(self) -> int:
        return 1

    def setup(self) -> None:
        super().setup()
        self.u_proj = self.dense(self.value_width)
        self.norm = make_norm("srmsnorm", epsilon=1e-6, dtype=self.dtype)
        if self.use_lrpe:
            shape = (self.num_heads, self.key_width // self.num_heads)
            self.theta = self.param("theta", lambda key: _lrpe_angles(shape).astype(self.param_dtype))

    def project(self, x: Activations, stream: Stream) -> dict:
        q, k, v = self.qkv(x, stream)
        q, k = jax.nn.silu(q), jax.nn.silu(k)
        if self.use_lrpe:
            q, k = (lrpe(y, stream.positions, self.theta) for y in (q, k))
        decay = lightning_decay(self.num_heads, self.layer_index, self.n_layers)
        return {"q": q, "k": k, "v": v, "g": decay, "scale": 1.0}

    def readout(self, o: Array, x: Activations) -> Activations:
        return self.o_proj(self.u_proj(x) * self.norm(merge_heads(o)))

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        gate = dense_flops(self.d_model, self.value_width)
        return super().flops_per_token(length, decoding=decoding) + gate


def _lrpe_angles(shape: tuple[int, int]) -> Float[Array, "h k"]:
    """10000^(-2 i / (H k)) over the H k channels of all heads, counted together."""
    heads, channels = shape
    return 10_000.0 ** (-2 * jnp.arange(heads * channels, dtype=jnp.float32) / (heads * channels)).reshape(shape)
