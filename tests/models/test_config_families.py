"""Reading `config.json` of every family: what is read, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import CheckpointError, ModelError
from msquant.families import model_types
from msquant.models.config_json import parse_config, read_config
from msquant.models.rope import rotary_tables
from tests.fixtures.tiny_families import SETTINGS, write_tiny

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


@pytest.fixture(scope="module")
def raws(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The content of a valid config.json of each family."""
    root = tmp_path_factory.mktemp("families")
    return {kind: read_config(write_tiny(root / kind, kind)).raw for kind in SETTINGS}


def test_every_family_has_a_config(raws: dict[str, dict[str, Any]]) -> None:
    assert set(model_types()) == set(raws)
    for kind, raw in raws.items():
        config = parse_config(raw)
        assert config.raw == raw
        assert raw["architectures"] == [config.family.architecture]
        assert config.num_experts == (8 if config.family.router else 0), kind
        assert config.experts_per_token == raw.get("num_experts_per_tok", 0)
        assert config.moe_intermediate_size == (32 if config.family.router else 0)
        assert [config.has_experts(i) for i in range(3)] == [False, bool(config.family.router), False]
        assert set(config.layer_shapes(0)) | set(config.layer_shapes(1)) == (
            set(config.shapes) - set(config.end_names)
        )
        assert config.layer_shapes(2) == {}


def test_the_sizes_of_deepseek_v3(raws: dict[str, dict[str, Any]]) -> None:
    config = parse_config(raws["deepseek_v3"])
    assert config.latent is not None
    assert config.experts is not None
    assert (config.latent.q_lora_rank, config.latent.kv_lora_rank) == (48, 32)
    assert (config.latent.qk_head_dim, config.qk_nope_head_dim, config.v_head_dim) == (24, 16, 12)
    assert config.head_dim == config.latent.qk_rope_head_dim == 8
    assert config.latent.rope_interleave is True
    assert (config.experts.groups, config.experts.groups_per_token, config.experts.group_score) == (4, 2, 2)
    assert (config.experts.shared, config.experts.normalize, config.experts.scaling_factor) == (1, True, 2.5)


def test_a_greedy_router_has_one_group(raws: dict[str, dict[str, Any]]) -> None:
    raw = raws["deepseek_v2"] | {"topk_method": "greedy", "n_group": 4, "topk_group": 2}
    experts = parse_config(raw).experts
    assert experts is not None
    assert (experts.groups, experts.groups_per_token, experts.normalize) == (1, 1, False)


def test_the_head_size_of_a_model_without_latent_attention(raws: dict[str, dict[str, Any]]) -> None:
    config = parse_config(raws["qwen3"])
    assert (config.head_dim, config.v_head_dim, config.qk_nope_head_dim, config.latent) == (32, 32, 0, None)


@pytest.mark.parametrize("kind", SETTINGS)
def test_every_smooth_group_follows_what_its_scale_is_folded_into(
    kind: str, raws: dict[str, dict[str, Any]]
) -> None:
    config = parse_config(raws[kind])
    assert config.groups(0) == config.mixer_groups(0) + config.feed_forward_groups
    shapes = config.layer_shapes(0)
    for group in config.groups(0):
        previous = shapes[f"model.layers.0.{group.previous}.weight"][0]
        if group.previous == "self_attn.kv_b_proj":
            previous = config.num_attention_heads * config.v_head_dim
        if group.previous == "mlp.gate_up_proj":
            previous //= 2
        reading = (*group.linears, *group.followers)
        inputs = {shapes[f"model.layers.0.{name}.weight"][1] for name in reading}
        assert len(inputs) == 1
        assert inputs.pop() % previous == 0
    linears = [f"model.layers.0.{name}.weight" for group in config.groups(0) for name in group.linears]
    never = config.family.never_quantized
    matrices = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) == 2]
    quantized = [f"{name}.weight" for name in matrices if not never(name.removeprefix("model.layers.0."))]
    assert sorted(linears) == sorted(quantized)


def test_prediction_layers_are_kept_apart(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path, "deepseek_v3", prediction_layers=2)
    config, checkpoint = read_config(folder), Checkpoint.open(folder)
    assert config.num_nextn_predict_layers == 2
    assert set(checkpoint.names()) == set(config.shapes) | set(config.extra_names)
    assert not set(config.shapes) & set(config.extra_names)
    assert len(config.extra_layers) == 2
    for i, shapes in enumerate(config.extra_layers, start=2):
        assert shapes == config.layer_shapes(i)
        assert f"model.layers.{i}.eh_proj.weight" in shapes
        assert config.has_experts(i)
    assert not any(name.startswith("model.layers.2.") for name in config.shapes)


def test_a_model_without_prediction_layers_has_none(raws: dict[str, dict[str, Any]]) -> None:
    config = parse_config(raws["deepseek_v3"])
    assert (config.extra_names, config.extra_layers, config.num_nextn_predict_layers) == ((), (), 0)


def test_fp8_blocks_are_accepted(raws: dict[str, dict[str, Any]]) -> None:
    raw = raws["deepseek_v3"] | {"quantization_config": FP8}
    config = parse_config(raw)
    assert config.fp8_block == (128, 128)
    assert config.shapes == parse_config(raws["deepseek_v3"]).shapes
    assert parse_config(raws["deepseek_v3"]).fp8_block is None


@pytest.mark.parametrize(
    "changes",
    [
        {"quant_method": "quip"},
        {"fmt": "e5m2"},
        {"weight_block_size": None},
        {"weight_block_size": [128]},
        {"weight_block_size": [128, "128"]},
        {"weight_block_size": [0, 128]},
    ],
)
def test_every_other_quantization_is_refused(
    changes: dict[str, Any], raws: dict[str, dict[str, Any]]
) -> None:
    raw = raws["deepseek_v3"] | {"quantization_config": FP8 | changes}
    with pytest.raises(ModelError, match=r"quantization_config = .* is not supported") as caught:
        parse_config(raw, "there.json")
    assert caught.value.where == "there.json"


def test_a_quantization_config_that_is_no_section_is_refused(raws: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ModelError, match="quantization_config = 'fp8' is not supported"):
        parse_config(raws["llama"] | {"quantization_config": "fp8"})


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("mistral", {"sliding_window": 128}, "sliding_window = 128 is not supported"),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window = 64 is not supported"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window = 64 is not supported"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 64}, "sliding_window = 64 is not"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types \['sliding_attention'\] is not supported",
        ),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob = True is not supported"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method = 'noaux_tc' is not supported"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid' is not supported"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func = 'softmax' is not supported"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method = 'greedy' is not supported"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq = 2 is not supported"),
        ("deepseek_v3", {"n_group": 3}, "8 experts do not divide into 3 groups"),
        ("deepseek_v3", {"n_group": 8}, "8 experts do not divide into 8 groups of at least 2"),
        ("deepseek_v3", {"topk_group": 5}, r"5 groups of experts a token .* there are 4"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, r"5 experts a token .* can choose among 4"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, r"9 experts a token .* can choose among 8"),
    ],
)
def test_what_is_not_computed_is_refused(
    kind: str, changes: dict[str, Any], message: str, raws: dict[str, dict[str, Any]]
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        parse_config(raws[kind] | changes, "there.json")
    assert caught.value.where == "there.json"


def test_a_mistral_without_a_word_on_windows_has_one(raws: dict[str, dict[str, Any]]) -> None:
    raw = {key: value for key, value in raws["mistral"].items() if key != "sliding_window"}
    with pytest.raises(ModelError, match="sliding_window = 4096 is not supported") as caught:
        parse_config(raw | {"max_position_embeddings": 32768})
    assert "v0.3" in str(caught.value.remedy)


def test_a_window_that_covers_all_positions_is_none(raws: dict[str, dict[str, Any]]) -> None:
    parse_config(raws["mistral"] | {"sliding_window": 256})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 2}, "4 attention heads do not go with .* 2 key-value heads"),
        ({"qk_rope_head_dim": 7, "head_dim": 7}, "head_dim 7"),
        ({"norm_topk_prob": "yes"}, "normalize"),
        ({"routed_scaling_factor": "much"}, "much"),
        ({"num_experts_per_tok": None}, "per_token"),
        ({"n_group": None}, "groups"),
        ({"kv_lora_rank": "512"}, "kv_lora_rank"),
        ({"rope_interleave": 1}, "rope_interleave"),
        ({"rope_scaling": {"type": "yarn", "mscale_all_dim": 1.0}}, "factor"),
    ],
)
def test_a_value_of_the_wrong_kind_is_named(
    changes: dict[str, Any], message: str, raws: dict[str, dict[str, Any]]
) -> None:
    with pytest.raises((CheckpointError, ModelError), match=message) as caught:
        parse_config(raws["deepseek_v3"] | changes)
    assert caught.value.where


def test_the_rope_section_is_left_as_it_was(raws: dict[str, dict[str, Any]]) -> None:
    raw = raws["deepseek_v3"]
    before = dict(raw["rope_scaling"])
    parse_config(raw)
    assert raw["rope_scaling"] == before


def test_only_the_rotated_channels_have_tables(raws: dict[str, dict[str, Any]]) -> None:
    cos, sin = rotary_tables(parse_config(raws["deepseek_v3"]), 0, 5)
    assert cos.shape == sin.shape == (5, 8)
    np.testing.assert_allclose(np.hypot(cos, sin), 1, rtol=1e-6)
