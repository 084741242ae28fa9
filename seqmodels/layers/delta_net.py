"""DeltaNet: linear attention that corrects what it stored (Schlag et al. 2021, arXiv 2102.11174).

As a layer of language models: Yang et al. 2024, arXiv 2406.06484.
"""

from seqmodels.layers._delta_mixer import DeltaMixer, head_gate
from seqmodels.layers._mixer import dense_flops
from seqmodels.notation import Activations, Array


class DeltaNet(DeltaMixer):
    """q, k = unit(silu(conv(x W))), v = silu(conv(x W)), beta = sigmoid(x W); o_proj(norm(o)).

    S_t = S_{t-1} + beta_t k_t^T (v_t - k_t S_{t-1});   o_t = q_t S_t / sqrt(head_dim)

    use_gate   multiply the normalised output by silu(x W)
    and the fields of `DeltaMixer`: num_heads, head_dim, num_v_heads, expand_v, conv_size, allow_neg_eigval, norm_eps.

    Parameters carry the names of flash-linear-attention's layer.
    """

    use_gate: bool = False

    def setup(self) -> None:
        super().setup()
        if self.use_gate:
            self.g_proj = self.dense(self.value_heads * self.value_dim)

    def output_gate(self, x: Activations) -> Array | None:
        return head_gate(self.g_proj(x), self.value_heads) if self.use_gate else None

    def flops_per_token(self, length: int, *, decoding: bool = False) -> float:
        gate = dense_flops(self.d_model, self.value_heads * self.value_dim) if self.use_gate else 0
        return super().flops_per_token(length, decoding=decoding) + gate
