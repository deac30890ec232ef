"""A tiny DeepSeek-V3, trained on text that ships with Python, with outlier channels; made once and kept.

The architecture is DeepSeek-V3's with every option of the published config: low-rank queries, YaRN rope with
its `mscale`, one dense layer first, a sigmoid router with a correction bias and grouped top-k, a shared
expert. `benchmarks.tiny_training` trains it, about five minutes on two cores.

A model this small grows no outlier channels of its own, which are what quantization of large models is about,
so `benchmarks.outliers` adds them without changing the function. Their strength was chosen for peers, not
for msquant: so that rounding to nearest and llm-compressor's SmoothQuant come near the relative MSEs of the
logits that are known of them on such models, 4.7e-4 and 3.2e-4; `benchmarks.dynamic_int8` has what they are
here.

Measured: perplexity 62.0 on 8 x 512 held-out tokens, of a vocabulary of 1,024; six minutes on two cores.
"""

from pathlib import Path
from typing import Any

from benchmarks.tiny_training import Training, trained_folder

ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 128,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 96,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    # What the published config names and transformers 4 does not read.
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}
"""`config.json` of the model."""

KIMI_K2: dict[str, Any] = ARCHITECTURE | {
    "moe_intermediate_size": 96,
    "n_routed_experts": 32,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.827,
    "rope_theta": 50000.0,
}
"""Of a Kimi-K2 by its shape: more and smaller experts in one group. It is called `deepseek_v3`, which it is:
transformers 4.57.1 knows no `kimi_k2`."""


def trained_kimi_k2() -> Path:
    """As `trained_folder`."""
    return trained_folder("tiny-kimi-k2", KIMI_K2, training=Training(steps=300, batch=8))


def trained_model(folder: Path | None = None) -> Path:
    """As `trained_folder`."""
    return trained_folder("tiny-deepseek", ARCHITECTURE, folder)
