"""Values of the tiny models that `zoo.py` builds: the sizes all share, and what single ones need.

`GENERIC` goes to every field of that name that a text config declares, `TOWER` to a vision or audio
config beside it. `SPECIAL` adds what one architecture needs on top. None of the tables says which
architectures exist: one that is unknown here is built from the generic values.
"""

from dataclasses import dataclass, field
from typing import Any

LAYERS = 4
VOCAB = 128
WIDE = 0.15  # at the usual 0.02 the logits are too flat to tell a right cache from a wrong one

GENERIC: dict[str, Any] = {
    # sizes
    "vocab_size": VOCAB,
    "unpadded_vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_layers": LAYERS,
    "max_position_embeddings": 512,
    "initializer_range": WIDE,
    "init_std": WIDE,
    # attention
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "sliding_window_size": 8,
    "attention_chunk_size": 8,
    # multi-head latent attention
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    # sparse attention with an indexer: its scores tie at zero, so the selection is well-defined
    # only where it takes all tokens
    "index_topk": 64,
    "index_head_dim": 16,
    "index_n_heads": 2,
    # linear attention
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_conv_kernel_dim": 4,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "mamba_chunk_size": 16,
    "ssm_state_size": 8,
    "chunk_size": 16,
    # experts
    "moe_intermediate_size": 32,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    # tokens and heads that a test does not want
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "num_mtp_layers": 0,
    "num_nextn_predict_layers": 0,
}

TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "image_size": 16,
}


@dataclass(frozen=True)
class Special:
    """Extra fields of the text config and of the config around it."""

    text: dict[str, Any] = field(default_factory=dict)
    outer: dict[str, Any] = field(default_factory=dict)


ALTERNATING = ["sliding_attention", "full_attention"] * 2
DENSE_FIRST = ["dense"] + ["sparse"] * (LAYERS - 1)
SAM = {
    "hidden_size": 32,
    "output_channels": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
    "mlp_dim": 32,
    "global_attn_indexes": (0,),
    "downsample_channels": [32, 32],
}
OCR_VISION = {
    "sam_config": SAM,
    "encoder_config": {**TOWER, "vocab_size": 64, "image_size": 64, "patch_size": 16},
}
PIXTRAL = {"model_type": "pixtral", **TOWER}


def _rope(**fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, **fields}}


SPECIAL: dict[str, Special] = {
    "cohere2_moe": Special({"logit_scale": 1.0}),
    "dbrx": Special(
        {
            "d_model": 64,
            "n_heads": 4,
            "n_layers": LAYERS,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
            "ffn_config": {"moe_num_experts": 8, "moe_top_k": 2, "ffn_hidden_size": 32},
        }
    ),
    "deepseek_ocr2": Special(
        {"head_dim": None, "mlp_layer_types": DENSE_FIRST}, {"vision_config": OCR_VISION}
    ),
    "deepseek_v4": Special(
        {
            "o_groups": 2,
            "o_lora_rank": 8,
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        }
    ),
    "diffusion_gemma": Special(
        {"layer_types": ALTERNATING, "global_head_dim": 32},
        {
            "canvas_length": 8,
            "vision_config": {
                "model_type": "gemma4_vision",
                **TOWER,
                "position_embedding_size": 64,
            },
        },
    ),
    "doge": Special({"is_moe": True, "num_experts": 16}),  # product keys: a square
    "ernie4_5_vl_moe": Special(
        {
            "moe_intermediate_size": [32, 32],  # text experts, vision experts
            "mlp_layer_types": DENSE_FIRST,
            **_rope(mrope_section=[2, 2, 4]),
        }
    ),
    "gemma4": Special(
        {
            "enable_moe_block": True,
            "layer_types": ALTERNATING,
            "global_head_dim": 32,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
        }
    ),
    "glm4v_moe": Special(_rope(partial_rotary_factor=0.5, mrope_section=[1, 1, 2])),
    # index_kpool divides index_topk; no rotary part, so V is empty
    "glm5_next": Special({"index_kpool": 4, "qk_rope_head_dim": 0, "head_dim": 0}),
    "granitemoehybrid": Special({"layer_types": ["mamba", "attention"] * 2}),
    "hy_v4_vl": Special(_rope(mrope_section=[1, 1, 2])),
    "inkling": Special(
        {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_head_dim": 16,
            "logits_mup_width_multiplier": 1.0,
            "mlp_layer_types": DENSE_FIRST,
        }
    ),
    "inkling2": Special(
        {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16}
    ),
    "jamba": Special({"attn_layer_period": 2, "attn_layer_offset": 1}),
    "laguna": Special({"layer_types": ALTERNATING}),
    "lfm2_moe": Special({"layer_types": ["conv", "full_attention"] * 2}),
    "mellum": Special({"layer_types": ALTERNATING}),
    "minimax_m3_vl": Special(
        {
            "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
            "index_block_size": 4,
            "index_topk_blocks": 16,
            "rotary_dim": 8,
            "dense_intermediate_size": 96,
        }
    ),
    "mistral_large4": Special(outer={"vision_config": PIXTRAL}),
    "muse_spark": Special(
        {"layer_types": ALTERNATING, "moe_hidden_size": 32, "output_multiplier": 1.0},
        {
            "out_hidden_size": 64,
            "projector_hidden_size": 32,
            "audio_config": {
                "patch_sizes": (4, 2),
                "hidden_sizes": (16, 32),
                "depths": (1, 1),
                "num_hidden_layers": 2,
                "out_hidden_size": 64,
            },
        },
    ),
    "nllb_moe": Special(
        {
            "d_model": 64,
            "encoder_layers": 2,
            "decoder_layers": LAYERS,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_sparse_step": 2,
            "decoder_sparse_step": 2,
            "decoder_start_token_id": 2,
        }
    ),
    "qwen3_omni_moe": Special(
        _rope(mrope_section=[2, 3, 3], mrope_interleaved=True),
        {
            "vision_start_token_id": 125,  # read by the model, not declared by the config
            "audio_config": {
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "d_model": 32,
                "output_dim": 64,
                "downsample_hidden_size": 16,
            },
            "vision_config": {
                **TOWER,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": (0,),
            },
        },
    ),
    "qwen3_omni_moe_talker": Special(
        {
            "shared_expert_intermediate_size": 32,  # read by the model, not declared by the config
            **_rope(mrope_section=[2, 3, 3], mrope_interleaved=True),
        },
        {
            "spatial_merge_size": 2,
            "thinker_hidden_size": 64,
            "num_code_groups": 3,
            "code_predictor_config": {
                "hidden_size": 64,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "vocab_size": VOCAB,
                "num_code_groups": 3,
            },
        },
    ),
    "qwen4_exp": Special(
        {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 64,
            "indexer_compress_ratio": 4,
            "hc_lowrank": 16,
            "ple_layer_ids": [1],
            "ngram_vocab_size_base": 64,
            "make_ngram_vocab_size_divisible_by": 1,
            "split_ngram_parts": 1,
        }
    ),
    "step3p7": Special({"layer_types": ALTERNATING, "sliding_window": 8}),
    "switch_transformers": Special(
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 64,
            "num_decoder_layers": LAYERS,
            "num_heads": 4,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 2,
            "decoder_start_token_id": 0,
        }
    ),
    "unlimited_ocr": Special(
        {"head_dim": None, "num_key_value_heads": 4}, {"vision_config": OCR_VISION}
    ),
    "zaya": Special({"num_experts_per_tok": 1}),
}
