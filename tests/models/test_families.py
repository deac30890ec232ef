"""Every family against transformers on torch, with what its real config switches on."""

import inspect
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.models.config_json import read_config
from tests.fixtures import tiny_model
from tests.fixtures.tiny_families import SETTINGS, write_tiny
from tests.models.test_network import TOLERANCE, decode, our_model, random_tokens, torch_model

YARN = SETTINGS["deepseek_v3"]["rope_scaling"]
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in SETTINGS},
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3-biases-yarn": (
        "qwen3",
        {
            "attention_bias": True,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
    "qwen3_moe-every-second": ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [], "layers": 4}),
    "qwen3_moe-unnormalized": ("qwen3_moe", {"norm_topk_prob": False, "mlp_only_layers": []}),
    "qwen3_next-as-published": (
        "qwen3_next",
        {"full_attention_interval": 4, "mlp_only_layers": [], "layers": 4},
    ),
    "qwen3_next-kinds": (
        "qwen3_next",
        {
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "layers": 3,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [],
            "norm_topk_prob": False,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "linear_num_key_heads": 4,
            "linear_conv_kernel_dim": 2,
            "partial_rotary_factor": 0.5,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
    ),
    "deepseek_v2-biases": (
        "deepseek_v2",
        {"q_lora_rank": 48, "attention_bias": True, "mlp_bias": True, "rope_scaling": None},
    ),
    "deepseek_v3-full-rank-queries": ("deepseek_v3", {"q_lora_rank": None}),
    "deepseek_v3-halves": ("deepseek_v3", {"rope_interleave": False}),
    "deepseek_v3-one-group": ("deepseek_v3", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    "deepseek_v3-two-mscales": ("deepseek_v3", {"rope_scaling": YARN | {"mscale_all_dim": 0.5}}),
    "deepseek_v3-plain-rope": ("deepseek_v3", {"rope_scaling": None, "attention_bias": True}),
    "glm_moe_dsa-yarn": ("glm_moe_dsa", {"rope_scaling": YARN}),
    "glm4-no-biases-tied": ("glm4", {"attention_bias": False, "tie_word_embeddings": True}),
    "glm4_moe-air": ("glm4_moe", {"use_qk_norm": False, "routed_scaling_factor": 1.0}),
    "glm4_moe-groups": ("glm4_moe", {"n_group": 4, "topk_group": 2, "attention_bias": False}),
    "glm4_moe-yarn": (
        "glm4_moe",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "glm4_moe-all-channels": ("glm4_moe", {"partial_rotary_factor": 1.0, "n_shared_experts": 2}),
    "deepseek_v3-all-experts": ("deepseek_v3", {"first_k_dense_replace": 0, "layers": 3}),
}


@pytest.fixture(autouse=True)
def _no_outliers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outlier channels amplify float32 rounding beyond the tolerance, in torch as well."""
    monkeypatch.setattr(tiny_model, "OUTLIER_FACTOR", 1.0)


def write(case: str, folder: Path) -> Path:
    model_type, settings = CASES[case]
    return write_tiny(folder, model_type, **settings)


def reference(folder: Path) -> Any:
    """The model of transformers, with DeepSeek's own softmax scale where transformers leaves it out."""
    model, config = torch_model(folder), read_config(folder)
    for layer in model.model.layers:
        if config.family.model_type == "deepseek_v2" and config.rope_scaling:
            layer.self_attn.scaling *= (0.1 * math.log(config.rope_scaling["factor"]) + 1) ** 2
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.chunk_gated_delta_rule = _delta_rule_in_float64()
        if config.family.correction_bias and hasattr(layer.mlp, "gate"):
            # Its router answers in float32, which its experts in float64 do not take.
            layer.mlp.gate.register_forward_hook(lambda _, __, chosen: (chosen[0], chosen[1].double()))
    return model


def _delta_rule_in_float64() -> Any:
    """transformers' own, which casts whatever it is given to float32."""
    from transformers.models.qwen3_next import modeling_qwen3_next as theirs

    source = inspect.getsource(theirs.torch_chunk_gated_delta_rule)
    wide = source.replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    assert wide != source
    scope = vars(theirs).copy()
    exec(wide, scope)
    return scope["torch_chunk_gated_delta_rule"]


def logits_of(model: Any, tokens: Any) -> Any:
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_logits_and_cached_decoding_equal_transformers(case: str, tmp_path: Path, dtype: Any) -> None:
    folder = write(case, tmp_path)
    tokens = random_tokens()
    expected = logits_of(reference(folder), tokens)
    model = our_model(folder, dtype)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(model.logits(tokens), expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(decode(model, tokens, [29, 11]), expected, rtol=0, atol=TOLERANCE)
