"""A decoder language model from a pattern of mixers."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from seqmodels.errors import InputError
from seqmodels.layers import SwiGLU, make_norm
from seqmodels.layers._mixer import MixerState
from seqmodels.models.block import MixerName, Scales, Stack
from seqmodels.notation import Activations, Logits, SegmentIds, Tokens
from seqmodels.ops._mesh import constrain, gathered


class LanguageModel(nn.Module):
    """Embedding, a stack of blocks, a norm, logits over the vocabulary.

    vocab_size       number of token ids
    d_model          width
    n_layers         depth
    pattern          mixers, repeated over the depth: names of the registry, or constructors; a tuple of these in the
                     place of one runs side by side in one block
    mlp              constructor of the feed-forward layers; None for none
    norm, norm_eps   name of the norms, see `seqmodels.layers.norms`, and their epsilon
    normalized_residual, mixer_scales, mlp_scales   see `seqmodels.models.block`
    embedding_scale  factor on the embedded tokens
    logit_cap        c tanh(logits / c) in place of the logits (Gemma 2, 2024, arXiv 2408.00118); None for no cap
    tie_embeddings   the logits are products with the embedding; otherwise with a matrix of their own, `lm_head`
    scan, remat      see `seqmodels.models.block.Stack`
    dtype            of activations; parameters are kept in `param_dtype`; logits, states and gates are float32

    Called with tokens [b, t] int32, the state an earlier call returned (None: a new stream) and segment_ids [b, t]
    (None: one document; 0 is padding). Returns logits [b, t, vocab_size] float32 and the state after the span.
    """

    vocab_size: int
    d_model: int = 128
    n_layers: int = 2
    pattern: Sequence[MixerName] = ("gated_linear_attention",)
    mlp: Callable[..., nn.Module] | None = SwiGLU
    norm: str = "rmsnorm"
    norm_eps: float = 1e-5
    normalized_residual: bool = False
    mixer_scales: Sequence[Scales] = ((1.0, 1.0),)
    mlp_scales: Scales = (1.0, 1.0)
    embedding_scale: float = 1.0
    logit_cap: float | None = None
    tie_embeddings: bool = True
    scan: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    def setup(self) -> None:
        self.embed = nn.Embed(
            self.vocab_size,
            self.d_model,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=nn.initializers.normal(0.02),
        )
        self.stack = Stack(**self.stack_fields())
        self.final_norm = make_norm(
            self.norm, epsilon=self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype
        )
        if not self.tie_embeddings:
            self.lm_head = nn.Dense(
                self.vocab_size,
                use_bias=False,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=nn.initializers.normal(0.02),
            )

    def stack_fields(self) -> dict[str, Any]:
        names = ("d_model", "n_layers", "pattern", "mlp", "norm", "norm_eps", "normalized_residual", "mixer_scales")
        return {name: getattr(self, name) for name in (*names, "mlp_scales", "scan", "remat", "dtype", "param_dtype")}

    def initial_state(self, batch_size: int, capacity: int | None = None) -> tuple[MixerState, ...]:
        """The state before the first token; `capacity` is the number of tokens to come, where states grow with it."""
        return Stack(**self.stack_fields(), parent=None).initial_state(batch_size, capacity)

    def __call__(
        self,
        tokens: Tokens,
        state: tuple[MixerState, ...] | None = None,
        segment_ids: SegmentIds | None = None,
    ) -> tuple[Logits, tuple[MixerState, ...]]:
        x, state = self.read(self.embedded(tokens), state, segment_ids)
        logits = (self.embed.attend(x) if self.tie_embeddings else self.lm_head(x)).astype(jnp.float32)
        if self.logit_cap is not None:
            logits = self.logit_cap * jnp.tanh(logits / self.logit_cap)
        return logits, state

    def embedded(self, tokens: Tokens) -> Activations:
        """What the stack reads of tokens."""
        if tokens.ndim != 2:
            raise InputError(f"LanguageModel: tokens has shape {tokens.shape}; expected [batch, time]")
        # Looked up in the whole table: what it gives is then split like the tokens.
        return self.embedding_scale * jnp.take(gathered(self.embed.embedding.astype(self.dtype)), tokens, axis=0)

    def read(
        self, x: Activations, state: tuple[MixerState, ...] | None, segment_ids: SegmentIds | None
    ) -> tuple[Activations, tuple[MixerState, ...]]:
        """What the stack makes of it, normalised: logits are linear in this."""
        x, state = self.stack(x, state, segment_ids)
        return self.final_norm(constrain(x)), state
