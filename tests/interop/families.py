"""A small config of every family, with everything in it that could go wrong: an odd depth, groups, grouped heads."""

from typing import Any

VOCABULARY = 61
_LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MAMBA2 = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_heads": 4,
    "head_dim": 8,
    "state_size": 8,
    "chunk_size": 8,
}
# The root of 24 is no bfloat16.
_GEMMA = {
    **_LLAMA,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 5,
    "lru_width": 32,
    "attention_window_size": 7,
    "num_key_value_heads": 1,
}
_MINIMAX = {
    **_LLAMA,
    "num_hidden_layers": 5,
    "head_dim": 8,
    "num_local_experts": 4,
    "block_size": 8,
    "full_attn_alpha_factor": 1.5,
    "full_attn_beta_factor": 0.75,
    "linear_attn_alpha_factor": 1.25,
    "linear_attn_beta_factor": 0.5,
    "mlp_alpha_factor": 2.0,
    "mlp_beta_factor": 0.25,
}
_QWEN = {
    **_LLAMA,
    "num_hidden_layers": 5,
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
}

# Name -> family, architecture, config.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mamba2": ("mamba2", "Mamba2ForCausalLM", {**_MAMBA2, "n_groups": 1, "tie_word_embeddings": True}),
    "mamba2, 2 groups, untied, bias, limits": (
        "mamba2",
        "Mamba2ForCausalLM",
        {**_MAMBA2, "n_groups": 2, "tie_word_embeddings": False, "use_bias": True, "time_step_limit": [0.01, 0.5]},
    ),
    "llama": ("llama", "LlamaForCausalLM", {**_LLAMA, "tie_word_embeddings": True}),
    "llama, untied, bias": (
        "llama",
        "LlamaForCausalLM",
        {**_LLAMA, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True, "head_dim": 8},
    ),
    "recurrent_gemma": ("recurrent_gemma", "RecurrentGemmaForCausalLM", _GEMMA),
    "recurrent_gemma, untied": (
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        {**_GEMMA, "tie_word_embeddings": False, "attention_bias": True},
    ),
    "minimax": ("minimax", "MiniMaxForCausalLM", {**_MINIMAX, "tie_word_embeddings": False}),
    "minimax, tied, layers in threes": (
        "minimax",
        "MiniMaxForCausalLM",
        {
            **_MINIMAX,
            "tie_word_embeddings": True,
            "layer_types": [("full_attention" if i % 3 == 2 else "linear_attention") for i in range(5)],
        },
    ),
    "qwen3_next": ("qwen3_next", "Qwen3NextForCausalLM", {**_QWEN, "tie_word_embeddings": False}),
    "qwen3_next, tied, bias": (
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {**_QWEN, "tie_word_embeddings": True, "attention_bias": True, "norm_topk_prob": False},
    ),
}
