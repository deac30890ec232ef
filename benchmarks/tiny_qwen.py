"""A tiny Qwen3, Qwen3-MoE and Qwen3-Next, as `benchmarks.tiny_training` trains them; made once and kept."""

from pathlib import Path
from typing import Any

from benchmarks.tiny_training import Training, trained_folder

QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""`config.json` of the dense model."""

QWEN3_MOE: dict[str, Any] = QWEN3 | {
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 128,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "output_router_logits": True,
    "router_aux_loss_coef": 0.01,
}
"""Of the mixture of experts; the auxiliary loss of its paper balances the router."""


QWEN3_NEXT: dict[str, Any] = QWEN3_MOE | {
    "model_type": "qwen3_next",
    "hidden_size": 192,
    "intermediate_size": 384,
    "full_attention_interval": 4,
    "num_attention_heads": 4,
    "head_dim": 64,
    "partial_rotary_factor": 0.25,
    "linear_conv_kernel_dim": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 96,
}
"""Of three layers with the gated delta rule before one with gated attention, as published."""


def trained_qwen3() -> Path:
    """As `trained_folder`."""
    return trained_folder("tiny-qwen3", QWEN3)


def trained_qwen3_moe() -> Path:
    """As `trained_folder`."""
    return trained_folder("tiny-qwen3-moe", QWEN3_MOE)


def trained_qwen3_next() -> Path:
    """As `trained_folder`."""
    return trained_folder("tiny-qwen3-next", QWEN3_NEXT, training=Training(steps=300, batch=8))
