"""RecurrentGemma: `RecurrentGemmaForCausalLM`, Griffin's recurrent blocks and local attention, with GeGLU.

Its embedding is multiplied by sqrt(d_model) rounded to bfloat16, whatever the dtype of the model; half of a head's
channels turn with the position; the norms' weights are around 0.
"""

import math
from typing import Any

import ml_dtypes
import numpy as np

from seqmodels.errors import InputError
from seqmodels.interop._config import Config, expect, need, rotary, shortest_pattern, whole
from seqmodels.interop._family import Anatomy, Family, Fields, of_architecture
from seqmodels.interop._names import Weight, convolution, gated_mlp, linear, norm, same
from seqmodels.layers import RGLRU, GeGLU, SoftmaxAttention

MIXERS = {"recurrent": "rglru", "attention": "softmax_attention"}
GATES = ("input_gate_weight", "input_gate_bias", "recurrent_gate_weight", "recurrent_gate_bias", "recurrent_param")


def _kinds(config: Config) -> list[str]:
    """What each layer is, "recurrent" or "attention"."""
    blocks = config.get("block_types") or ("recurrent", "recurrent", "attention")
    if unknown := set(blocks) - set(MIXERS):
        raise InputError(f"config.json has a block type {min(unknown)!r}; expected recurrent or attention")
    return [blocks[i % len(blocks)] for i in range(need(config, "num_hidden_layers"))]


def _fields(config: Config) -> Fields:
    expect(config, "hidden_activation", "gelu_pytorch_tanh")
    d_model, heads = need(config, "hidden_size"), need(config, "num_attention_heads")
    base, fraction = rotary(config, 10_000.0, 0.5)
    kinds = _kinds(config)
    found: Fields = {
        "LanguageModel": {
            "vocab_size": need(config, "vocab_size"),
            "d_model": d_model,
            "n_layers": len(kinds),
            "pattern": tuple(MIXERS[kind] for kind in shortest_pattern(kinds)),
            "mlp": GeGLU,
            "norm": "zero_centered_rmsnorm",
            "norm_eps": config.get("rms_norm_eps", 1e-6),
            "tie_embeddings": config.get("tie_word_embeddings", True),
            "embedding_scale": _embedding_scale(d_model),
            "logit_cap": float(config.get("logits_soft_cap", 30.0)),
        },
        "GeGLU": {"hidden_dim": need(config, "intermediate_size") // 2, "use_bias": True},
    }
    if "recurrent" in kinds:
        found["RGLRU"] = {
            "lru_width": config.get("lru_width") or d_model,
            "num_heads": heads,
            "conv1d_width": config.get("conv1d_width", 4),
        }
    if "attention" in kinds:
        found["SoftmaxAttention"] = {
            "num_heads": heads,
            "num_kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": d_model // heads,
            "window": config.get("attention_window_size", 2048),
            "rope_base": base,
            "rope_fraction": fraction,
            "qkv_bias": config.get("attention_bias", False),
            "out_bias": True,
        }
    return found


def _embedding_scale(d_model: int) -> float:
    return float(np.asarray(math.sqrt(d_model), ml_dtypes.bfloat16))


def _config(anatomy: Anatomy) -> dict[str, Any]:
    model, mlp, recurrent = anatomy.model, anatomy.feed_forward(GeGLU), anatomy.the(RGLRU)
    kinds = anatomy.kinds({RGLRU: "recurrent", SoftmaxAttention: "attention"})
    if model.logit_cap is None:
        raise InputError("its logits have no cap")
    found = {
        "model_type": "recurrent_gemma",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": 2 * mlp.width,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": recurrent.num_heads,
        "lru_width": recurrent.width,
        "conv1d_width": recurrent.conv1d_width,
        "block_types": list(shortest_pattern(kinds)),
        "hidden_activation": "gelu_pytorch_tanh",
        "logits_soft_cap": model.logit_cap,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
    }
    if "attention" in kinds:
        attention = anatomy.the(SoftmaxAttention)
        if attention.rope_base is None or attention.window is None:
            raise InputError("its attention has no positions or no window")
        rope = {"rope_theta": whole(attention.rope_base), "partial_rotary_factor": attention.rope_fraction}
        found |= {
            "num_key_value_heads": attention.kv_heads,
            "attention_window_size": attention.window,
            "attention_bias": attention.qkv_bias,
            "rope_parameters": {"rope_type": "default", **rope},
            **rope,
        }
    return found


def _weights(config: Config, fused: bool) -> list[Weight]:
    found = [same("model.embed_tokens.weight", "embed/embedding"), norm("model.final_norm", "final_norm")]
    for i, kind in enumerate(_kinds(config)):
        theirs, ours = f"model.layers.{i}", f"layers/{i}"
        found += [
            norm(f"{theirs}.temporal_pre_norm", f"{ours}/mixer_norm"),
            norm(f"{theirs}.channel_pre_norm", f"{ours}/mlp_norm"),
            *gated_mlp(f"{theirs}.mlp_block", f"{ours}/mlp", bias=True),
        ]
        theirs, ours = f"{theirs}.temporal_block", f"{ours}/mixer"
        if kind == "recurrent":
            for name in ("linear_x", "linear_y", "linear_out"):
                found += linear(f"{theirs}.{name}", f"{ours}/{name}", bias=True)
            found += convolution(f"{theirs}.conv_1d", f"{ours}/conv_1d", bias=True)
            found += [same(f"{theirs}.rg_lru.{name}", f"{ours}/rg_lru/{name}") for name in GATES]
        else:
            for name in ("q_proj", "k_proj", "v_proj"):
                found += linear(f"{theirs}.{name}", f"{ours}/{name}", bias=config.get("attention_bias", False))
            found += linear(f"{theirs}.o_proj", f"{ours}/o_proj", bias=True)
    return found


RECURRENT_GEMMA = Family(
    name="recurrent_gemma",
    architecture="RecurrentGemmaForCausalLM",
    matches=of_architecture("RecurrentGemmaForCausalLM"),
    fields=_fields,
    config=_config,
    weights=_weights,
    head=("lm_head.weight", "model.embed_tokens.weight"),
)
