"""Every mixer, by name: the one place that lists them.

A configuration names mixers by the keys of this table, and the conformance suite runs over its rows. To add one: an
operator (or an existing one), a layer, a file in configs/mixers, and a line here.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from seqmodels.errors import InputError, nearest
from seqmodels.layers._mixer import Mixer
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
from seqmodels.layers.mlstm import MLSTM
from seqmodels.layers.retention import Retention
from seqmodels.layers.rglru import RGLRU
from seqmodels.layers.rwkv6 import RWKV6
from seqmodels.layers.softmax_attention import SoftmaxAttention
from seqmodels.layers.titans_mac import TitansMAC
from seqmodels.layers.titans_mag import TitansMAG
from seqmodels.layers.titans_mal import TitansMAL
from seqmodels.layers.titans_memory import TitansMemory
from seqmodels.layers.ttt import TTT
from seqmodels.ops._op import SeqOp
from seqmodels.ops.aaren import AAREN
from seqmodels.ops.delta_rule import DELTA_RULE
from seqmodels.ops.linear_attention import LINEAR_ATTENTION
from seqmodels.ops.memory_as_context import MEMORY_AS_CONTEXT
from seqmodels.ops.mlstm import MLSTM as MLSTM_OP
from seqmodels.ops.neural_memory import NEURAL_MEMORY
from seqmodels.ops.rglru import RGLRU as RGLRU_OP
from seqmodels.ops.short_conv import SHORT_CONV
from seqmodels.ops.softmax_attention import SOFTMAX_ATTENTION
from seqmodels.ops.ssd import SSD
from seqmodels.ops.wkv6 import WKV6


class Entry(NamedTuple):
    """A mixer: its operator and its layer. A layer takes `d_model` and its own hyper-parameters."""

    op: SeqOp
    layer: type[Mixer]


MIXERS: dict[str, Entry] = {
    "linear_attention": Entry(LINEAR_ATTENTION, LinearAttention),
    "based": Entry(LINEAR_ATTENTION, Based),
    "retention": Entry(LINEAR_ATTENTION, Retention),
    "lightning_attention": Entry(LINEAR_ATTENTION, LightningAttention),
    "minimax_lightning_attention": Entry(LINEAR_ATTENTION, MiniMaxLightningAttention),
    "mamba2": Entry(SSD, Mamba2),
    "gated_linear_attention": Entry(LINEAR_ATTENTION, GatedLinearAttention),
    "delta_net": Entry(DELTA_RULE, DeltaNet),
    "gated_delta_net": Entry(DELTA_RULE, GatedDeltaNet),
    "kimi_delta_attention": Entry(DELTA_RULE, KimiDeltaAttention),
    "aaren": Entry(AAREN, Aaren),
    "rglru": Entry(RGLRU_OP, RGLRU),
    "mlstm": Entry(MLSTM_OP, MLSTM),
    "hgrn2": Entry(LINEAR_ATTENTION, HGRN2),
    "rwkv6": Entry(WKV6, RWKV6),
    "titans_memory": Entry(NEURAL_MEMORY, TitansMemory),
    "titans_mac": Entry(MEMORY_AS_CONTEXT, TitansMAC),
    "titans_mag": Entry(NEURAL_MEMORY, TitansMAG),
    "titans_mal": Entry(NEURAL_MEMORY, TitansMAL),
    "ttt": Entry(NEURAL_MEMORY, TTT),
    "softmax_attention": Entry(SOFTMAX_ATTENTION, SoftmaxAttention),
}

# Operators that layers use beside their mixer's own.
OTHER_OPS: tuple[SeqOp, ...] = (SHORT_CONV,)


def mixer(name: str) -> Callable[..., Mixer]:
    """The layer class of a mixer's name; an unknown name is an error that names the closest."""
    if name not in MIXERS:
        raise InputError(f"mixer {name!r} does not exist; {nearest(name, MIXERS)}")
    return MIXERS[name].layer


def ops(mixers: Mapping[str, Entry] = MIXERS) -> dict[str, SeqOp]:
    """Every operator once, by name."""
    found = [entry.op for entry in mixers.values()] + list(OTHER_OPS)
    return {op.name: op for op in found}
