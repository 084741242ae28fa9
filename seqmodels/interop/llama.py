"""Llama: `LlamaForCausalLM`, softmax attention with rotary positions (half against half, as here) and SwiGLU."""

from typing import Any

from seqmodels.errors import InputError
from seqmodels.interop._config import Config, expect, need, rotary, whole
from seqmodels.interop._family import Anatomy, Family, Fields, of_architecture
from seqmodels.interop._names import Weight, gated_mlp, linear, norm, same
from seqmodels.layers import SoftmaxAttention, SwiGLU


def _fields(config: Config) -> Fields:
    expect(config, "hidden_act", "silu")
    bias = config.get("attention_bias", False)
    base, fraction = rotary(config, 10_000.0)
    epsilon = config.get("rms_norm_eps", 1e-6)
    return {
        "LanguageModel": {
            "vocab_size": need(config, "vocab_size"),
            "d_model": need(config, "hidden_size"),
            "n_layers": need(config, "num_hidden_layers"),
            "pattern": ("softmax_attention",),
            "mlp": SwiGLU,
            "norm_eps": epsilon,
            "tie_embeddings": config.get("tie_word_embeddings", False),
        },
        "SoftmaxAttention": {
            "num_heads": need(config, "num_attention_heads"),
            "num_kv_heads": config.get("num_key_value_heads"),
            "head_dim": config.get("head_dim"),
            "rope_base": base,
            "rope_fraction": fraction,
            "qkv_bias": bias,
            "out_bias": bias,
        },
        "SwiGLU": {"hidden_dim": need(config, "intermediate_size"), "use_bias": config.get("mlp_bias", False)},
    }


def _config(anatomy: Anatomy) -> dict[str, Any]:
    model, attention, mlp = anatomy.model, anatomy.the(SoftmaxAttention), anatomy.feed_forward(SwiGLU)
    if attention.rope_base is None:
        raise InputError("its attention has no positions")
    return {
        "model_type": "llama",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": mlp.width,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.channels,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": attention.qkv_bias,
        "mlp_bias": mlp.use_bias,
        "rope_parameters": {"rope_type": "default", "rope_theta": whole(attention.rope_base)},
        "rope_theta": whole(attention.rope_base),
    }


def _weights(config: Config, fused: bool) -> list[Weight]:
    found = [same("model.embed_tokens.weight", "embed/embedding"), norm("model.norm", "final_norm")]
    bias = config.get("attention_bias", False)
    for i in range(config["num_hidden_layers"]):
        theirs, ours = f"model.layers.{i}", f"layers/{i}"
        found += [
            norm(f"{theirs}.input_layernorm", f"{ours}/mixer_norm"),
            norm(f"{theirs}.post_attention_layernorm", f"{ours}/mlp_norm"),
            *gated_mlp(f"{theirs}.mlp", f"{ours}/mlp", bias=config.get("mlp_bias", False)),
        ]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found += linear(f"{theirs}.self_attn.{name}", f"{ours}/mixer/{name}", bias=bias)
    return found


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    matches=of_architecture("LlamaForCausalLM"),
    fields=_fields,
    config=_config,
    weights=_weights,
    head=("lm_head.weight", "model.embed_tokens.weight"),
    # Files of old versions hold the angles, which follow from the config.
    left_out=(r"\.rotary_emb\.inv_freq$",),
)
