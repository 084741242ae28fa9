"""Models for tasks that next tokens do not fit: a language model's body between other ends.

Both are called like a `LanguageModel`, and their `body` is one, so that whatever configures it configures them.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from seqmodels.errors import InputError
from seqmodels.layers._mixer import MixerState
from seqmodels.models.language_model import LanguageModel
from seqmodels.notation import Array, Logits, SegmentIds, Tokens

POSITION_BASE = 10_000.0

State = tuple[MixerState, ...]


class Autoencoder(nn.Module):
    """Reads a whole sequence, and says every token of it from what it knows at the last position.

        logits_t = mlp(h_T + p_t)

    where h_T is the body's output at the last position, p_t sinusoids of position t (Vaswani et al. 2017, arXiv
    1706.03762) and the mlp has one hidden layer of width 2 d_model: the decoder of MAD's compression task (Poli et al.
    2024, arXiv 2403.17844). Logits [b, t, vocab_size] at position t are of the token at t.

    body   reads the tokens; of its own head nothing is used
    """

    body: LanguageModel

    @property
    def vocab_size(self) -> int:
        return self.body.vocab_size

    @nn.compact
    def __call__(
        self, tokens: Tokens, state: State | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Logits, State]:
        if segment_ids is not None:
            raise InputError("Autoencoder: segment_ids are given; expected one document in each row")
        x, state = self.body.read(self.body.embedded(tokens), state, None)
        dtypes = {"dtype": self.body.dtype, "param_dtype": self.body.param_dtype}
        positions = sinusoids(tokens.shape[1], self.body.d_model).astype(x.dtype)
        hidden = nn.Dense(2 * self.body.d_model, name="decoder_in", **dtypes)(x[:, -1:] + positions)
        logits = nn.Dense(self.body.vocab_size, name="decoder_out", **dtypes)(nn.gelu(hidden))
        return logits.astype(jnp.float32), state


class Regressor(nn.Module):
    """Reads numbers and says one at each position: linear, body, linear.

    input_size   numbers at each position
    body         what lies between; of its embedding and its head nothing is used

    Called with numbers [b, t, input_size] in the place of tokens. Returns float32 [b, t, 1].
    """

    body: LanguageModel
    input_size: int

    @property
    def vocab_size(self) -> int:
        """It knows no ids."""
        return 0

    @nn.compact
    def __call__(
        self, tokens: Array, state: State | None = None, segment_ids: SegmentIds | None = None
    ) -> tuple[Array, State]:
        if tokens.ndim != 3 or tokens.shape[-1] != self.input_size:
            raise InputError(
                f"Regressor: tokens has shape {tokens.shape}; expected [batch, time, input_size = {self.input_size}]"
            )
        dtypes = {"dtype": self.body.dtype, "param_dtype": self.body.param_dtype}
        x = nn.Dense(self.body.d_model, name="read_in", **dtypes)(tokens)
        x, state = self.body.read(x, state, segment_ids)
        return nn.Dense(1, name="read_out", **dtypes)(x).astype(jnp.float32), state


def input_shape(model: nn.Module, batch_size: int, seq_len: int) -> jax.ShapeDtypeStruct:
    """What a model is called with: ids, or `input_size` numbers at each position."""
    size: Any = getattr(model, "input_size", None)
    if size is None:
        return jax.ShapeDtypeStruct((batch_size, seq_len), jnp.int32)
    return jax.ShapeDtypeStruct((batch_size, seq_len, size), jnp.float32)


def sinusoids(length: int, width: int) -> Array:
    """Sines, then cosines, of positions at frequencies base ** (-i / (width / 2)): float32 [length, width]."""
    half = -(-width // 2)
    angles = jnp.arange(length)[:, None] * POSITION_BASE ** (-jnp.arange(half) / half)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[:, :width]
