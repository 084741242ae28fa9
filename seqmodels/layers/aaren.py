"""Aaren: attention with a learned query, which makes it a recurrent network (Feng et al. 2024, arXiv 2405.13956)."""

import flax.linen as nn

from seqmodels.layers._mixer import (
    CURSOR_BYTES,
    FLOAT32,
    Mixer,
    MixerState,
    Stream,
    dense_flops,
    merge_heads,
    split_heads,
    start_cursor,
)
from seqmodels.notation import Activations, Array
from seqmodels.ops.aaren import aaren, aaren_flops, empty_state


class Aaren(Mixer):
    """o_t = sum_{j <= t} exp(q . k_j / sqrt(k)) v_j / sum_{j <= t} exp(q . k_j / sqrt(k)), per head; then a projection.

    k_j and v_j are projections of x_j. q is the projection of `query`, one learned vector of width d_model that takes
    the place of x in self-attention: the same query at every position. It is the layer's only parameter beyond those
    of attention, and starts as large as an input after a norm. The score of a token does not depend on how long ago it
    was; order is known to the layer through its prefixes alone.

    num_heads   heads
    """

    num_heads: int = 8

    sees_whole = True
    op = staticmethod(aaren)

    @property
    def head_dim(self) -> int:
        return self.divide(self.d_model, self.num_heads, "d_model")

    def setup(self) -> None:
        self.divide(self.d_model, self.num_heads, "d_model")
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (self.dense(self.d_model) for _ in range(4))
        self.query = self.param("query", nn.initializers.normal(1.0), (self.d_model,), self.param_dtype)

    def project(self, x: Activations, stream: Stream) -> dict:
        query = self.q_proj(self.query.astype(self.dtype)).reshape(self.num_heads, -1)
        k, v = (split_heads(y, self.num_heads) for y in (self.k_proj(x), self.v_proj(x)))
        return {"k": k, "v": v, "query": query}

    def readout(self, o: Array, x: Activations) -> Activations:
        return self.o_proj(merge_heads(o))

    def initial_state(self, batch_size: int, capacity: int | None = None) -> MixerState:
        memory = empty_state(batch_size, self.num_heads, self.head_dim)
        return {"cursor": start_cursor(batch_size), "memory": memory}

    def state_bytes(self, length: int = 0) -> int:
        return CURSOR_BYTES + FLOAT32 * self.num_heads * (self.head_dim + 2)

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        projection = dense_flops(self.d_model, self.d_model)
        queries = 1 if decoding else 1 / length  # one projection of `query` in a call
        sizes = {"heads": self.num_heads, "key_dim": self.head_dim, "value_dim": self.head_dim}
        how = {"chunk_size": self.chunk_size, "decoding": decoding}
        return (3 + queries) * projection + aaren_flops(length, **sizes, **how)
