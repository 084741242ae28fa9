"""Titans with memory as a gate, MAG (Behrouz, Zhong, Mirrokni 2024, arXiv 2501.00663)."""

from seqmodels.layers._mixer import Stream, dense_flops, merge_heads
from seqmodels.layers._titans import MemoryAndWindow
from seqmodels.notation import Activations


class TitansMAG(MemoryAndWindow):
    """o = o_proj(silu(norm(y)) * silu(norm(m))): memory and attention read the same tokens, side by side.

        y = Attention(z)        m = M(z)        z = [P | x]

    with causal attention in a sliding window, to which P stays visible; M reads P before each document. The paper
    leaves the non-linearity open. The other fields are those of `MemoryMixer`, `MemoryAndAttention` and
    `MemoryAndWindow`.
    """

    def mix(self, x: Activations, stream: Stream) -> Activations:
        y = self.attention.attend(x, stream, self.in_front())
        m = merge_heads(self.operate(stream, **self.project(x, stream)))
        return self.gated(y, m)

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        out = dense_flops(self.d_model, self.d_model)
        return self.memory_flops(length, decoding=decoding) + self.attention_flops(length, decoding=decoding) + out
