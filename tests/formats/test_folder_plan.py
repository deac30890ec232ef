"""The plan says exactly what is written, and refuses what cannot be."""

from pathlib import Path
from typing import Any

import pytest

from msquant.checkpoint.checkpoint_reader import INDEX_NAME, Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.errors import CheckpointError, MsquantError, OutputError, RecipeError
from msquant.formats.folder_plan import plan_folder
from msquant.formats.golden_stick.layout import DESCRIPTION_NAME
from msquant.schemes import FLOAT, W8A8, W8A8_DYNAMIC, W8A16
from tests.formats.expert_folders import DEEPSEEK, QWEN, groups_of, schemes_of, write_experts
from tests.formats.folders import CONFIG as LLAMA

Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("max_shard_bytes", [10**9, 1500])
@pytest.mark.parametrize(
    "config",
    [
        DEEPSEEK,
        QWEN,
        LLAMA,
        {**DEEPSEEK, "attention_bias": True, "torch_dtype": "float32"},
        {**DEEPSEEK, "model_type": "deepseek_v2", "q_lora_rank": None, "torch_dtype": "float16"},
        {**LLAMA, "attention_bias": True},
    ],
)
def test_what_is_planned_is_what_is_written(
    tmp_path: Path, config: dict[str, Any], max_shard_bytes: int
) -> None:
    plan = write_experts(tmp_path / "m", config, max_shard_bytes=max_shard_bytes)
    checkpoint = Checkpoint.open(tmp_path / "m")
    planned = {spec.name: (spec.dtype, spec.shape) for shard in plan.shards for spec in shard.specs}
    assert planned == {name: (checkpoint.dtype(name), checkpoint.shape(name)) for name in checkpoint.names()}
    assert plan.weight_map == checkpoint.weight_map
    assert plan.tensor_bytes == sum(checkpoint.nbytes(name) for name in checkpoint.names())
    assert plan.tensor_bytes == read_json(tmp_path / "m" / INDEX_NAME)["metadata"]["total_size"]
    assert plan.file_bytes == sum(path.stat().st_size for path in (tmp_path / "m").glob("*.safetensors"))
    assert plan.documents[DESCRIPTION_NAME] == read_json(tmp_path / "m" / DESCRIPTION_NAME)
    assert len(list(plan.shards)) == len(list((tmp_path / "m").glob("*.safetensors")))
    assert (len(list(plan.shards)) > len(plan.groups)) == (max_shard_bytes == 1500)


def test_the_tensors_of_each_scheme() -> None:
    shapes = {f"{Q}.weight": (4, 6), f"{Q}.bias": (4,)}
    plans = {
        scheme: plan_folder([shapes], {Q: scheme}, {**QWEN}, "bfloat16")
        for scheme in (W8A8, W8A8_DYNAMIC, FLOAT)
    }
    found = {
        scheme: {spec.name.removeprefix(f"{Q}."): str(spec) for shard in plan.shards for spec in shard.specs}
        for scheme, plan in plans.items()
    }
    assert found == {
        W8A8: {
            "weight": "I8 [4, 6]",
            "deq_scale": "F32 [4]",
            "quant_bias": "I32 [4]",
            "input_scale": "BF16 [6]",
            "input_offset": "I8 [6]",
            "bias": "BF16 [4]",
        },
        W8A8_DYNAMIC: {
            "weight": "I8 [4, 6]",
            "weight_scale": "F32 [4]",
            "weight_offset": "F32 [4]",
            "bias": "BF16 [4]",
        },
        FLOAT: {"weight": "BF16 [4, 6]", "bias": "BF16 [4]"},
    }
    assert set(plans[W8A8_DYNAMIC].documents[DESCRIPTION_NAME].values()) == {"W8A8_DYNAMIC"}


def test_scales_of_fp8_blocks_are_left_out_and_the_routers_bias_stays_exact() -> None:
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    shapes = {f"{Q}.weight": (4, 6), f"{Q}.weight_scale_inv": (1, 1), name: (3,)}
    plan = plan_folder([shapes], {}, DEEPSEEK, "float32")
    assert plan.dtype == "bfloat16"
    assert set(plan.weight_map) == {f"{Q}.weight", name}
    assert {spec.name: spec.dtype for shard in plan.shards for spec in shard.specs}[name] == "F32"


@pytest.mark.parametrize(
    ("groups", "linears", "config", "kind", "message"),
    [
        ([{}], {Q: W8A8}, LLAMA, CheckpointError, "q_proj is to be quantized, but the source has no"),
        ([{f"{Q}.weight": (4,)}], {Q: W8A8}, LLAMA, CheckpointError, "a matrix"),
        (
            [{f"{Q}.weight": (4, 6), f"{Q}.bias": (6,)}],
            {Q: W8A8},
            LLAMA,
            CheckpointError,
            r"its bias \[6\]",
        ),
        (
            [{f"{Q}.weight": (4, 6), f"{Q}.scale": (6,)}],
            {Q: W8A8},
            LLAMA,
            CheckpointError,
            "no part 'scale'",
        ),
        ([{"a.b": (1,)}, {"a.b": (1,)}], {}, LLAMA, OutputError, "twice"),
        ([{f"{Q}.weight": (4, 6)}], {Q: W8A8_DYNAMIC}, LLAMA, RecipeError, "knows only W8A8 and FLOAT"),
        ([{f"{Q}.weight": (4, 6)}], {Q: W8A16}, LLAMA, RecipeError, "native .* only W8A8 and FLOAT"),
        (
            [{f"{Q}.weight": (4, 6)}],
            {Q: W8A16},
            DEEPSEEK,
            RecipeError,
            "mindformers .* only W8A8, W8A8_DYNAMIC, W4A8_DYNAMIC and FLOAT",
        ),
        (
            [{"lm_head.weight": (4, 6)}],
            {"lm_head": W8A8},
            DEEPSEEK,
            RecipeError,
            "mindformers backend .* never quantizes the output head",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(
    groups: Any, linears: Any, config: dict[str, Any], kind: type[MsquantError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        plan_folder(groups, linears, config, "bfloat16")


def test_a_refusal_names_the_formats_that_hold_the_schemes() -> None:
    module = "model.layers.0.self_attn.o_proj"
    with pytest.raises(RecipeError) as caught:
        plan_folder(groups_of(QWEN), {module: W8A16}, QWEN, "bfloat16", format_name="golden-stick")
    assert "or write another format: " in str(caught.value.remedy)
    assert "ascend" in str(caught.value.remedy).partition("another format: ")[2].split(", ")


def test_the_plan_of_a_model_of_deepseeks_size_is_made_from_shapes_alone() -> None:
    config = {
        **DEEPSEEK,
        **{"hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048},
        **{"num_attention_heads": 128, "num_key_value_heads": 128, "num_hidden_layers": 6},
        **{"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64},
        **{"v_head_dim": 128, "n_routed_experts": 256, "first_k_dense_replace": 3, "vocab_size": 129280},
    }
    plan = plan_folder(groups_of(config), schemes_of(config), config, "bfloat16")
    expert = 3 * 7168 * 2048 + 2 * 4 * (2 * 2048 + 7168)
    layer = sum(shard.nbytes for shard in plan.groups[3])
    assert 257 * expert < layer < 257 * expert + 220e6
    assert all(shard.nbytes <= 5_000_000_000 for shard in plan.shards)
    assert [len(group) for group in plan.groups] == [1, 1, 1, 3, 3, 3, 6, 1]
