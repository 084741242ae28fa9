"""Titans with memory as a layer, MAL (Behrouz, Zhong, Mirrokni 2024, arXiv 2501.00663)."""

from seqmodels.layers._mixer import Stream, dense_flops, merge_heads
from seqmodels.layers._titans import MemoryAndWindow
from seqmodels.notation import Activations


class TitansMAL(MemoryAndWindow):
    """Attention(norm(M(z))), z = [P | x]: attention reads what the memory answers, at P too.

    Causal attention in a sliding window, to which the answers at P stay visible; M reads P before each document. The
    norm is one of those that the paper's formulas leave out. The other fields are those of `MemoryMixer`,
    `MemoryAndAttention` and `MemoryAndWindow`.
    """

    def mix(self, x: Activations, stream: Stream) -> Activations:
        front, weights, momentum = self.after_persistent()
        m = self.operate(stream, **self.continued(x, stream, weights, momentum))
        front, m = (None if y is None else self.m_norm(merge_heads(y)) for y in (front, m))
        return self.attention.attend(m, stream, front)

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        answer = dense_flops(self.d_model, self.d_model) + self.recall_flops
        answers = self.persistent * answer / (1 if decoding else length)  # at P
        return (
            self.memory_flops(length, decoding=decoding) + answers + self.attention_flops(length, decoding=decoding)
        )
