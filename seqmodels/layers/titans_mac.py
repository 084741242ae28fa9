"""Titans with memory as context, MAC (Behrouz, Zhong, Mirrokni 2024, arXiv 2501.00663)."""

import jax
import jax.numpy as jnp

from seqmodels.layers._memory_weights import empty_weights, memory_bytes, weights_bytes
from seqmodels.layers._mixer import FLOAT32, MixerState, Stream, dense_flops, merge_heads, split_heads
from seqmodels.layers._titans import MemoryAndAttention
from seqmodels.layers.norms import unit
from seqmodels.notation import Activations, Array, Keys, Values
from seqmodels.ops.memory_as_context import memory_as_context, memory_as_context_flops, start_state


class TitansMAC(MemoryAndAttention):
    """o = o_proj(silu(norm(y)) * silu(norm(m))), where within a segment of L tokens

        h = M'(x)               the memory as the segment before left it, without a write
        y = Attention([P | h | x])
        m = M(norm(y))          after writing norm(y), token by token

    `memory_as_context` has the equations. Causal: where the paper's figure lets a segment see all its h, a token sees
    those of the tokens up to it, for h answers to x. P and h stand in front of the segment, all at one position. The
    memory does not read P, which reaches it through y. What is written depends on what was read before, and rounding
    errors go round in that loop: with random parameters in bfloat16 the outputs have little to do with those in float32
    after some 8,000 tokens (docs/survey.md). The other fields are those of `MemoryMixer` and `MemoryAndAttention`.

    segment     L, counted from each document's start; a multiple of mini_batch
    conv_size   width of a short convolution with silu on the attention's queries, keys and values of x; None for none.
                The memory has none: it reads y, which is known segment by segment
    """

    segment: int = 64
    conv_size: int | None = None

    op = staticmethod(memory_as_context)

    def setup(self) -> None:
        super().setup()
        self.attention = self.attention_with(conv_size=self.conv_size)
        self.h_norm = self.rms_norm()

    def project(self, x: Activations, stream: Stream) -> dict:
        if self.is_initializing():  # The operator runs these on parameters that must be there.
            self.context(jnp.zeros((1, 1, self.num_heads, self.head_dim), self.dtype))
            self.written_of(jnp.zeros((1, 1, self.num_heads, self.head_dim), self.dtype))
        layer = self.clone(parent=None, name=None)
        prefix_k = prefix_v = None
        if self.persistent:
            tokens = self.in_front()
            prefix_k, prefix_v = (y[0] for y in self.attention.keys_of(tokens, jnp.zeros(tokens.shape[:2], int)))
        start = start_state(x.shape[0], self.segment, self.num_heads, self.head_dim, self.head_dim, self.memory)
        return {
            **self.attention.placed(x, stream, 1 + stream.positions % self.segment),
            **{"r": unit(self._activated(self.q_proj(x))), "prefix_k": prefix_k, "prefix_v": prefix_v},
            "context": lambda maps, h: layer.apply({"params": maps}, h, method="context"),
            "written": lambda maps, y: layer.apply({"params": maps}, y, method="written_of"),
            **{"maps": self.variables["params"], "weights": self.memory, "fresh": start},
            **{"segment": self.segment, "mini_batch": self.mini_batch, **self.network},
        }

    def _activated(self, x: Array) -> Array:
        return split_heads(jax.nn.silu(x), self.num_heads)

    def context(self, h: Values) -> tuple[Keys, Values]:
        """Keys and values of h in the attention."""
        h = self.h_norm(merge_heads(h))
        return self.attention.keys_of(h, jnp.zeros(h.shape[:2], int))

    def written_of(self, y: Array) -> dict[str, Array]:
        """What the memory reads, from the attention's outputs by head."""
        y = self.y_norm(self.attention.o_proj(merge_heads(y)))
        return self.gated_inputs(y, *(self._activated(proj(y)) for proj in (self.q_proj, self.k_proj, self.v_proj)))

    def readout(self, o: Array, x: Activations) -> Activations:
        return self.gated(self.attention.o_proj(merge_heads(o[:, :, 0])), merge_heads(o[:, :, 1]))

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        weights = empty_weights(self.num_heads, self.memory_widths, use_bias=False)
        dims = (self.num_heads, self.head_dim, self.head_dim)
        return self.state_around(start_state(batch_size, self.segment, *dims, weights), batch_size)

    def state_bytes(self, length: int = 0) -> int:
        weights = {"heads": self.num_heads, "widths": self.memory_widths, "use_bias": False}
        slots = FLOAT32 * 2 * self.segment * self.num_heads * 2 * self.head_dim  # keys and values of h and of x
        past_and_place = weights_bytes(**weights) + 4
        return self.bytes_around(memory_bytes(**weights, has_momentum=True) + past_and_place + slots)

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        projection = dense_flops(self.d_model, self.d_model)
        context, written = 2 * projection, 4 * projection + self.gate_flops
        inputs, outputs = 4 * projection, 2 * projection  # of x: q, k, v and r; y once more, and o
        operator = memory_as_context_flops(
            length,
            heads=self.num_heads,
            widths=self.memory_widths,
            segment=self.segment,
            mini_batch=self.mini_batch,
            prefix=self.persistent,
            maps=context + written,
            decoding=decoding,
        )
        return inputs + outputs + self.front_flops(length, decoding=decoding) + operator
