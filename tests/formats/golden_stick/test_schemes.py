"""Which backend a folder is for, and what that can run."""

from typing import Any

import pytest

from msquant.errors import CheckpointError
from msquant.formats.golden_stick.form import GoldenStickFormat
from msquant.formats.golden_stick.layout import folder_variant, variant_of
from tests.formats.expert_folders import DEEPSEEK, QWEN, schemes_of

MINDFORMERS = GoldenStickFormat("mindformers")
LAYER = "model.layers.1"


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("deepseek_v2", "mindformers"),
        ("deepseek_v3", "mindformers"),
        ("qwen3_moe", "mindformers"),
        ("qwen3", "native"),
        ("llama", "native"),
        (None, "native"),
    ],
)
def test_the_variant_of_an_architecture(model_type: str | None, expected: str) -> None:
    assert variant_of({"model_type": model_type}) == expected
    assert folder_variant({"model_type": model_type}, {}) == expected


def test_the_manifest_goes_before_the_architecture() -> None:
    assert folder_variant({"model_type": "llama"}, {"variant": "mindformers"}) == "mindformers"
    with pytest.raises(CheckpointError, match="variant is 'mindone', one of native, mindformers"):
        folder_variant({}, {"variant": "mindone"})


@pytest.mark.parametrize("config", [DEEPSEEK, QWEN])
def test_deepseeks_policy_can_be_served(config: dict[str, Any]) -> None:
    described = {module: MINDFORMERS.words[scheme] for module, scheme in schemes_of(config).items()}
    assert {"W8A8", "W8A8_DYNAMIC"} <= set(described.values())
    assert list(MINDFORMERS.check_words(described, config)) == []


def test_a_model_in_floating_point_can_be_served() -> None:
    assert list(MINDFORMERS.check_words(dict.fromkeys(schemes_of(DEEPSEEK), "FLOAT"), DEEPSEEK)) == []


@pytest.mark.parametrize(
    ("changes", "where", "problem"),
    [
        (
            {f"{LAYER}.self_attn.kv_a_proj_with_mqa": "W8A8_DYNAMIC"},
            f"{LAYER}.self_attn.kv_a_proj_with_mqa",
            "run as one layer",
        ),
        ({f"{LAYER}.mlp.shared_experts.up_proj": "FLOAT"}, f"{LAYER}.mlp.shared_experts.up_proj", "run as"),
        (
            {f"{LAYER}.mlp.experts.2.down_proj": "FLOAT"},
            f"{LAYER}.mlp.experts.2.down_proj",
            "run as one layer",
        ),
        ({f"{LAYER}.self_attn.kv_b_proj": "W8A8"}, f"{LAYER}.self_attn.kv_b_proj", "never quantizes kv_b"),
        ({f"{LAYER}.mlp.gate": "W8A8_DYNAMIC"}, f"{LAYER}.mlp.gate", "never quantizes the router"),
        ({"lm_head": "W8A8"}, "lm_head", "never quantizes the output head"),
        ({"model.embed_tokens": "W8A8"}, "model.embed_tokens", "never quantizes embeddings"),
        (
            {"model.layers.2.self_attn.o_proj": "W8A8"},
            "model.layers.2.self_attn.o_proj",
            "multi-token-prediction layers unquantized",
        ),
        (
            {f"{LAYER}.self_attn.o_proj": "W4A8_DYNAMIC"},
            f"{LAYER}.self_attn.o_proj",
            "int4 weights in routed",
        ),
        ({f"{LAYER}.self_attn.o_proj": "W8A16"}, f"{LAYER}.self_attn.o_proj", "knows only"),
    ],
)
def test_what_mindformers_cannot_run_is_named(changes: dict[str, str], where: str, problem: str) -> None:
    described = {
        module: MINDFORMERS.words[scheme] for module, scheme in schemes_of(DEEPSEEK).items()
    } | changes
    found = list(MINDFORMERS.check_words(described, DEEPSEEK))
    assert [finding.where for finding in found] == [where]
    assert problem in found[0].problem


@pytest.mark.parametrize("value", ["W8A8", "FLOAT"])
def test_experts_of_a_quantized_model_run_per_token_only(value: str) -> None:
    described = {module: MINDFORMERS.words[scheme] for module, scheme in schemes_of(DEEPSEEK).items()}
    described |= {module: value for module in described if module.startswith(f"{LAYER}.mlp.experts.")}
    found = list(MINDFORMERS.check_words(described, DEEPSEEK))
    assert [finding.where for finding in found] == [f"{LAYER}.mlp.experts"]
    assert "W8A8_DYNAMIC or W4A8_DYNAMIC only" in found[0].problem


def test_the_native_backend_knows_no_activations_per_token() -> None:
    found = list(
        GoldenStickFormat("native").check_words({"model.layers.0.mlp.down_proj": "W8A8_DYNAMIC"}, {})
    )
    assert [finding.problem for finding in found] == [
        "described as 'W8A8_DYNAMIC': the native backend knows only W8A8 and FLOAT"
    ]
