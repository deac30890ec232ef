"""A tiny Qwen3 and a tiny Qwen3-MoE, trained as `benchmarks.tiny_training` does it; made once and kept."""

from pathlib import Path
from typing import Any

from benchmarks.tiny_training import trained_folder

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


def trained_qwen3() -> Path:
    """As `trained_folder`."""
    return trained_folder("tiny-qwen3", QWEN3)


def trained_qwen3_moe() -> Path:
    """As `trained_folder`."""
    return trained_folder("tiny-qwen3-moe", QWEN3_MOE)
