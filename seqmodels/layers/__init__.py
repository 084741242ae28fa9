"""Flax layers: parameters and projections around an operator. One file per mixer.

    layer = GatedLinearAttention(d_model=512)
    variables = layer.init(jax.random.key(0), x)                    # x: [batch, time, 512]
    y, state = layer.apply(variables, x)                            # a whole sequence, or its first part
    y, state = layer.apply(variables, x_next, state)                # what follows; one token is a decode step
"""

from seqmodels.layers._mixer import Mixer, Stream
from seqmodels.layers.aaren import Aaren
from seqmodels.layers.based import Based
from seqmodels.layers.delta_net import DeltaNet
from seqmodels.layers.gated_delta_net import GatedDeltaNet
from seqmodels.layers.gated_linear_attention import GatedLinearAttention
from seqmodels.layers.hgrn2 import HGRN2
from seqmodels.layers.kimi_delta_attention import KimiDeltaAttention
from seqmodels.layers.lightning_attention import LightningAttention
from seqmodels.layers.linear_attention import LinearAttention
from seqmodels.layers.mamba2 import Mamba2
from seqmodels.layers.minimax_lightning_attention import MiniMaxLightningAttention
from seqmodels.layers.mlp import GLU, SGLU, GeGLU, SwiGLU
from seqmodels.layers.mlstm import MLSTM
from seqmodels.layers.moe import MoE
from seqmodels.layers.norms import make_norm
from seqmodels.layers.retention import Retention
from seqmodels.layers.rglru import RGLRU
from seqmodels.layers.rwkv6 import RWKV6
from seqmodels.layers.softmax_attention import SoftmaxAttention
from seqmodels.layers.titans_mac import TitansMAC
from seqmodels.layers.titans_mag import TitansMAG
from seqmodels.layers.titans_mal import TitansMAL
from seqmodels.layers.titans_memory import TitansMemory
from seqmodels.layers.ttt import TTT

__all__ = [
    "GLU",
    "HGRN2",
    "MLSTM",
    "RGLRU",
    "RWKV6",
    "SGLU",
    "TTT",
    "Aaren",
    "Based",
    "DeltaNet",
    "GatedDeltaNet",
    "GatedLinearAttention",
    "GeGLU",
    "KimiDeltaAttention",
    "LightningAttention",
    "LinearAttention",
    "Mamba2",
    "MiniMaxLightningAttention",
    "Mixer",
    "MoE",
    "Retention",
    "SoftmaxAttention",
    "Stream",
    "SwiGLU",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
    "TitansMemory",
    "make_norm",
]
