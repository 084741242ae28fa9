"""Qwen3-Next: `Qwen3NextForCausalLM`, gated delta layers, every fourth a gated attention, experts with a shared one.

Its delta layers have one projection for q, k, v and the output gate, one for beta and the decay, and one convolution;
here each has its own, as in the paper. The rows of the two projections go key head by key head: q, k, v and gate of a
head and of the value heads that share it, then those of the next. Attention's q_proj holds a head's queries, then its
gate. The weights of all norms but that of a delta layer's output are around 0.
"""

from typing import Any

from seqmodels.errors import InputError
from seqmodels.interop._config import Config, expect, need, rotary, shortest_pattern, whole
from seqmodels.interop._family import Anatomy, Family, Fields, of_architecture
from seqmodels.interop._names import (
    LINEAR,
    Weight,
    channels_together,
    experts,
    fused_experts,
    gated_mlp,
    heads_together,
    linear,
    norm,
    same,
)
from seqmodels.layers import GatedDeltaNet, MoE, SoftmaxAttention

# Their words for the kinds of layers.
DELTA, FULL = "linear_attention", "full_attention"
MIXERS = {DELTA: "gated_delta_net", FULL: "softmax_attention"}
NORM = "zero_centered_rmsnorm"


def _kinds(config: Config) -> list[str]:
    layers, interval = need(config, "num_hidden_layers"), config.get("full_attention_interval", 4)
    default = [DELTA if (i + 1) % interval else FULL for i in range(layers)]
    kinds = config.get("layer_types") or default
    if len(kinds) != layers or set(kinds) - set(MIXERS):
        raise InputError(f"config.json has layer_types {kinds}; expected {layers} of {' and '.join(MIXERS)}")
    return list(kinds)


def _fields(config: Config) -> Fields:
    expect(config, "hidden_act", "silu")
    expect(config, "decoder_sparse_step", 1)
    expect(config, "mlp_only_layers", [])
    base, fraction = rotary(config, 10_000.0, 0.25)
    epsilon, kinds = config.get("rms_norm_eps", 1e-6), _kinds(config)
    found: Fields = {
        "LanguageModel": {
            "vocab_size": need(config, "vocab_size"),
            "d_model": need(config, "hidden_size"),
            "n_layers": len(kinds),
            "pattern": tuple(MIXERS[kind] for kind in shortest_pattern(kinds)),
            "mlp": MoE,
            "norm": NORM,
            "norm_eps": epsilon,
            "tie_embeddings": config.get("tie_word_embeddings", False),
        },
        "MoE": {
            "num_experts": config.get("num_experts", 512),
            "top_k": config.get("num_experts_per_tok", 10),
            "hidden_dim": config.get("moe_intermediate_size", 512),
            "renormalize": config.get("norm_topk_prob", True),
            "shared_dim": config.get("shared_expert_intermediate_size", 512),
        },
    }
    if DELTA in kinds:
        keys, values = config.get("linear_key_head_dim", 128), config.get("linear_value_head_dim", 128)
        found["GatedDeltaNet"] = {
            "num_heads": config.get("linear_num_key_heads", 16),
            "num_v_heads": config.get("linear_num_value_heads", 32),
            "head_dim": keys,
            "expand_v": values / keys,
            "conv_size": config.get("linear_conv_kernel_dim", 4),
            "norm_eps": epsilon,
        }
    if FULL in kinds:
        bias = config.get("attention_bias", False)
        found["SoftmaxAttention"] = {
            "num_heads": need(config, "num_attention_heads"),
            "num_kv_heads": config.get("num_key_value_heads", 2),
            "head_dim": config.get("head_dim", 256),
            "rope_base": base,
            "rope_fraction": fraction,
            "qk_norm": True,
            "norm": NORM,
            "norm_eps": epsilon,
            "use_gate": True,
            "qkv_bias": bias,
            "out_bias": bias,
        }
    return found


def _config(anatomy: Anatomy) -> dict[str, Any]:
    model, moe = anatomy.model, anatomy.feed_forward(MoE)
    delta, attention = anatomy.the(GatedDeltaNet), anatomy.the(SoftmaxAttention)
    if attention.rope_base is None:
        raise InputError("its attention has no positions")
    rope = {"rope_theta": whole(attention.rope_base), "partial_rotary_factor": attention.rope_fraction}
    return {
        "model_type": "qwen3_next",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "layer_types": anatomy.kinds({GatedDeltaNet: DELTA, SoftmaxAttention: FULL}),
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.channels,
        "attention_bias": attention.qkv_bias,
        "rope_parameters": {"rope_type": "default", **rope},
        **rope,
        "linear_num_key_heads": delta.num_heads,
        "linear_num_value_heads": delta.value_heads,
        "linear_key_head_dim": delta.key_dim,
        "linear_value_head_dim": delta.value_dim,
        "linear_conv_kernel_dim": delta.conv_size,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.width,
        "norm_topk_prob": moe.renormalize,
        "shared_expert_intermediate_size": moe.shared_dim,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _weights(config: Config, fused: bool) -> list[Weight]:
    fields = _fields(config)
    found = [same("model.embed_tokens.weight", "embed/embedding"), norm("model.norm", "final_norm")]
    for i, kind in enumerate(_kinds(config)):
        theirs, ours = f"model.layers.{i}", f"layers/{i}"
        found += [
            norm(f"{theirs}.input_layernorm", f"{ours}/mixer_norm"),
            norm(f"{theirs}.post_attention_layernorm", f"{ours}/mlp_norm"),
            *_moe(f"{theirs}.mlp", f"{ours}/mlp", fields["MoE"]["num_experts"], fused),
        ]
        if kind == DELTA:
            found += _delta(f"{theirs}.linear_attn", f"{ours}/mixer", fields["GatedDeltaNet"])
        else:
            found += _attention(f"{theirs}.self_attn", f"{ours}/mixer", fields["SoftmaxAttention"])
    return found


def _moe(theirs: str, ours: str, number: int, fused: bool) -> list[Weight]:
    found = [
        Weight((f"{theirs}.gate.weight",), (f"{ours}/router",), LINEAR),
        *gated_mlp(f"{theirs}.shared_expert", f"{ours}/shared_expert"),
        *linear(f"{theirs}.shared_expert_gate", f"{ours}/shared_expert_gate"),
    ]
    if fused:
        return found + fused_experts(f"{theirs}.experts", ours)
    names = ("gate_proj", "up_proj", "down_proj")
    return found + [
        experts([f"{theirs}.experts.{e}.{name}" for e in range(number)], f"{ours}/{name}") for name in names
    ]


def _delta(theirs: str, ours: str, fields: dict[str, Any]) -> list[Weight]:
    heads, sharing = fields["num_heads"], fields["num_v_heads"] // fields["num_heads"]
    keys = fields["head_dim"]
    values = sharing * round(keys * fields["expand_v"])
    widths = (keys, keys, values)  # of one key head
    projections = tuple(f"{ours}/{name}_proj/kernel" for name in "qkvg")
    convolutions = tuple(f"{ours}/{name}_conv1d/kernel" for name in "qkv")
    return [
        Weight((f"{theirs}.in_proj_qkvz.weight",), projections, heads_together(heads, (*widths, values))),
        Weight(
            (f"{theirs}.in_proj_ba.weight",),
            (f"{ours}/b_proj/kernel", f"{ours}/a_proj/kernel"),
            heads_together(heads, (sharing, sharing)),
        ),
        Weight((f"{theirs}.conv1d.weight",), convolutions, channels_together([heads * n for n in widths])),
        same(f"{theirs}.A_log", f"{ours}/A_log"),
        same(f"{theirs}.dt_bias", f"{ours}/dt_bias"),
        norm(f"{theirs}.norm", f"{ours}/o_norm"),
        *linear(f"{theirs}.out_proj", f"{ours}/o_proj"),
    ]


def _attention(theirs: str, ours: str, fields: dict[str, Any]) -> list[Weight]:
    bias = fields["qkv_bias"]
    found = [norm(f"{theirs}.{name}_norm", f"{ours}/{name}_norm") for name in "qk"]
    for name in ("k_proj", "v_proj", "o_proj"):
        found += linear(f"{theirs}.{name}", f"{ours}/{name}", bias=bias)
    both = heads_together(fields["num_heads"], (fields["head_dim"], fields["head_dim"]))
    for part, own in (("weight", "kernel"), ("bias", "bias"))[: 1 + bias]:
        found.append(Weight((f"{theirs}.q_proj.{part}",), (f"{ours}/q_proj/{own}", f"{ours}/g_proj/{own}"), both))
    return found


QWEN3_NEXT = Family(
    name="qwen3_next",
    architecture="Qwen3NextForCausalLM",
    matches=of_architecture("Qwen3NextForCausalLM"),
    fields=_fields,
    config=_config,
    weights=_weights,
    head=("lm_head.weight", "model.embed_tokens.weight"),
    # The heads that predict further tokens; this framework trains and runs the model without, as transformers does.
    left_out=(r"^mtp\.",),
)
