"""Mamba-2: `Mamba2ForCausalLM`, and the checkpoints of its authors (`state-spaces/mamba2-*`).

The two have the same weights but for the name of the embedding. Both keep in_proj's rows in the order z, x, B, C, dt,
as the layer here does, and head h uses group h // (heads / groups).
"""

import math
from typing import Any

from seqmodels.interop._config import Config, expect, need, number
from seqmodels.interop._family import Anatomy, Family, Fields, of_architecture
from seqmodels.interop._names import Weight, convolution, linear, norm, same
from seqmodels.layers import Mamba2

NO_LIMIT = (0.0, math.inf)


def _limit(key: str, mixer: Mamba2) -> dict[str, Any]:
    """The range of the time steps, where it is one: JSON has no infinity."""
    return {} if tuple(mixer.dt_limit) == NO_LIMIT else {key: list(mixer.dt_limit)}


def _weights(embedding: str, layers: int, *, bias: bool, conv_bias: bool) -> list[Weight]:
    found = [same(embedding, "embed/embedding"), norm("backbone.norm_f", "final_norm")]
    for i in range(layers):
        theirs, ours = f"backbone.layers.{i}", f"layers/{i}"
        found += [
            norm(f"{theirs}.norm", f"{ours}/mixer_norm"),
            norm(f"{theirs}.mixer.norm", f"{ours}/mixer/norm"),
            *linear(f"{theirs}.mixer.in_proj", f"{ours}/mixer/in_proj", bias=bias),
            *linear(f"{theirs}.mixer.out_proj", f"{ours}/mixer/out_proj", bias=bias),
            *convolution(f"{theirs}.mixer.conv1d", f"{ours}/mixer/conv1d", bias=conv_bias),
            *(same(f"{theirs}.mixer.{name}", f"{ours}/mixer/{name}") for name in ("A_log", "D", "dt_bias")),
        ]
    return found


def _hf_fields(config: Config) -> Fields:
    expect(config, "hidden_act", "silu")
    epsilon = config.get("layer_norm_epsilon", 1e-5)
    low, high = map(number, config.get("time_step_limit") or NO_LIMIT)
    return {
        "LanguageModel": {
            "vocab_size": need(config, "vocab_size"),
            "d_model": need(config, "hidden_size"),
            "n_layers": need(config, "num_hidden_layers"),
            "pattern": ("mamba2",),
            "mlp": None,
            "norm_eps": epsilon,
            "tie_embeddings": config.get("tie_word_embeddings", False),
        },
        "Mamba2": {
            "d_state": config.get("state_size", 128),
            "d_conv": config.get("conv_kernel", 4),
            "expand": config.get("expand", 2),
            "head_dim": config.get("head_dim", 64),
            "n_groups": config.get("n_groups", 8),
            "use_bias": config.get("use_bias", False),
            "conv_bias": config.get("use_conv_bias", True),
            "dt_limit": (low, high),
            "norm_eps": epsilon,
        },
    }


def _hf_config(anatomy: Anatomy) -> dict[str, Any]:
    model, mixer = anatomy.model, anatomy.the(Mamba2)
    return {
        "model_type": "mamba2",
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.n_layers,
        "tie_word_embeddings": model.tie_embeddings,
        "layer_norm_epsilon": model.norm_eps,
        "hidden_act": "silu",
        "num_heads": mixer.num_heads,
        "head_dim": mixer.d_inner // mixer.num_heads,
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "expand": mixer.expand,
        "n_groups": mixer.n_groups,
        "use_bias": mixer.use_bias,
        "use_conv_bias": mixer.conv_bias,
    } | _limit("time_step_limit", mixer)


def _hf_weights(config: Config, fused: bool) -> list[Weight]:
    return _weights(
        "backbone.embeddings.weight",
        config["num_hidden_layers"],
        bias=config.get("use_bias", False),
        conv_bias=config.get("use_conv_bias", True),
    )


def _original_fields(config: Config) -> Fields:
    ssm = need(config, "ssm_cfg")
    expect(ssm, "layer", "Mamba2", default="Mamba1")
    for key, only in (("d_intermediate", 0), ("attn_layer_idx", [])):
        expect(config, key, only)
    for key, only in (("rmsnorm", True), ("D_has_hdim", False), ("d_ssm", None)):
        expect(ssm, key, only)
    expect(config, "rms_norm", True)
    multiple = config.get("pad_vocab_size_multiple", 8)
    low, high = map(number, ssm.get("dt_limit") or NO_LIMIT)
    return {
        "LanguageModel": {
            "vocab_size": -(-need(config, "vocab_size") // multiple) * multiple,
            "d_model": need(config, "d_model"),
            "n_layers": need(config, "n_layer"),
            "pattern": ("mamba2",),
            "mlp": None,
            "tie_embeddings": config.get("tie_embeddings", True),
        },
        "Mamba2": {
            "d_state": ssm.get("d_state", 128),
            "d_conv": ssm.get("d_conv", 4),
            "expand": ssm.get("expand", 2),
            "head_dim": ssm.get("headdim", 64),
            "n_groups": ssm.get("ngroups", 1),
            "norm_before_gate": ssm.get("norm_before_gate", False),
            "use_bias": ssm.get("bias", False),
            "conv_bias": ssm.get("conv_bias", True),
            "dt_limit": (low, high),
        },
    }


def _original_config(anatomy: Anatomy) -> dict[str, Any]:
    model, mixer = anatomy.model, anatomy.the(Mamba2)
    return {
        "d_model": model.d_model,
        "d_intermediate": 0,
        "n_layer": model.n_layers,
        "vocab_size": model.vocab_size,
        "ssm_cfg": {
            "layer": "Mamba2",
            "d_state": mixer.d_state,
            "d_conv": mixer.d_conv,
            "expand": mixer.expand,
            "headdim": mixer.d_inner // mixer.num_heads,
            "ngroups": mixer.n_groups,
            "norm_before_gate": mixer.norm_before_gate,
            "bias": mixer.use_bias,
            "conv_bias": mixer.conv_bias,
        }
        | _limit("dt_limit", mixer),
        "attn_layer_idx": [],
        "attn_cfg": {},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,
        "tie_embeddings": model.tie_embeddings,
    }


def _original_weights(config: Config, fused: bool) -> list[Weight]:
    ssm = config["ssm_cfg"]
    return _weights(
        "backbone.embedding.weight",
        config["n_layer"],
        bias=ssm.get("bias", False),
        conv_bias=ssm.get("conv_bias", True),
    )


MAMBA2 = Family(
    name="mamba2",
    architecture="Mamba2ForCausalLM",
    matches=of_architecture("Mamba2ForCausalLM"),
    fields=_hf_fields,
    config=_hf_config,
    weights=_hf_weights,
    head=("lm_head.weight", "backbone.embeddings.weight"),
)

# Its loader wants the head beside the embedding, tied or not.
MAMBA2_ORIGINAL = Family(
    name="mamba2_original",
    architecture="MambaLMHeadModel",
    matches=lambda config: "ssm_cfg" in config,
    fields=_original_fields,
    config=_original_config,
    weights=_original_weights,
    head=("lm_head.weight", "backbone.embedding.weight"),
    writes_tied_head=True,
)
