"""Folders of GPTQ, AWQ and AutoRound: read to the bit, exported to the bit, and refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.weights import QuantizedLinear
from msquant.errors import CheckpointError, ModelError, RecipeError
from msquant.flows.conversion import export, open_quantized
from msquant.flows.source import open_source, shapes_plans
from msquant.formats.registry import find_format, folder_format, format_names, parse_formats, readable_formats
from msquant.formats.summary import summarize
from msquant.models.config_json import read_config
from msquant.recipe.recipe import validate_recipe
from msquant.schemes import parse_scheme
from tests.formats.folders import change_json, change_tensors
from tests.formats.qweight_folders import SECTIONS, Values, write_qweight

UP = "model.layers.1.mlp.up_proj"


def assert_holds(folder: Path, made: dict[str, Values], bits: int, *, symmetric: bool) -> None:
    source, middle = open_quantized(folder), 1 << (bits - 1)
    assert set(source.linears) == set(made)
    for module, values in made.items():
        linear = source.weights.linear(module)
        assert isinstance(linear, QuantizedLinear)
        np.testing.assert_array_equal(linear.weight, values.integers - middle)
        stored = linear.weight_scale.reshape(values.scales.shape)
        np.testing.assert_array_equal(stored, values.scales.astype(np.float32))
        if symmetric:
            assert linear.weight_offset is None
        else:
            assert linear.weight_offset is not None
            zeros = linear.weight_offset.reshape(values.zeros.shape) + middle
            np.testing.assert_array_equal(zeros, values.zeros)
        np.testing.assert_array_equal(linear.float_weight, values.weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("kind", SECTIONS)
def test_every_layout_is_read_and_exported_to_the_bit(
    tmp_path: Path, kind: str, group_size: int, symmetric: bool
) -> None:
    """As it is, and after compressed-tensors has taken it: the same integers, scales and zero points."""
    made = write_qweight(tmp_path / "m", kind, group_size=group_size, symmetric=symmetric)
    assert_holds(tmp_path / "m", made, 4, symmetric=symmetric)
    word = ("W4A16_G32" if group_size > 0 else "W4A16_CHANNEL") + ("" if symmetric else "_ASYM")
    summary = summarize(tmp_path / "m")
    assert summary.findings == []
    assert summary.schemes()[word][0] == 14
    assert all(module.weight_scale for module in summary.modules if module.scheme == word)
    (result,) = export(tmp_path / "m", ["compressed-tensors"])
    assert_holds(result.folder, made, 4, symmetric=symmetric)
    form = folder_format(result.folder)
    assert form is not None
    assert form.validate(result.folder, verify_hashes=True) == []


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("kind", ["gptq", "gptq-v2"])
def test_other_widths(tmp_path: Path, kind: str, bits: int) -> None:
    made = write_qweight(tmp_path / "m", kind, bits=bits)
    assert_holds(tmp_path / "m", made, bits, symmetric=False)
    (result,) = export(tmp_path / "m", ["compressed-tensors"])
    assert_holds(result.folder, made, bits, symmetric=False)


@pytest.mark.parametrize("kind", ["gptq", "gptq-v2"])
def test_groups_in_an_order_of_their_own_are_read_and_not_exported(tmp_path: Path, kind: str) -> None:
    """`desc_act`: compressed-tensors would need the order too, so no group is made of other columns."""
    made = write_qweight(tmp_path / "m", kind, ordered=True, section={"desc_act": True})
    assert summarize(tmp_path / "m").findings == []
    assert_holds(tmp_path / "m", made, 4, symmetric=False)
    with pytest.raises(CheckpointError, match="order of their own") as raised:
        export(tmp_path / "m", ["compressed-tensors"])
    assert raised.value.remedy
    assert not (tmp_path / "m-compressed-tensors").exists()


def test_groups_in_an_order_of_their_own_of_compressed_tensors(tmp_path: Path) -> None:
    """llm-compressor's `actorder: group`: the group of each column is in `weight_g_idx`."""
    made = write_qweight(tmp_path / "m")
    (result,) = export(tmp_path / "m", ["compressed-tensors"])
    folder = result.folder
    (folder / "msquant.json").unlink()
    weights = {"actorder": "group"}
    change_json(
        folder / "config.json",
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(weights),
    )
    rng = np.random.default_rng(1)
    orders = {m: rng.permutation(values.groups).astype(np.int32) for m, values in made.items()}
    change_tensors(folder, {f"{m}.weight_g_idx": order for m, order in orders.items()}, described=False)
    assert summarize(folder).findings == []
    linear = open_quantized(folder).weights.linear(UP)
    assert isinstance(linear, QuantizedLinear)
    np.testing.assert_array_equal(linear.float_weight, replace(made[UP], groups=orders[UP]).weight)
    change_tensors(folder, {f"{UP}.weight_g_idx": orders[UP] + 1}, described=False)
    with pytest.raises(CheckpointError, match="names groups from 1 to 2, there are 2"):
        open_quantized(folder).weights.linear(UP)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_scales_keep_their_digits_in_a_model_of_another_dtype(tmp_path: Path, dtype: str) -> None:
    """The scales are in float16, which bfloat16 does not hold."""
    made = write_qweight(tmp_path / "m", config={"torch_dtype": dtype})
    (result,) = export(tmp_path / "m", ["compressed-tensors"])
    assert Checkpoint.open(result.folder).dtype(f"{UP}.weight_scale") == "F16"
    assert_holds(result.folder, made, 4, symmetric=False)


@pytest.mark.parametrize("name", ["golden-stick", "ascend"])
def test_formats_that_do_not_hold_it_say_so(tmp_path: Path, name: str) -> None:
    write_qweight(tmp_path / "m")
    with pytest.raises(CheckpointError, match=f"cannot be exported as {name}: .*W4A16_G32_ASYM"):
        export(tmp_path / "m", [name])


def test_what_is_said_of_single_layers(tmp_path: Path) -> None:
    """GPTQModel's `dynamic` and AutoRound's `extra_config` name layers by patterns."""
    dynamic = {r"+:.*down_proj": {"group_size": 96}, r"-:.*\.0\..*v_proj": {}}
    write_qweight(tmp_path / "m", section={"dynamic": dynamic})
    form = folder_format(tmp_path / "m")
    assert form is not None
    found = {finding.where for finding in form.validate(tmp_path / "m")}
    downs = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    parts = {f"{down}.{part}" for down in downs for part in ("qzeros", "scales")}
    assert {where.rpartition(", ")[2] for where in found} >= {*parts, "model.layers.0.self_attn.v_proj"}
    assert not any("layers.1.self_attn" in where for where in found)
    write_qweight(tmp_path / "n", "auto-round", section={"extra_config": {UP: {"bits": 8}}})
    assert form.stored_schemes(Checkpoint.open(tmp_path / "m"), [UP])[UP] == parse_scheme("W4A16_G32_ASYM")
    with pytest.raises(CheckpointError, match="up_proj"):
        open_quantized(tmp_path / "n").weights.linear(UP)


@pytest.mark.parametrize(
    ("kind", "section", "problem"),
    [
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin', gptq or gptq_v2 is read"),
        ("gptq", {"checkpoint_format": 2}, "checkpoint_format is 2"),
        ("gptq", {"bits": 3}, "bits is 3, 2 or 4 or 8 is read"),
        ("gptq", {"bits": None}, "bits is None"),
        ("gptq", {"group_size": "128"}, "group_size is '128'"),
        ("gptq", {"sym": "yes"}, "sym is 'yes'"),
        ("gptq", {"pack_dtype": "int64"}, "pack_dtype is 'int64', 'int32' is read"),
        ("gptq", {"rotation": "hadamard"}, "rotation is 'hadamard': that is not computed"),
        ("gptq", {"dynamic": {"+:(": {}}}, "not a regular expression"),
        ("gptq", {"dynamic": {"+:.*": {"bits": 5}}}, r"bits of dynamic\['\+:\.\*'\] is 5"),
        ("awq", {"version": "gemv"}, "version is 'gemv', gemm is read"),
        ("awq", {"bits": 8}, "bits is 8, 4 is read"),
        ("awq", {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert is not a list"),
        ("auto-round", {"packing_format": "auto_round:fp8"}, "packing_format is 'auto_round:fp8'"),
        ("auto-round", {"data_type": "mx_fp"}, "data_type is 'mx_fp', 'int' is read"),
        ("auto-round", {"act_bits": 8}, "act_bits is 8, 16 is read"),
        ("auto-round", {"extra_config": [1]}, "extra_config is not a map"),
    ],
)
def test_what_config_json_says_and_is_not_computed_is_named(
    tmp_path: Path, kind: str, section: dict[str, Any], problem: str
) -> None:
    write_qweight(tmp_path / "m", kind, section=section)
    with pytest.raises(CheckpointError, match=problem) as raised:
        open_quantized(tmp_path / "m")
    assert "config.json" in str(raised.value.where)
    assert raised.value.remedy
    assert any(finding.where == "config.json" for finding in summarize(tmp_path / "m").findings)


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("gptq", {"qweight": np.zeros((7, 96), np.int32)}, r"shape \[96, 56\], config.json says \[96, 64\]"),
        ("gptq", {"qweight": np.zeros((8, 96), np.int64)}, "stored as I64, I32 is expected"),
        ("gptq", {"qzeros": None}, "missing from a quantized layer"),
        ("gptq", {"qzeros": np.zeros((2, 11), np.int32)}, r"has shape \[2, 11\], \[2, 12\] is expected"),
        (
            "gptq",
            {"qzeros": np.full((2, 12), -1, np.int32)},
            "zero points of 15, from which 1 was taken away",
        ),
        ("gptq", {"scales": np.full((2, 96), np.inf, np.float16)}, "holds a scale that is 0 or not finite"),
        ("gptq", {"scales": np.ones((3, 96), np.float16)}, r"has shape \[3, 96\], \[2, 96\] is expected"),
        ("gptq", {"g_idx": np.full(64, 2, np.int32)}, "names groups from 2 to 2, there are 2"),
        (
            "gptq",
            {"g_idx": np.array([0] * 63 + [2**32 + 1])},
            "names groups from 0 to 4294967297, there are 2",
        ),
        ("gptq", {"g_idx": np.zeros(63, np.int32)}, r"has shape \[63\], \[64\] is expected"),
        ("gptq", {"lora_A": np.zeros((4, 4), np.float16)}, "is no tensor of this layout"),
        ("awq", {"qweight": np.zeros((64, 13), np.int32)}, r"shape \[104, 64\], config.json says \[96, 64\]"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, kind: str, changes: dict[str, Any], problem: str
) -> None:
    write_qweight(tmp_path / "m", kind)
    change_tensors(
        tmp_path / "m", {f"{UP}.{part}": value for part, value in changes.items()}, described=False
    )
    findings = summarize(tmp_path / "m").findings
    assert any(UP in finding.where for finding in findings), findings
    with pytest.raises(CheckpointError, match=problem) as raised:
        open_quantized(tmp_path / "m").weights.linear(UP)
    assert UP in f"{raised.value.where} {raised.value.what}"


def test_a_layer_without_numbers_is_named(tmp_path: Path) -> None:
    write_qweight(tmp_path / "m", group_size=-1)
    empty = {"qweight": np.zeros((0, 96), np.int32), "g_idx": np.zeros(0, np.int32)}
    empty |= {"qzeros": np.zeros((0, 12), np.int32), "scales": np.zeros((0, 96), np.float16)}
    change_tensors(tmp_path / "m", {f"{UP}.{part}": value for part, value in empty.items()}, described=False)
    with pytest.raises(CheckpointError, match="holds no numbers"):
        find_format("gptq")().open(tmp_path / "m").linear(UP)
    assert f"{UP}.qweight: holds no numbers" in map(str, summarize(tmp_path / "m").findings)


def test_the_names_of_a_folder_are_not_sorted_for_each_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, sorted_names, calls = write_qweight(tmp_path / "m"), Checkpoint.names, []
    monkeypatch.setattr(Checkpoint, "names", lambda checkpoint: calls.append(1) or sorted_names(checkpoint))
    assert find_format("gptq")().validate(tmp_path / "m") == []
    assert 0 < len(calls) < len(made)


def test_a_description_that_contradicts_the_tensors(tmp_path: Path) -> None:
    write_qweight(tmp_path / "m", section={"sym": True})
    with pytest.raises(CheckpointError, match="other zero points than 8, but config"):
        open_quantized(tmp_path / "m").weights.linear(UP)
    write_qweight(tmp_path / "a", "awq", section={"modules_to_not_convert": ["up_proj"]})
    weights = find_format("awq")().open(tmp_path / "a")
    with pytest.raises(CheckpointError, match="leaves the layer in floating point"):
        weights.linear(UP)
    assert any(UP in finding.where for finding in summarize(tmp_path / "a").findings)


def test_no_quantization_starts_from_it(tmp_path: Path) -> None:
    write_qweight(tmp_path / "m", "awq")
    with pytest.raises(ModelError, match="is quantized already, as awq"):
        open_source(str(tmp_path / "m"))
    recipe = validate_recipe({"model": str(tmp_path / "m")}, "test")
    with pytest.raises(ModelError, match="is quantized already, as awq"):
        shapes_plans(recipe, read_config(tmp_path / "m"), [])


def test_a_truncated_file(tmp_path: Path) -> None:
    write_qweight(tmp_path / "m")
    shard = next((tmp_path / "m").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=shard.name):
        open_quantized(tmp_path / "m")


def test_no_recipe_and_no_option_can_name_what_is_only_read(tmp_path: Path) -> None:
    only_read = set(readable_formats()) - set(format_names())
    assert only_read == {"gptq", "awq", "auto-round"}
    for name in only_read:
        with pytest.raises(RecipeError):
            parse_formats(name)
        with pytest.raises(RecipeError, match="reads and does not write"):
            find_format(name)().part_specs("m", (8, 8), parse_scheme("W4A16"), "float16")
    write_qweight(tmp_path / "m")
    assert json.dumps(summarize(tmp_path / "m").notes).count("does not write") == 1
