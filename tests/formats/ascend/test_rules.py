"""Folders for vllm-ascend: those of msquant and msModelSlim keep every rule, and each broken one is found."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import INDEX_NAME, Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import FloatLinear, QuantizedLinear
from msquant.errors import CheckpointError
from msquant.formats.ascend.form import AscendFormat
from msquant.formats.ascend.layout import DESCRIPTION_NAME
from msquant.formats.ascend.reader import AscendCheckpoint
from msquant.formats.registry import folder_format, model_format
from msquant.schemes import FLOAT, W8A8, W8A8_DYNAMIC, W8A16, Scheme
from tests.formats import folders
from tests.formats.expert_folders import DEEPSEEK, QWEN, random_linear, schemes_of, write_experts
from tests.formats.folders import CONFIG, change_entries, change_json, change_tensors

FORM = AscendFormat()
problems = partial(folders.problems, FORM)

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
DOWN = "model.layers.0.mlp.down_proj"
UP = "model.layers.0.mlp.up_proj"
EXPERT = "model.layers.1.mlp.experts.1.up_proj"
BIASED = {**CONFIG, "attention_bias": True}


def mixed(config: dict[str, Any]) -> dict[str, Scheme]:
    """Static, but for down_proj per token, o_proj by its weights alone, and one that is not quantized."""
    schemes = schemes_of(config)
    schemes.update({module: W8A8_DYNAMIC for module in schemes if module.endswith("down_proj")})
    schemes.update({module: W8A16 for module in schemes if module.endswith("o_proj")})
    return {**schemes, "model.layers.1.mlp.down_proj": FLOAT}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_experts(tmp_path / "m", BIASED, schemes=mixed(BIASED), format_name="ascend")
    return tmp_path / "m"


def describe(names: list[str], linears: dict[str, Scheme]) -> dict[str, Any]:
    description: dict[str, Any] = FORM.documents(linears, names, {})[DESCRIPTION_NAME]
    return description


def change(folder: Path, changes: dict[str, Any]) -> None:
    """Change tensors, and describe new ones like the layer they are in."""
    change_tensors(folder, changes, described=False)
    described = read_json(folder / DESCRIPTION_NAME)
    for name, value in changes.items():
        described[name] = described.get(f"{name.rpartition('.')[0]}.weight", "FLOAT")
        if value is None:
            del described[name]
    (folder / DESCRIPTION_NAME).write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("config", "schemes"),
    [
        pytest.param(CONFIG, mixed(CONFIG), id="llama"),
        pytest.param(BIASED, mixed(BIASED), id="bias"),
        pytest.param({**BIASED, "torch_dtype": "float16"}, mixed(BIASED), id="float16"),
        pytest.param(DEEPSEEK, schemes_of(DEEPSEEK), id="deepseek"),
        pytest.param(QWEN, schemes_of(QWEN), id="qwen3-moe"),
    ],
)
def test_a_written_folder_keeps_the_rules_and_is_what_was_written(
    tmp_path: Path, config: dict[str, Any], schemes: dict[str, Scheme]
) -> None:
    write_experts(tmp_path / "m", config, schemes=schemes, format_name="ascend")
    assert FORM.validate(tmp_path / "m", verify_hashes=True) == []
    form = folder_format(tmp_path / "m")
    assert form is not None
    assert form.name == "ascend"
    source = form.open(tmp_path / "m")
    for module, scheme in schemes.items():
        linear = source.linear(module)
        bias = linear.bias is not None
        assert bias == (bool(config.get("attention_bias")) and "self_attn" in module)
        expected = random_linear(module, linear.weight.shape, scheme, bias=bias)
        assert isinstance(linear, FloatLinear) == (scheme == FLOAT)
        if isinstance(linear, QuantizedLinear) and isinstance(expected, QuantizedLinear):
            np.testing.assert_array_equal(linear.weight, expected.weight)
            np.testing.assert_allclose(linear.weight_scale, expected.weight_scale, rtol=3e-7)
            assert linear.scheme == expected.scheme
            assert (linear.input_reciprocal is not None) == scheme.is_static
    assert form.stored_schemes(Checkpoint.open(tmp_path / "m"), schemes) == schemes


def test_an_input_scale_without_a_reciprocal_in_the_models_dtype_is_found(tmp_path: Path) -> None:
    config = {**CONFIG, "torch_dtype": "float16"}
    write_experts(tmp_path / "m", config, schemes=mixed(config), format_name="ascend")
    change(tmp_path / "m", {f"{UP}.input_scale": np.full(1, 1e-5, np.float32)})
    found = [text for text in problems(tmp_path / "m") if "reciprocal" in text]
    assert found == [f"{UP}.input_scale: is 1e-05, whose reciprocal is infinite or 0 in float16"]
    with pytest.raises(CheckpointError, match="not positive and finite"):
        AscendCheckpoint.open(tmp_path / "m").linear(UP)


def test_scales_are_read_as_vllm_ascend_rounds_them(folder: Path) -> None:
    before = AscendCheckpoint.open(folder).linear(DOWN)
    assert isinstance(before, QuantizedLinear)
    wider = (before.weight_scale * np.float32(1.001)).reshape(-1, 1)
    change(folder, {f"{DOWN}.weight_scale": wider})
    again = AscendCheckpoint.open(folder).linear(DOWN)
    assert isinstance(again, QuantizedLinear)
    np.testing.assert_array_equal(again.weight_scale, before.weight_scale)


def test_the_description_has_what_vllm_ascend_and_msmodelslim_expect() -> None:
    names = [f"{Q}.weight", f"{Q}.deq_scale", f"{Q}.bias", f"{DOWN}.weight", "model.norm.weight"]
    assert describe(names, {Q: W8A8, DOWN: W8A8_DYNAMIC}) == {
        "lm_head.weight": "FLOAT",
        f"{DOWN}.weight": "W8A8_DYNAMIC",
        f"{Q}.bias": "FLOAT",
        f"{Q}.deq_scale": "W8A8",
        f"{Q}.weight": "W8A8",
        "model.norm.weight": "FLOAT",
        "version": "1.0.0",
        "model_quant_type": "W8A8",
        "metadata": {},
        "group_size": 0,
    }
    assert describe([f"{DOWN}.weight"], {DOWN: W8A8_DYNAMIC})["model_quant_type"] == "W8A8_DYNAMIC"
    alone = describe([f"{DOWN}.weight", f"{DOWN}.weight_scale"], {DOWN: W8A16})
    assert alone["model_quant_type"] == alone[f"{DOWN}.weight_scale"] == "W8A16"


def test_a_folder_of_msmodelslim_is_found_and_read(folder: Path) -> None:
    """Its shards and its index have other names, and it has no manifest."""
    (folder / "msquant.json").unlink()
    for path in folder.glob("*.safetensors"):
        path.rename(folder / path.name.replace("model-", "quant_model_weights-"))
    index = (folder / INDEX_NAME).read_text().replace('"model-', '"quant_model_weights-')
    (folder / INDEX_NAME).unlink()
    (folder / "quant_model_weights.safetensors.index.json").write_text(index)
    change_json(folder / DESCRIPTION_NAME, lambda description: description.update(optional={}))
    form = folder_format(folder)
    assert form is not None
    assert form.name == "ascend"
    assert form.validate(folder) == []
    assert isinstance(form.open(folder).linear(Q), QuantizedLinear)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{Q}.quant_bias", None, f"{Q}.quant_bias: missing from a quantized layer"),
        (f"{Q}.quant_bias", np.ones(16, np.int32), "in 16 of 16 rows"),
        (
            f"{Q}.deq_scale",
            np.ones(16, np.int64),
            "stored as I64, the form of float32 bits, F32 is expected",
        ),
        (f"{Q}.deq_scale", np.full(16, -1, np.float32), "not positive and finite"),
        (f"{Q}.input_scale", np.ones(16, np.float32), "has shape [16], [1] is expected"),
        (f"{Q}.input_scale", np.full(1, np.nan, np.float32), "not positive and finite"),
        (f"{Q}.input_scale", np.full(1, 3, np.float32), f"{K}.input_scale: differs from {Q}.input_scale"),
        (f"{Q}.input_offset", np.full(1, 0.5, np.float32), "is not an integer in [-128, 127]"),
        (f"{Q}.input_offset", np.full(1, 130, np.float32), "is not an integer in [-128, 127]"),
        (f"{Q}.weight", np.ones((16, 16), np.float16), "stored as F16, I8 is expected"),
        (f"{Q}.weight", np.ones(16, np.int8), "has shape [16], a matrix [N, K] is expected"),
        (f"{Q}.bias", np.full(16, np.inf, np.float32), "holds NaN or infinity"),
        (f"{Q}.bias", np.full(16, 50, np.float32), "differs from round(bias / deq_scale)"),
        (f"{K}.bias", None, "one of them has no bias"),
        (f"{DOWN}.weight_scale", np.ones(16, np.float32), "has shape [16], [16, 1] is expected"),
        (f"{DOWN}.weight_scale", np.zeros((16, 1), np.float32), "not positive and finite"),
        (f"{DOWN}.weight_offset", np.ones((16, 1), np.float32), "the engine takes weights as symmetric"),
        ("model.layers.1.mlp.down_proj.weight", np.ones((16, 24), np.int8), "described as FLOAT"),
        ("model.norm.weight", np.full(16, np.inf, ml_dtypes.bfloat16), "holds NaN or infinity"),
        ("model.norm.weight", None, "model.norm.weight: missing: config.json says the model has it"),
    ],
)
def test_a_broken_tensor_is_found(folder: Path, name: str, value: Any, message: str) -> None:
    change(folder, {name: value})
    assert any(message in problem for problem in problems(folder)), problems(folder)


def test_a_float16_model_needs_the_bits_of_deq_scale_as_int64(tmp_path: Path) -> None:
    config = {**CONFIG, "torch_dtype": "float16"}
    write_experts(tmp_path / "m", config, schemes=schemes_of(config), format_name="ascend")
    source = AscendCheckpoint.open(tmp_path / "m")
    stored, before = source.checkpoint.raw(f"{Q}.deq_scale"), source.linear(Q)
    assert isinstance(before, QuantizedLinear)
    assert stored.dtype == np.int64
    change(tmp_path / "m", {f"{Q}.deq_scale": stored.astype(np.int32).view(np.float32)})
    assert any("stored as F32, I64 is expected" in problem for problem in problems(tmp_path / "m"))
    # What it means is the same, and it is read.
    linear = AscendCheckpoint.open(tmp_path / "m").linear(Q)
    assert isinstance(linear, QuantizedLinear)
    np.testing.assert_array_equal(linear.weight_scale, before.weight_scale)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {f"{Q}.weight": "W4A8"},
            f"{Q}.weight: described as 'W4A8': "
            "only FLOAT, W8A8, W8A8_DYNAMIC, W8A8_MIX, W4A8_DYNAMIC and W8A16",
        ),
        ({f"{Q}.deq_scale": "W8A8_DYNAMIC"}, f"{Q}.deq_scale: described as W8A8_DYNAMIC, but the layer's"),
        ({f"{Q}.smooth": "W8A8"}, f"{Q}.smooth: described, but not stored"),
        ({f"{Q}.deq_scale": None}, f"{Q}.deq_scale: stored, but not described"),
        ({"lm_head.weight": None}, "does not describe lm_head.weight"),
        ({"fa_quant_type": "FAQuant"}, "fa_quant_type is 'FAQuant': a quantized cache or attention"),
        (
            {"fa_quant_type": "FAKQuant"},
            "fa_quant_type: is 'FAKQuant' in the description, but no layer has a fa_k.scale",
        ),
        ({"indexer_quant_type": "INT8_DYNAMIC"}, "indexer_quant_type is 'INT8_DYNAMIC': a quantized cache"),
        (
            {"model.layers.0.self_attn.quant_type": "Q_FP8_DYNAMIC_KV_FP8"},
            "model.layers.0.self_attn.quant_type is 'Q_FP8_DYNAMIC_KV_FP8': a quantized cache or attention",
        ),
        ({"kv_cache_type": "C4"}, "kv_cache_type is 'C4': a quantized cache"),
        (
            {"kv_cache_type": "C8"},
            "kv_cache_type: is 'C8' in the description, but no layer has a kv_cache_scale",
        ),
        ({"metadata": {"quarot": {}}}, "activations that are rotated while the model runs"),
    ],
)
def test_a_broken_description_is_found(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_entries(folder / DESCRIPTION_NAME, changes)
    assert any(message in problem for problem in problems(folder)), problems(folder)


def test_a_layer_in_a_scheme_that_is_not_computed_is_an_error_when_it_is_read(folder: Path) -> None:
    change_json(folder / DESCRIPTION_NAME, lambda d: d.update({f"{Q}.weight": "W4A4_DYNAMIC"}))
    with pytest.raises(CheckpointError, match="W4A4_DYNAMIC is not computed by msquant") as caught:
        AscendCheckpoint.open(folder).linear(Q)
    assert Q in str(caught.value)


def test_a_layer_with_a_missing_part_is_an_error_when_it_is_read(folder: Path) -> None:
    change(folder, {f"{Q}.quant_bias": None})
    with pytest.raises(CheckpointError, match="missing from a quantized layer"):
        AscendCheckpoint.open(folder).linear(Q)


def test_norms_with_a_bias_are_refused(folder: Path) -> None:
    change(folder, {"model.layers.0.input_layernorm.bias": np.ones(16, np.float32)})
    with pytest.raises(CheckpointError, match="outlier suppression"):
        AscendCheckpoint.open(folder)


@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_a_section_that_vllm_would_read_instead_is_found(folder: Path, key: str) -> None:
    change_json(folder / "config.json", lambda config: config.update({key: {"quant_method": "fp8"}}))
    assert any("vLLM reads it instead" in problem for problem in problems(folder))


def test_a_float32_model_is_found(folder: Path) -> None:
    change_json(folder / "config.json", lambda config: config.update(torch_dtype="float32"))
    assert any("runs this format in bfloat16 or float16" in problem for problem in problems(folder))


def test_a_missing_description_is_an_error(folder: Path) -> None:
    (folder / DESCRIPTION_NAME).unlink()
    with pytest.raises(CheckpointError):
        AscendCheckpoint.open(folder)
    assert any(DESCRIPTION_NAME in problem for problem in problems(folder))


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (CONFIG, {K: W8A8_DYNAMIC}, f"{K}: is W8A8_DYNAMIC, unlike {Q} (W8A8): they run as one layer"),
        (CONFIG, {Q: W8A16}, f"{K}: is W8A8, unlike {Q} (W8A16): they run as one layer"),
        (CONFIG, {"lm_head": W8A8_DYNAMIC}, "vllm-ascend takes the output head in floating point only"),
        (QWEN, {EXPERT: FLOAT}, "they run as one layer"),
        (QWEN, {EXPERT: W8A8}, "per-token activations (W8A8_DYNAMIC, W4A8_DYNAMIC) only"),
        (
            QWEN,
            {EXPERT: W8A16},
            "is W8A16: vllm-ascend runs routed experts with per-token",
        ),
        (DEEPSEEK, {"model.layers.1.self_attn.kv_b_proj": W8A8_DYNAMIC}, "which it folds into the attention"),
        (DEEPSEEK, {"model.layers.0.self_attn.q_a_proj": FLOAT}, "they run as one layer"),
    ],
)
def test_schemes_that_vllm_ascend_cannot_run_are_named(
    config: dict[str, Any], change: dict[str, Scheme], message: str
) -> None:
    form = model_format("ascend", config)
    assert list(form.check(schemes_of(config), config)) == []
    found = [str(finding) for finding in form.check({**schemes_of(config), **change}, config)]
    assert any(message in finding for finding in found), found
