"""Sizes that make a config of any causal language model tiny, and what single families need besides."""

from __future__ import annotations

from typing import Any

SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

# One value under every name that families give it; a config takes those that it knows.
SIZES: dict[str, Any] = {
    **dict.fromkeys(
        ("vocab_size", "unpadded_vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), 128
    ),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "n_ctx", "embedding_size", "input_embedding_size"), 32
    ),
    **dict.fromkeys(
        ("word_embed_proj_dim", "emb_dim", "embedding_dim", "lru_width", "attention_hidden_size"), 32
    ),
    **dict.fromkeys(("output_embedding_size", "backbone_hidden_size"), 32),
    **dict.fromkeys(
        ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "dim_ff"), 64
    ),
    **dict.fromkeys(
        ("ffn_hidden_size", "intermediate_size_mlp", "block_ffn_dim", "d_inner", "dense_intermediate_size"),
        64,
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 4
    ),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_blocks"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(
        ("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4
    ),
    **dict.fromkeys(("swa_num_attention_heads", "attention_heads"), 4),
    **dict.fromkeys(
        ("num_key_value_heads", "swa_num_key_value_heads", "num_query_groups", "num_kv_heads"), 2
    ),
    **dict.fromkeys(
        ("head_dim", "swa_head_dim", "dim_head", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"), 16
    ),
    **dict.fromkeys(("attention_head_dim", "index_head_dim", "kv_channels"), 16),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "context_length", "max_seq_len", "model_max_length"), 128
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16
    ),
    **dict.fromkeys(
        ("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size"),
        16,
    ),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "gated_norm_rank"), 16),
    "qk_head_dim": 32,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "index_n_heads": 2,
    "index_topk": 8,
    "sliding_window": 16,
    "attention_chunk_size": 16,
    "num_nextn_predict_layers": 0,
    "type_vocab_size": 2,
    "rotary_dim": 8,
    "image_size": 32,
    "patch_size": 16,
    "encoder_hash_byte_group_vocab": 64,
    "linear_head_dim": 16,
    "linear_num_heads": 2,
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_n_groups", "n_groups"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "linear_num_heads"), 4),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    "mamba_d_ssm": 64,
    "adapter_rank": 8,
    "router_hidden_size": 16,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "o_groups": 2,
    "index_block_size": 8,
    "index_topk_blocks": 2,
    "index_local_blocks": 1,
}

_MLA = {"num_key_value_heads": 4, "qk_head_dim": 32}  # one key and value a head, of a shared latent
_HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}

OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"), _MLA),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "youtu", "hy_v4", "kimi_linear"), _MLA),
    "dots3_note_text": {**_MLA, "layer_types": ["indexed_attention"] * 4},
    "bert-generation": {"is_decoder": True},
    "xlm": {"causal": True},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "dots1": {
        "moe_intermediate_size": 16,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
    },
    "deepseek_v2": _MLA | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "cohere_compass_text": {
        "layer_types": ["full_attention"] * 4,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
        },
    },
    **{kind: {"head_dim": 16} for kind in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "helium": {"head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 16},
    "zaya": {"num_experts_per_tok": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "n_mamba_heads": 2,
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 4,
        "heads_per_ngram": 2,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
        "attention_hidden_size": 64,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "mamba_headdim": 16,
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    },
    "reformer": {"axial_pos_embds": False, "is_decoder": True, "attn_layers": ["local"] * 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
}

# Name → model type and what sets it apart from the plain form.
_NARROW = {"head_dim": 8}
_NARROW_MLA = {
    "head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
}
_GEMMA4 = {"layer_types": ["sliding_attention", "full_attention"] * 2, "global_head_dim": 32}
_LLAMA4 = {"intermediate_size_mlp": 64, "num_experts_per_tok": 1}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama narrow heads": ("llama", _NARROW),
    "afmoe narrow heads": ("afmoe", _NARROW),
    "gpt_oss narrow heads": ("gpt_oss", _NARROW),
    "gemma3 narrow heads": ("gemma3_text", _NARROW),
    "deepseek_v32 narrow heads": ("deepseek_v32", _NARROW_MLA),
    "axk2 narrow heads": ("axk2", _NARROW_MLA),
    "dots3_note narrow heads": ("dots3_note_text", _NARROW_MLA),
    "minimax_m3_vl narrow heads": ("minimax_m3_vl_text", _NARROW),
    "glm_moe_dsa shared indexers": ("glm_moe_dsa", {"indexer_types": ["full", "shared"] * 2}),
    "glm_moe_dsa own indexers": ("glm_moe_dsa", {"indexer_types": ["full"] * 4}),
    "hy_v4 own indexers": ("hy_v4", {"indexer_types": ["full"] * 4}),
    "hy_v4 shared indexers": ("hy_v4", {"indexer_types": ["full", "full", "shared", "shared"]}),
    "gemma4 head_dim by layer": ("gemma4_text", {**_GEMMA4, "num_kv_shared_layers": 0}),
    "gemma4 shared keys and values": ("gemma4_text", {**_GEMMA4, "num_kv_shared_layers": 2}),
    "gemma4 mixture": (
        "gemma4_text",
        {
            **_GEMMA4,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 16,
        },
    ),
    "gemma3n own keys and values": ("gemma3n_text", {"num_kv_shared_layers": 0}),
    "llama4 every layer a mixture": ("llama4_text", {**_LLAMA4, "interleave_moe_layer_step": 1}),
    "llama4 every second layer": ("llama4_text", {**_LLAMA4, "interleave_moe_layer_step": 2}),
    "rwkv of 13 layers": ("rwkv", {"num_hidden_layers": 13}),
    "qwen3_next hybrid": ("qwen3_next", _HYBRID),
    "granitemoehybrid hybrid": ("granitemoehybrid", _HYBRID),
    "bamba hybrid": ("bamba", {"attn_layer_indices": [1, 3]}),
    "qwen2 some sliding": ("qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
}
