"""MiniMax-Text-01: `MiniMaxForCausalLM`, lightning attention with softmax attention between, and experts.

A block adds alpha r + beta f(r), r = norm(x): the residual is what the mixer sees. The rows of qkv_proj hold q, k and v
of one head, then those of the next, as in the layer here. Published files have a matrix for each expert (w1 gate, w3
up, w2 down); fused ones are read too. Of the tables of decays that a checkpoint holds as buffers none is read: they
follow from head and depth, and were rounded wherever the model was.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from seqmodels.errors import InputError
from seqmodels.interop._config import Config, expect, need, rotary, shortest_pattern, whole
from seqmodels.interop._family import Anatomy, Family, Fields, of_architecture
from seqmodels.interop._names import LINEAR, Weight, experts, fused_experts, linear, norm, same
from seqmodels.layers import MiniMaxLightningAttention, MoE, SoftmaxAttention

# Their words for the kinds of layers.
LIGHTNING, FULL = "linear_attention", "full_attention"
MIXERS = {LIGHTNING: "minimax_lightning_attention", FULL: "softmax_attention"}
BLOCK = 256  # places in the tables of decays, where the config does not say


def _kinds(config: Config) -> list[str]:
    layers = need(config, "num_hidden_layers")
    kinds = config.get("layer_types") or [(FULL, LIGHTNING)[i % 2] for i in range(layers)]
    if len(kinds) != layers or set(kinds) - set(MIXERS):
        raise InputError(f"config.json has layer_types {kinds}; expected {layers} of {' and '.join(MIXERS)}")
    return list(kinds)


def _scales(config: Config, kind: str) -> tuple[float, float]:
    part = {LIGHTNING: "linear_attn", FULL: "full_attn", "mlp": "mlp"}[kind]
    return float(config.get(f"{part}_alpha_factor", 1)), float(config.get(f"{part}_beta_factor", 1))


def _head_dim(config: Config) -> int:
    return config.get("head_dim") or need(config, "hidden_size") // need(config, "num_attention_heads")


def _fields(config: Config) -> Fields:
    expect(config, "hidden_act", "silu")
    base, fraction = rotary(config, 1_000_000.0)
    kinds, heads = _kinds(config), need(config, "num_attention_heads")
    pattern = shortest_pattern(kinds)
    found: Fields = {
        "LanguageModel": {
            "vocab_size": need(config, "vocab_size"),
            "d_model": need(config, "hidden_size"),
            "n_layers": len(kinds),
            "pattern": tuple(MIXERS[kind] for kind in pattern),
            "mlp": MoE,
            "norm_eps": config.get("rms_norm_eps", 1e-5),
            "normalized_residual": True,
            "mixer_scales": tuple(_scales(config, kind) for kind in pattern),
            "mlp_scales": _scales(config, "mlp"),
            "tie_embeddings": config.get("tie_word_embeddings", False),
        },
        "MoE": {
            "num_experts": config.get("num_local_experts", 8),
            "top_k": config.get("num_experts_per_tok", 2),
            "hidden_dim": need(config, "intermediate_size"),
        },
    }
    if LIGHTNING in kinds:
        found["MiniMaxLightningAttention"] = {"num_heads": heads, "head_dim": _head_dim(config)}
    if FULL in kinds:
        found["SoftmaxAttention"] = {
            "num_heads": heads,
            "num_kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": _head_dim(config),
            "window": config.get("sliding_window"),
            "rope_base": base,
            "rope_fraction": fraction,
        }
    return found


def _config(anatomy: Anatomy) -> dict[str, Any]:
    model, moe = anatomy.model, anatomy.feed_forward(MoE)
    lightning = anatomy.the(MiniMaxLightningAttention)
    names = {MiniMaxLightningAttention: LIGHTNING, SoftmaxAttention: FULL}
    kinds = anatomy.kinds(names)
    found = {
        "model_type": "minimax",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": moe.width,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": lightning.num_heads,
        "head_dim": lightning.channels,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "layer_types": kinds,
        "mlp_alpha_factor": model.mlp_scales[0],
        "mlp_beta_factor": model.mlp_scales[1],
    }
    for kind, (alpha, beta) in zip(kinds, anatomy.mixer_scales(), strict=True):
        part = {LIGHTNING: "linear_attn", FULL: "full_attn"}[kind]
        found |= {f"{part}_alpha_factor": alpha, f"{part}_beta_factor": beta}
    if FULL in kinds:
        attention = anatomy.the(SoftmaxAttention)
        if attention.rope_base is None:
            raise InputError("its attention has no positions")
        theta = whole(attention.rope_base)
        found |= {
            "num_key_value_heads": attention.kv_heads,
            "sliding_window": attention.window,
            "rope_parameters": {"rope_type": "default", "rope_theta": theta},
            "rope_theta": theta,
        }
    return found


def _weights(config: Config, fused: bool) -> list[Weight]:
    found = [same("model.embed_tokens.weight", "embed/embedding"), norm("model.norm", "final_norm")]
    for i, kind in enumerate(_kinds(config)):
        theirs, ours = f"model.layers.{i}", f"layers/{i}"
        found += [
            norm(f"{theirs}.input_layernorm", f"{ours}/mixer_norm"),
            norm(f"{theirs}.post_attention_layernorm", f"{ours}/mlp_norm"),
            *_moe(theirs, f"{ours}/mlp", config.get("num_local_experts", 8), fused),
        ]
        theirs, ours = f"{theirs}.self_attn", f"{ours}/mixer"
        if kind == LIGHTNING:
            found += [norm(f"{theirs}.norm", f"{ours}/norm")]
            names = ("qkv_proj", "output_gate", "out_proj")
        else:
            names = ("q_proj", "k_proj", "v_proj", "o_proj")
        for name in names:
            found += linear(f"{theirs}.{name}", f"{ours}/{name}")
    return found


def _moe(theirs: str, ours: str, number: int, fused: bool) -> list[Weight]:
    if fused:
        router = Weight((f"{theirs}.mlp.gate.weight",), (f"{ours}/router",), LINEAR)
        return [router, *fused_experts(f"{theirs}.mlp.experts", ours)]
    theirs = f"{theirs}.block_sparse_moe"
    found = [Weight((f"{theirs}.gate.weight",), (f"{ours}/router",), LINEAR)]
    for name, own in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        found.append(experts([f"{theirs}.experts.{e}.{name}" for e in range(number)], f"{ours}/{own}"))
    return found


def _decays(config: Config) -> Mapping[str, Callable[[], np.ndarray]]:
    """The tables of decays of every lightning layer: by head, by place in a block, by pair of places."""
    heads, layers, block = config["num_attention_heads"], config["num_hidden_layers"], config.get("block_size", BLOCK)
    place = np.arange(1, block + 1, dtype=np.float32)

    def slope(layer: int) -> np.ndarray:
        rates = np.float32(2 ** (-8 / heads)) ** np.arange(1, heads + 1, dtype=np.float32)
        return (rates * np.float32(1 - layer / (layers - 1 + 1e-5) + 1e-5))[:, None, None]

    def diagonal(layer: int) -> np.ndarray:
        distance = place[:, None] - place
        return np.where(distance >= 0, np.exp(-slope(layer) * np.maximum(distance, 0)), 0.0)[None]

    found: dict[str, Callable[[], np.ndarray]] = {}
    for i, kind in enumerate(_kinds(config)):
        if kind == LIGHTNING:
            found |= {
                f"model.layers.{i}.self_attn.slope_rate": lambda i=i: slope(i),
                f"model.layers.{i}.self_attn.query_decay": lambda i=i: np.exp(-slope(i) * place[:, None]),
                f"model.layers.{i}.self_attn.key_decay": lambda i=i: np.exp(-slope(i) * (block - place[:, None])),
                f"model.layers.{i}.self_attn.diagonal_decay": lambda i=i: diagonal(i),
            }
    return found


MINIMAX = Family(
    name="minimax",
    architecture="MiniMaxForCausalLM",
    matches=of_architecture("MiniMaxForCausalLM"),
    fields=_fields,
    config=_config,
    weights=_weights,
    head=("lm_head.weight", "model.embed_tokens.weight"),
    recomputed=_decays,
)
