"""Folders for vLLM: those of msquant and llm-compressor keep every rule, and each broken one is found."""

from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import FloatLinear, QuantizedLinear
from msquant.errors import CheckpointError, RecipeError
from msquant.formats.compressed_tensors.form import CompressedTensorsFormat
from msquant.formats.compressed_tensors.reader import CompressedTensorsCheckpoint
from msquant.formats.folder_plan import plan_folder
from msquant.formats.registry import folder_format, model_format
from msquant.schemes import FLOAT, W8A8, W8A8_DYNAMIC, Scheme, parse_scheme
from tests.formats import folders
from tests.formats.expert_folders import (
    DEEPSEEK,
    QWEN,
    groups_of,
    random_linear,
    schemes_of,
    write_experts,
)
from tests.formats.folders import CONFIG, change_json, change_tensors, write_manifest

FORM = CompressedTensorsFormat()
problems = partial(folders.problems, FORM)

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
DOWN = "model.layers.0.mlp.down_proj"
EXPERT = "model.layers.1.mlp.experts.1.up_proj"


def mixed(config: dict[str, Any]) -> dict[str, Scheme]:
    """Attention static, feed-forward per token, but for one layer that is not quantized."""
    schemes = schemes_of(config)
    schemes.update({module: W8A8_DYNAMIC for module in schemes if module.endswith("down_proj")})
    return {**schemes, "model.layers.1.mlp.down_proj": FLOAT}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_experts(
        tmp_path / "m",
        {**CONFIG, "attention_bias": True},
        schemes=mixed(CONFIG),
        format_name="compressed-tensors",
    )
    return tmp_path / "m"


CASES = [
    pytest.param(CONFIG, mixed(CONFIG), id="llama"),
    pytest.param({**CONFIG, "torch_dtype": "float16"}, schemes_of(CONFIG), id="float16"),
    pytest.param({**CONFIG, "torch_dtype": "float32"}, schemes_of(CONFIG), id="float32"),
    pytest.param(DEEPSEEK, schemes_of(DEEPSEEK), id="deepseek"),
    pytest.param(QWEN, schemes_of(QWEN), id="qwen3-moe"),
]


@pytest.mark.parametrize(("config", "schemes"), CASES)
def test_a_written_folder_keeps_the_rules_and_is_what_was_written(
    tmp_path: Path, config: dict[str, Any], schemes: dict[str, Scheme]
) -> None:
    write_experts(tmp_path / "m", config, schemes=schemes, format_name="compressed-tensors")
    assert FORM.validate(tmp_path / "m", verify_hashes=True) == []
    form = folder_format(tmp_path / "m")
    assert form is not None
    assert form.name == "compressed-tensors"
    source = form.open(tmp_path / "m")
    for module, scheme in schemes.items():
        linear = source.linear(module)
        expected = random_linear(module, linear.weight.shape, scheme)
        assert isinstance(linear, FloatLinear) == (scheme == FLOAT)
        if isinstance(linear, QuantizedLinear) and isinstance(expected, QuantizedLinear):
            np.testing.assert_array_equal(linear.weight, expected.weight)
            np.testing.assert_array_equal(linear.weight_scale, expected.weight_scale)
            assert linear.is_static == expected.is_static


def test_a_folder_of_another_tool_without_manifest_is_found_by_its_config(folder: Path) -> None:
    (folder / "msquant.json").unlink()
    form = folder_format(folder)
    assert form is not None
    assert form.name == "compressed-tensors"
    assert form.validate(folder) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{Q}.weight_scale", None, f"{Q}.weight_scale: missing from a quantized layer"),
        (f"{Q}.input_zero_point", None, f"{Q}.input_zero_point: missing from a quantized layer"),
        (f"{Q}.weight_scale", np.ones(16, np.float32), "has shape [16], [16, 1] is expected"),
        (f"{Q}.weight_scale", np.full((16, 1), -1, np.float32), "not positive and finite"),
        (f"{Q}.input_scale", np.zeros(1, np.float32), "not positive and finite"),
        (f"{Q}.input_scale", np.ones(16, np.float32), "has shape [16], [1] or [] is expected"),
        (f"{Q}.input_scale", np.full(1, 3, np.float32), f"{K}.input_scale: differs from {Q}.input_scale"),
        (f"{K}.input_zero_point", np.full(1, 3, np.int8), "they run as one layer"),
        (f"{Q}.input_zero_point", np.full(1, 3, np.int32), "stored as I32, I8 is expected"),
        (f"{Q}.weight", np.ones((16, 16), np.float16), "config.json quantizes the layer in group_0"),
        (f"{Q}.weight", np.ones(16, np.int8), "has shape [16], a matrix [N, K] is expected"),
        (f"{K}.bias", None, "one of them has no bias"),
        (f"{Q}.bias", np.full(16, np.nan, np.float16), "holds NaN"),
        (f"{Q}.weight_zero_point", np.ones((16, 1), np.int8), "vLLM takes weights as symmetric"),
        ("model.norm.weight", np.full(16, np.inf, ml_dtypes.bfloat16), "holds NaN or infinity"),
        ("model.norm.weight", None, "model.norm.weight: missing: config.json says the model has it"),
        ("model.layers.1.mlp.down_proj.weight", np.ones((16, 24), np.int8), "does not quantize the layer"),
    ],
)
def test_a_broken_tensor_is_found(folder: Path, name: str, value: Any, message: str) -> None:
    change_tensors(folder, {name: value}, described=False)
    assert any(message in problem for problem in problems(folder)), problems(folder)


def test_a_layer_that_is_missing_is_an_error_when_it_is_read(folder: Path) -> None:
    change_tensors(folder, {f"{Q}.weight_scale": None}, described=False)
    with pytest.raises(CheckpointError, match=r"q_proj\.weight_scale"):
        CompressedTensorsCheckpoint.open(folder).linear(Q)


def test_asymmetric_weights_are_an_error_when_they_are_read(folder: Path) -> None:
    zeros = np.zeros((16, 1), np.int8)
    change_tensors(folder, {f"{Q}.weight_zero_point": zeros}, described=False)
    assert isinstance(CompressedTensorsCheckpoint.open(folder).linear(Q), QuantizedLinear)
    change_tensors(folder, {f"{Q}.weight_zero_point": zeros + 1}, described=False)
    with pytest.raises(CheckpointError, match="asymmetric weights are not computed"):
        CompressedTensorsCheckpoint.open(folder).linear(Q)


def test_a_fused_layer_that_the_targets_leave_to_another_group_is_found(folder: Path) -> None:
    def forget_the_fused_layer(config: dict[str, Any]) -> None:
        groups = config["quantization_config"]["config_groups"]
        groups["group_1"]["targets"] = [r"re:.*\.mlp\.down_proj$", r"re:.*\.self_attn\.[qkv]_proj$"]
        groups["group_1"]["input_activations"] = groups["group_0"]["input_activations"]

    change_json(folder / "config.json", forget_the_fused_layer)
    found = [problem for problem in problems(folder) if "name the fused layer" in problem]
    assert len(found) == 2
    assert "model.layers.0.self_attn.qkv_proj for a layer of group_0" in found[0]


def test_parts_of_a_fused_layer_in_two_schemes_are_found(folder: Path) -> None:
    change_json(folder / "config.json", lambda c: c["quantization_config"]["ignore"].append(K))
    assert any("is FLOAT, unlike" in p for p in problems(folder))


def test_a_dtype_that_vllm_does_not_run_is_found(folder: Path) -> None:
    change_json(folder / "config.json", lambda config: config.update(torch_dtype="float64"))
    assert any("dtype is float64" in problem for problem in problems(folder))


def test_a_section_that_is_not_read_is_one_finding(folder: Path) -> None:
    change_json(folder / "config.json", lambda c: c["quantization_config"].update(format="pack-quantized"))
    assert any("pack-quantized" in problem for problem in problems(folder))
    with pytest.raises(CheckpointError, match="pack-quantized") as caught:
        CompressedTensorsCheckpoint.open(folder)
    assert str(folder / "config.json") in str(caught.value)


def test_a_changed_file_is_found(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert any("was changed" in str(finding) for finding in FORM.validate(folder, verify_hashes=True))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (CONFIG, {K: W8A8_DYNAMIC}, f"{K}: is W8A8_DYNAMIC, unlike {Q} (W8A8): they run as one layer"),
        (
            CONFIG,
            {Q: parse_scheme("W6A16")},
            "in this format msquant writes FLOAT, W8A8, W8A8_DYNAMIC, W4A8_DYNAMIC, W8A16, W4A16 for vLLM",
        ),
        (CONFIG, {"lm_head": W8A8_DYNAMIC}, "vLLM takes the output head in floating point only"),
        (QWEN, {EXPERT: FLOAT}, "they run as one layer"),
        (QWEN, {"model.layers.1.mlp.gate": W8A8_DYNAMIC}, "the router"),
        (DEEPSEEK, {"model.layers.1.self_attn.kv_b_proj": W8A8}, "it accepts W8A8_DYNAMIC and FLOAT"),
        (DEEPSEEK, {"model.layers.0.self_attn.q_a_proj": FLOAT}, "they run as one layer"),
    ],
)
def test_schemes_that_vllm_cannot_run_are_named(
    config: dict[str, Any], change: dict[str, Scheme], message: str
) -> None:
    form = model_format("compressed-tensors", config)
    assert list(form.check(schemes_of(config), config)) == []
    found = [str(finding) for finding in form.check({**schemes_of(config), **change}, config)]
    assert any(message in finding for finding in found), found


def test_static_experts_are_refused_before_any_work() -> None:
    schemes = dict.fromkeys(schemes_of(QWEN), W8A8)
    found = list(model_format("compressed-tensors", QWEN).check(schemes, QWEN))
    experts = [module for module in schemes if ".experts." in module]
    assert [finding.where for finding in found] == experts
    assert "per-token activations (W8A8_DYNAMIC, W4A8_DYNAMIC) only" in found[0].problem


def test_a_quantized_kv_b_proj_that_vllm_can_take_apart_is_accepted(tmp_path: Path) -> None:
    schemes: dict[str, Scheme] = {**schemes_of(DEEPSEEK)}
    schemes.update({f"model.layers.{index}.self_attn.kv_b_proj": W8A8_DYNAMIC for index in range(2)})
    write_experts(tmp_path / "m", DEEPSEEK, schemes=schemes, format_name="compressed-tensors")
    assert FORM.validate(tmp_path / "m") == []


def test_a_plan_for_what_vllm_cannot_run_is_refused() -> None:
    schemes: dict[str, Scheme] = {**schemes_of(CONFIG), K: W8A8_DYNAMIC}
    with pytest.raises(RecipeError, match="vLLM cannot serve this"):
        plan_folder(groups_of(CONFIG), schemes, CONFIG, "bfloat16", format_name="compressed-tensors")


def test_symmetric_static_activations_are_read_and_noted(folder: Path) -> None:
    def make_symmetric(config: dict[str, Any]) -> None:
        config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["symmetric"] = True

    change_json(folder / "config.json", make_symmetric)
    write_manifest(folder)
    assert problems(folder) == []
    assert "AMX" in FORM.notes(read_json(folder / "config.json"))[0]
    linear = CompressedTensorsCheckpoint.open(folder).linear(Q)
    assert isinstance(linear, QuantizedLinear)
    assert linear.input_offset is not None
    assert linear.input_offset.tolist() == [0]


def folder_notes(folder: Path, schemes: dict[str, Scheme]) -> list[str]:
    write_experts(folder, QWEN, schemes=schemes, format_name="compressed-tensors")
    assert FORM.validate(folder) == []
    return FORM.notes(read_json(folder / "config.json"))
