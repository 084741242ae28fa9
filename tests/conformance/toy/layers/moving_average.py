"""A gated moving average of the inputs, with a learned decay per channel."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from seqmodels.ops.moving_average import moving_average

from seqmodels.layers._mixer import CURSOR_BYTES, FLOAT32, Mixer, MixerState, Stream, dense_flops, start_cursor
from seqmodels.notation import Activations, Array


class MovingAverage(Mixer):
    """y = W_o (silu(W_g x) * average(W_x x))."""

    op = staticmethod(moving_average)

    def setup(self) -> None:
        self.x_proj, self.g_proj, self.o_proj = (self.dense(self.d_model) for _ in range(3))
        self.decay = self.param("decay", nn.initializers.normal(1.0), (self.d_model,), jnp.float32)

    def project(self, x: Activations, stream: Stream) -> dict:
        return {"x": self.x_proj(x), "g": jax.nn.log_sigmoid(self.decay)}

    def readout(self, o: Array, x: Activations) -> Activations:
        return self.o_proj(o * jax.nn.silu(self.g_proj(x)))

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        return {"cursor": start_cursor(batch_size), "memory": jnp.zeros((batch_size, self.d_model))}

    def state_bytes(self, length: int = 0) -> int:
        return CURSOR_BYTES + FLOAT32 * self.d_model

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        return 3 * dense_flops(self.d_model, self.d_model)
