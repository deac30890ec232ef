"""The tensors that a decoder must have, against what transformers makes and writes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import CheckpointError
from msquant.families import expected_shapes, extra_shapes, find_family, model_types
from tests.fixtures.tiny_families import SETTINGS, write_tiny

# Enough for every family, with everything left out that has a default.
MINIMAL: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "vocab_size": 128,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
GROUPED_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("mistral", {}),
    "mistral-null": ("mistral", {"num_key_value_heads": None, "head_dim": None}),
    "mistral-no-biases": ("mistral", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "qwen2-default": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3-biases": ("qwen3", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", EXPERTS),
    "qwen3_moe-steps": ("qwen3_moe", EXPERTS | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    "qwen3_next": ("qwen3_next", EXPERTS),
    "qwen3_next-steps": (
        "qwen3_next",
        EXPERTS
        | {
            "decoder_sparse_step": 2,
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
            "linear_num_value_heads": 48,
            "attention_bias": True,
        },
    ),
    "deepseek_v2": ("deepseek_v2", LATENT | {"q_lora_rank": None}),
    "deepseek_v2-biases": ("deepseek_v2", LATENT | {"attention_bias": True, "mlp_bias": True}),
    "deepseek_v3": ("deepseek_v3", LATENT | {"n_group": 2, "topk_group": 1}),
    "glm4": ("glm4", {"pad_token_id": 0}),
    "glm4-no-biases": (
        "glm4",
        {"pad_token_id": 0, "attention_bias": False, "head_dim": 16, "num_key_value_heads": 4},
    ),
    "glm4_moe": ("glm4_moe", GROUPED_EXPERTS),
    "glm4_moe-norms": (
        "glm4_moe",
        GROUPED_EXPERTS
        | {"use_qk_norm": True, "attention_bias": True, "head_dim": 16, "n_shared_experts": 2},
    ),
    "deepseek_v3-biases": (
        "deepseek_v3",
        LATENT | {"first_k_dense_replace": 0, "q_lora_rank": 20, "attention_bias": True, "mlp_bias": True},
    ),
}


def model_of(config: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


@pytest.mark.parametrize("case", CASES)
def test_the_shapes_are_those_of_transformers_own_model(case: str) -> None:
    model_type, settings = CASES[case]
    config = {"model_type": model_type} | MINIMAL | settings
    model = model_of(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert expected_shapes(config) == expected


@pytest.mark.parametrize("model_type", model_types())
def test_the_shapes_are_those_that_transformers_writes(model_type: str, tmp_path: Path) -> None:
    family = find_family(model_type)
    assert family is not None
    predicted = 2 if family.predicts else 1 if family.prediction_block else 0
    folder = write_tiny(tmp_path, model_type, prediction_layers=predicted)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    checkpoint = Checkpoint.open(folder)
    stored = {name: checkpoint.shape(name) for name in checkpoint.names()}
    assert (expected_shapes(config) or {}) | extra_shapes(config) == stored


def test_every_family_has_a_tiny_model() -> None:
    assert set(SETTINGS) == set(model_types())


def test_an_unknown_type_has_no_layout() -> None:
    assert expected_shapes({"model_type": "gpt2"}) is None
    assert expected_shapes({}) is None
    assert extra_shapes({"model_type": "gpt2", "num_nextn_predict_layers": 1}) == {}


def test_the_indexer_has_the_tensors_that_servers_load() -> None:
    """Of DeepSeek-V3.2 and GLM-5 as vllm 0.11 and vllm-ascend name them; GLM-5.2 has it in some layers."""
    sizes = {"q_lora_rank": 20, "index_n_heads": 3, "index_head_dim": 8, "index_topk": 64}
    config = {"model_type": "glm_moe_dsa"} | MINIMAL | LATENT | sizes
    shapes = expected_shapes(config)
    assert shapes is not None
    found = {name: shape for name, shape in shapes.items() if ".indexer." in name}
    indexer = "model.layers.2.self_attn.indexer."
    assert {name.removeprefix(indexer): s for name, s in found.items() if name.startswith(indexer)} == {
        "wq_b.weight": (24, 20),
        "wk.weight": (8, 256),
        "k_norm.weight": (8,),
        "k_norm.bias": (8,),
        "weights_proj.weight": (3, 256),
    }
    assert len(found) == 5 * MINIMAL["num_hidden_layers"]
    shared = expected_shapes(config | {"indexer_types": ["full", "full", "shared", "full"]})
    assert shared is not None
    assert set(shapes) - set(shared) == {name for name in found if name.startswith(indexer)}
    with pytest.raises(CheckpointError, match="indexer_types is"):
        expected_shapes(config | {"indexer_types": ["full"]})


def test_prediction_layers_are_whole_decoder_layers_with_their_own_ends() -> None:
    config = {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1} | MINIMAL | LATENT
    shapes, extra = expected_shapes(config), extra_shapes(config)
    assert shapes is not None
    assert not set(shapes) & set(extra)
    layer = {name.removeprefix("model.layers.3."): shape for name, shape in shapes.items() if ".3." in name}
    found = {name.removeprefix("model.layers.4."): shape for name, shape in extra.items()}
    ends = {
        "embed_tokens.weight": (128, 256),
        "enorm.weight": (256,),
        "hnorm.weight": (256,),
        "eh_proj.weight": (256, 512),
        "shared_head.norm.weight": (256,),
        "shared_head.head.weight": (128, 256),
    }
    experts = {name: shape for name, shape in layer.items() if "mlp.experts.3." in name}
    assert len(experts) == 3
    assert ends.items() <= found.items()
    assert experts.items() <= found.items()
    assert set(found) - set(ends) == {
        name.removeprefix("model.layers.3.") for name in shapes if name.startswith("model.layers.3.")
    }


@pytest.mark.parametrize("count", [None, 0])
def test_without_prediction_layers_there_are_no_extra_shapes(count: int | None) -> None:
    config = {"model_type": "deepseek_v3", "num_nextn_predict_layers": count} | MINIMAL | LATENT
    assert extra_shapes(config) == {}


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("llama", {"hidden_size": None}, "hidden_size is None, a positive integer"),
        ("llama", {"num_hidden_layers": "4"}, "num_hidden_layers is '4', a positive integer"),
        ("llama", {"vocab_size": True}, "vocab_size is True, a positive integer"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts is 0, a positive integer"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "moe_intermediate_size is None"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers is 3, a list of layer numbers"),
        ("qwen3_moe", {"mlp_only_layers": ["0"]}, r"mlp_only_layers is \['0'\], a list of layer numbers"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0, a positive integer"),
        ("deepseek_v3", {"n_routed_experts": None}, "n_routed_experts is None, a positive integer"),
        ("deepseek_v3", {"n_shared_experts": None}, "n_shared_experts is None, a positive integer"),
        ("deepseek_v3", {"q_lora_rank": 0}, "q_lora_rank is 0, a positive integer"),
        ("deepseek_v3", {"first_k_dense_replace": -1}, "first_k_dense_replace is -1, a number of layers"),
        ("deepseek_v3", {"first_k_dense_replace": None}, "first_k_dense_replace is None"),
    ],
)
def test_a_size_that_makes_no_sense_is_named(model_type: str, changes: dict[str, Any], message: str) -> None:
    config = {"model_type": model_type} | MINIMAL | EXPERTS | LATENT | changes
    with pytest.raises(CheckpointError, match=message) as caught:
        expected_shapes(config)
    assert caught.value.where == "config.json"
    assert caught.value.remedy


@pytest.mark.parametrize("count", [-1, "1", True])
def test_a_count_of_prediction_layers_that_makes_no_sense_is_named(count: Any) -> None:
    config = {"model_type": "deepseek_v3", "num_nextn_predict_layers": count} | MINIMAL | LATENT
    with pytest.raises(CheckpointError, match="num_nextn_predict_layers is"):
        extra_shapes(config)
