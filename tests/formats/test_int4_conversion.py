"""int4 experts from any format that holds them to any other and back: the same integers, the same scales."""

from pathlib import Path

import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import QuantizedLinear
from msquant.errors import CheckpointError
from msquant.flows.conversion import export, open_quantized
from msquant.formats.registry import folder_format, format_names
from msquant.schemes import W4A8_DYNAMIC, W4A16, Scheme
from tests.formats.expert_folders import DEEPSEEK, QWEN, four_bit_experts, write_experts
from tests.formats.folders import change_json, change_tensors

SIZES = {"hidden_size": 64, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
MODELS = {"qwen3-moe": {**QWEN, **SIZES}, "deepseek": {**DEEPSEEK, **SIZES, "n_group": 1, "topk_group": 1}}
IN_GROUPS = W4A8_DYNAMIC.in_groups(16)
UP = "model.layers.1.mlp.experts.1.up_proj"


def write(folder: Path, name: str, scheme: Scheme, model: str = "deepseek") -> Path:
    write_experts(folder, MODELS[model], schemes=four_bit_experts(MODELS[model], scheme), format_name=name)
    return folder


def assert_equal_numbers(one: Path, other: Path, scheme: Scheme) -> None:
    mine, theirs = open_quantized(one), open_quantized(other)
    assert mine.linears == theirs.linears
    experts = [module for module, its in mine.linears.items() if its == scheme]
    assert len(experts) in (9, 18)
    for module in experts:
        a, b = mine.weights.linear(module), theirs.weights.linear(module)
        assert isinstance(a, QuantizedLinear)
        assert isinstance(b, QuantizedLinear)
        np.testing.assert_array_equal(a.weight, b.weight)
        np.testing.assert_array_equal(a.weight_scale, b.weight_scale)


@pytest.mark.parametrize("scheme", [W4A8_DYNAMIC, IN_GROUPS])
@pytest.mark.parametrize("model", MODELS)
def test_all_formats_hold_the_same_numbers(tmp_path: Path, model: str, scheme: Scheme) -> None:
    """From each to the two others, and from those back: every byte of every tensor and of the description."""
    first, *others = format_names()
    folder = write(tmp_path / "m", first, scheme, model)
    for result in export(folder, others):
        assert_equal_numbers(folder, result.folder, scheme)
        form = folder_format(result.folder)
        assert form is not None
        assert form.validate(result.folder, verify_hashes=True) == []
        for back in export(result.folder, [name for name in format_names() if name != result.format]):
            assert_equal_numbers(folder, back.folder, scheme)
            if back.format != first:
                continue
            ours, again = Checkpoint.open(folder), Checkpoint.open(back.folder)
            assert set(ours.names()) == set(again.names())
            for name in ours.names():
                assert ours.raw(name).tobytes() == again.raw(name).tobytes(), name
            description = "quantization_description.json"
            assert read_json(folder / description) == read_json(back.folder / description)


@pytest.mark.parametrize("name", ["golden-stick", "compressed-tensors"])
def test_scales_of_another_tool_that_float16_does_not_hold_are_not_rounded(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "m", name, IN_GROUPS)
    scale = Checkpoint.open(folder).raw(f"{UP}.weight_scale")
    if scale.dtype == np.uint64:
        scale |= np.uint64(1)
    else:
        scale = np.nextafter(scale, np.float32(1))
    change_tensors(folder, {f"{UP}.weight_scale": scale}, described=False)
    (folder / "msquant.json").unlink()
    with pytest.raises(CheckpointError, match="more digits than float16 holds"):
        export(folder, ["ascend"])
    assert not (tmp_path / "m-ascend").exists()
    other = next(one for one in format_names() if one not in (name, "ascend"))
    (result,) = export(folder, [other])
    assert_equal_numbers(folder, result.folder, IN_GROUPS)


def test_scales_of_groups_are_not_those_of_rows(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", "golden-stick", IN_GROUPS)
    change_json(
        folder / "quantization_description.json", lambda d: d.update(weight_quant_granularity="per_channel")
    )
    (folder / "msquant.json").unlink()
    with pytest.raises(CheckpointError, match="differs within a row"):
        export(folder, ["ascend"])
    assert not (tmp_path / "m-ascend").exists()


@pytest.mark.parametrize("target", ["golden-stick", "ascend"])
def test_packed_weights_have_no_other_format(tmp_path: Path, target: str) -> None:
    folder = write(tmp_path / "m", "compressed-tensors", W4A16.in_groups(16))
    with pytest.raises(CheckpointError, match=f"cannot be exported as {target}"):
        export(folder, [target])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"moe_intermediate_size": 48}, "of groups of 256, 128, 64, 32 columns, in which its scales are"),
        ({"hidden_size": 96}, None),
    ],
)
def test_a_row_is_stored_in_groups_that_fit(tmp_path: Path, changes: dict[str, int], problem: str) -> None:
    config = MODELS["deepseek"] | changes
    write_experts(tmp_path / "m", config, schemes=four_bit_experts(config), format_name="ascend")
    if problem:
        with pytest.raises(CheckpointError, match=problem):
            export(tmp_path / "m", ["golden-stick"])
        return
    (result,) = export(tmp_path / "m", ["golden-stick"])
    assert Checkpoint.open(result.folder).shape(f"{UP}.weight_scale") == (32, 3)
