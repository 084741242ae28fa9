"""The neural long-term memory of Titans as a mixer of its own (Behrouz, Zhong, Mirrokni 2024, arXiv 2501.00663)."""

from seqmodels.layers._delta_mixer import head_gate
from seqmodels.layers._mixer import dense_flops, merge_heads
from seqmodels.layers._titans import MemoryMixer
from seqmodels.notation import Activations, Array
from seqmodels.ops._heads import by_head


class TitansMemory(MemoryMixer):
    """LMM: y = o_proj(o_norm(o) * silu(g_proj(x))), o what the memory answers.

    The fields are those of `MemoryMixer`.
    """

    def setup(self) -> None:
        super().setup()
        self.g_proj = self.dense(self.d_model)
        self.o_norm = self.rms_norm()

    def readout(self, o: Array, x: Activations) -> Activations:
        return self.o_proj(merge_heads(by_head(self.o_norm, o) * head_gate(self.g_proj(x), self.num_heads)))

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        gate_and_out = 2 * dense_flops(self.d_model, self.d_model)
        return self.memory_flops(length, decoding=decoding) + gate_and_out
