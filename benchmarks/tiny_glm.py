"""A tiny GLM-4.5, as `benchmarks.tiny_training` trains it; made once and kept."""

from pathlib import Path
from typing import Any

from benchmarks.tiny_training import Training, trained_folder

GLM4_MOE: dict[str, Any] = {
    "model_type": "glm4_moe",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "partial_rotary_factor": 0.5,
    "use_qk_norm": True,
    "attention_bias": True,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
"""`config.json`, with every option of the published ones: biases and norms of queries and keys, half of each
head rotated, a router with a correction bias in one group, a shared expert."""


def trained_glm4_moe() -> Path:
    """As `trained_folder`."""
    return trained_folder("tiny-glm4-moe", GLM4_MOE, training=Training(steps=300, batch=8))
