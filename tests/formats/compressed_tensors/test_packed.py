"""`pack-quantized`: the package's own compressor packs the same bytes, and reads what we wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    preset_name_to_scheme,
)
from safetensors.torch import load_file

from msquant.checkpoint.weights import QuantizedLinear
from msquant.errors import CheckpointError, RecipeError
from msquant.flows.conversion import export, open_quantized
from msquant.flows.pipeline import quantize
from msquant.formats.compressed_tensors.form import CompressedTensorsFormat
from msquant.formats.compressed_tensors.packed import decode_linear, encode_parts, pack, unpack
from msquant.formats.compressed_tensors.reader import CompressedTensorsCheckpoint
from msquant.formats.compressed_tensors.section import make_section, read_section
from msquant.formats.folder_plan import plan_folder
from msquant.formats.summary import summarize
from msquant.kernels.weight_rounding import quantize_weight
from msquant.schemes import FLOAT, W4A16, W8A8_DYNAMIC, Scheme, parse_scheme
from tests.fixtures.tiny_families import write_tiny
from tests.formats.expert_folders import groups_of, schemes_of
from tests.formats.folders import CONFIG, change_json, change_tensors
from tests.test_pipeline_formats import recipe_of

PACKAGE = BaseCompressor.load_from_registry("pack-quantized")
FORM = CompressedTensorsFormat()
UP = "model.layers.1.mlp.up_proj"


def package_scheme(scheme: Scheme) -> QuantizationScheme:
    quant = scheme.weights
    assert quant is not None
    arguments = QuantizationArgs(
        num_bits=quant.bits,
        type="int",
        symmetric=quant.symmetric,
        strategy=quant.granularity,
        group_size=quant.group_size,
    )
    return QuantizationScheme(targets=["Linear"], weights=arguments)


def rounded(shape: tuple[int, int], scheme: Scheme, dtype: str) -> tuple[np.ndarray, QuantizedLinear]:
    weight = np.random.default_rng(sum(shape)).normal(0.1, 1, shape).astype(np.float32)
    assert scheme.weights is not None
    integers, scale, offset = quantize_weight(weight, dtype, scheme.weights)
    return weight, QuantizedLinear(integers, scale, scheme, weight_offset=offset)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("word", "shape"),
    [
        ("W4A16", (40, 256)),
        ("W4A16_G64_ASYM", (40, 128)),
        ("W4A16_CHANNEL_ASYM", (40, 128)),
        ("W8A16", (24, 64)),
        ("W8A16_G32_ASYM", (24, 64)),
        ("W2A16_G32", (16, 64)),
        # What does not fill the last number is 0, in weights and in zero points.
        ("W4A16_G4_ASYM", (13, 20)),
    ],
)
def test_every_byte_equals_the_packages(word: str, shape: tuple[int, int], dtype: str) -> None:
    scheme = parse_scheme(word)
    weight, linear = rounded(shape, scheme, dtype)
    parts = encode_parts("m", linear, dtype)
    groups = linear.weight_scale.reshape(shape[0], -1)
    state = {"weight": torch.from_numpy(weight), "weight_scale": torch.from_numpy(groups)}
    if linear.weight_offset is not None:
        zero_point = linear.weight_offset.reshape(groups.shape).astype(np.int8)
        state["weight_zero_point"] = torch.from_numpy(zero_point)
    theirs = PACKAGE.compress(state, package_scheme(scheme))
    assert set(parts) == set(theirs) == set(PACKAGE.compression_param_names(package_scheme(scheme)))
    for part in set(parts) - {"weight_scale"}:
        assert parts[part].tobytes() == theirs[part].numpy().tobytes(), part
        assert parts[part].shape == tuple(theirs[part].shape), part
        assert str(parts[part].dtype) == str(theirs[part].dtype).removeprefix("torch."), part
    # It leaves the scales as they are given; we store them in the model's dtype, which holds them.
    np.testing.assert_array_equal(parts["weight_scale"].astype(np.float32), groups)
    assert str(parts["weight_scale"].dtype) == dtype
    back = decode_linear("m", {f"m.{part}": values for part, values in parts.items()}, scheme)
    np.testing.assert_array_equal(back.weight, linear.weight)
    opened = PACKAGE.decompress(theirs, package_scheme(scheme))["weight"]
    np.testing.assert_allclose(opened.numpy(), back.float_weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_and_back(bits: int) -> None:
    limit = 1 << (bits - 1)
    values = np.random.default_rng(bits).integers(-limit, limit, (5, 37), dtype=np.int8)
    np.testing.assert_array_equal(unpack(pack(values, bits), bits, 37), values)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3", "qwen3_moe", "deepseek_v3"])
def result(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A float folder and what the recipe made of it; its sizes are multiples of 16, few of 128."""
    output = tmp_path_factory.mktemp("packed")
    source = write_tiny(output / "float", request.param, dtype="bfloat16")
    recipe = recipe_of(source, "compressed-tensors", schemes=[{"*": "W4A16_G16"}])
    recipe = recipe.replace("evaluation", sequences=0)
    return source, quantize(recipe, output / "quantized", remember=False).folder


def test_a_folder_of_every_family(result: tuple[Path, Path]) -> None:
    source, folder = result
    opened = open_quantized(folder)
    assert FORM.validate(folder, verify_hashes=True) == []
    assert set(opened.linears.values()) == {parse_scheme("W4A16_G16")}
    floats = {k: t for path in source.glob("*.safetensors") for k, t in load_file(path).items()}
    stored = {k: t for path in folder.glob("*.safetensors") for k, t in load_file(path).items()}
    scheme = package_scheme(parse_scheme("W4A16_G16"))
    for module in opened.linears:
        scale = stored[f"{module}.weight_scale"]
        assert scale.dtype == torch.bfloat16
        state = {"weight": floats[f"{module}.weight"].float(), "weight_scale": scale.float()}
        for part, theirs in PACKAGE.compress(state, scheme).items():
            assert torch.equal(stored[f"{module}.{part}"], theirs.to(stored[f"{module}.{part}"].dtype)), part
    others = {name for name in stored if name.rpartition(".")[0] not in opened.linears}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= others
    assert not [name for name in others if stored[name].dtype not in (torch.bfloat16, torch.float32)]
    summary = summarize(folder)
    assert summary.variant == "pack-quantized"
    assert summary.weight_bits == [4]
    shapes = {module.name: module.shape for module in summary.modules}
    assert all(shapes[module] == tuple(floats[f"{module}.weight"].shape) for module in opened.linears)
    manifest = json.loads((folder / "msquant.json").read_text())
    assert manifest["recipe"]["quantization"]["schemes"] == [{"*": "W4A16_G16"}]


@pytest.mark.parametrize("word", ["W4A16", "W4A16_G32_ASYM", "W8A16", "W8A16_G64"])
def test_the_section_is_the_packages(word: str) -> None:
    schemes = dict.fromkeys(schemes_of(CONFIG), parse_scheme(word))
    section = make_section(schemes, [name for group in groups_of(CONFIG) for name in group])
    read = QuantizationConfig.model_validate(section)
    assert (section["format"], read.ignore) == ("pack-quantized", ["lm_head"])
    (group,) = read.config_groups.values()
    assert group.format == "pack-quantized"
    expected = package_scheme(parse_scheme(word)).weights
    assert expected is not None
    assert group.weights == expected
    assert group.input_activations is None
    if word == "W4A16":
        preset = preset_name_to_scheme("W4A16", ["Linear"]).weights
        assert preset is not None
        same = ("num_bits", "type", "symmetric", "group_size", "strategy", "dynamic", "actorder")
        assert all(getattr(preset, key) == getattr(group.weights, key) for key in same)
    (found,) = read_section({"quantization_config": section}).groups
    assert found.scheme == parse_scheme(word)


def test_groups_of_two_layouts_name_their_own() -> None:
    schemes = schemes_of(CONFIG) | {m: W4A16 for m in schemes_of(CONFIG) if ".mlp." in m}
    section = make_section(schemes, [name for group in groups_of(CONFIG) for name in group])
    assert section["format"] == "mixed-precision"
    read = QuantizationConfig.model_validate(section)
    formats = {str(group.format) for group in read.config_groups.values()}
    assert formats == {"int-quantized", "pack-quantized"}
    ours = read_section({"quantization_config": section})
    for module, scheme in schemes.items():
        group = ours.group(module)
        assert (group.scheme if group else FLOAT) == scheme, module


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_bits", 3, "num_bits of the weights of group_0 is 3"),
        ("type", "float", "type of the weights"),
        ("actorder", "dynamic", "actorder of the weights"),
        ("strategy", "block", "strategy of the weights"),
        ("group_size", None, "group_size of the weights of group_0 is None"),
        ("group_size", 100_000, "group_size of the weights of group_0 is 100000"),
        ("dynamic", True, "dynamic of the weights"),
    ],
)
def test_what_cannot_be_computed_is_refused(key: str, value: Any, message: str) -> None:
    schemes = dict.fromkeys(schemes_of(CONFIG), W4A16)
    section = make_section(schemes, [name for group in groups_of(CONFIG) for name in group])
    section["config_groups"]["group_0"]["weights"][key] = value
    with pytest.raises(CheckpointError) as caught:
        read_section({"quantization_config": section})
    assert message in str(caught.value)


def test_groups_that_do_not_divide_a_layers_inputs_are_refused_before_any_work(
    tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as caught:
        quantize(recipe_of(tiny_llama, "compressed-tensors", schemes=[{"*": "W4A16"}]), tmp_path / "out")
    assert caught.value.where == "model.layers.0.self_attn.q_proj"
    assert "groups of 128 do not divide its 64 inputs" in str(caught.value)
    assert "groups of 64 or 32 fit: W4A16_G64" in str(caught.value.remedy)
    assert "{model.layers.0.self_attn.q_proj: FLOAT}" in str(caught.value.remedy)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["golden-stick", "ascend"])
def test_a_format_that_does_not_hold_it_says_so_before_any_work(
    name: str, tiny_llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="W4A16_G64") as caught:
        quantize(recipe_of(tiny_llama, name, schemes=[{"*": "W4A16_G64"}]), tmp_path / "out")
    assert "another format: compressed-tensors" in str(caught.value.remedy)
    assert list(tmp_path.iterdir()) == []


def test_a_width_that_does_not_fill_a_number_is_refused() -> None:
    with pytest.raises(RecipeError, match="is W6A16: in this format msquant writes"):
        plan_folder(
            groups_of(CONFIG),
            dict.fromkeys(schemes_of(CONFIG), parse_scheme("W6A16")),
            CONFIG,
            "bfloat16",
            format_name="compressed-tensors",
        )


def test_a_weight_takes_four_bits_and_an_eighth() -> None:
    shapes = {"model.layers.0.self_attn.o_proj.weight": (4096, 4096)}
    plan = plan_folder(
        [shapes],
        {"model.layers.0.self_attn.o_proj": W4A16},
        CONFIG,
        "bfloat16",
        format_name="compressed-tensors",
    )
    # Two numbers say the shape.
    assert (plan.tensor_bytes - 16) * 8 == 4.125 * 4096 * 4096


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    schemes = [{"down_proj": "W8A8_DYNAMIC"}, {"*": "W4A16_G32_ASYM"}]
    recipe = recipe_of(tiny_llama, "compressed-tensors", schemes=schemes).replace("evaluation", sequences=0)
    return quantize(recipe, tmp_path / "m", remember=False).folder


def test_a_mixed_folder_is_read_in_both_layouts(folder: Path) -> None:
    assert FORM.validate(folder) == []
    source = CompressedTensorsCheckpoint.open(folder)
    assert source.linear(UP).scheme == parse_scheme("W4A16_G32_ASYM")
    assert source.linear("model.layers.1.mlp.down_proj").scheme == W8A8_DYNAMIC
    assert summarize(folder).variant == "mixed-precision"


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("weight_scale", None, "weight_scale: missing from a quantized layer"),
        ("weight_zero_point", None, "weight_zero_point: missing from a quantized layer"),
        ("weight_scale", np.ones((128, 1), np.float32), "has shape [128, 1], [128, 2] is expected"),
        ("weight_scale", np.zeros((128, 2), np.float32), "holds a scale that is 0 or not finite"),
        ("weight_packed", np.zeros((128, 8), np.int16), "stored as I16, I32 is expected"),
        ("weight_shape", np.array([128, 32]), "has shape [128, 32], config.json says [128, 64]"),
        ("weight_shape", np.array([128]), "is not the shape of a matrix"),
        ("weight_shape", np.ones(2, np.float32), "is not the shape of a matrix"),
    ],
)
def test_damage_is_found(folder: Path, part: str, value: Any, message: str) -> None:
    change_tensors(folder, {f"{UP}.{part}": value}, described=False)
    found = [str(finding) for finding in FORM.validate(folder)]
    assert any(UP in finding and message in finding for finding in found), found


def test_a_packed_layer_that_is_ignored_is_found(folder: Path) -> None:
    change_json(folder / "config.json", lambda c: c["quantization_config"]["ignore"].append(UP))
    found = [str(finding) for finding in FORM.validate(folder)]
    assert any(f"{UP}.weight_packed: stored as I32, but config.json does not" in one for one in found), found


@pytest.mark.parametrize("name", ["golden-stick", "ascend"])
def test_an_export_to_a_format_that_does_not_hold_it_is_refused(name: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "float", "llama", dtype="bfloat16")
    recipe = recipe_of(source, "compressed-tensors", schemes=[{"*": "W4A16_G32"}])
    folder = quantize(recipe.replace("evaluation", sequences=0), tmp_path / "m", remember=False).folder
    with pytest.raises(CheckpointError, match=f"cannot be exported as {name}") as caught:
        export(folder, [name], output=tmp_path / "exported")
    assert "W4A16_G32" in str(caught.value)
    assert not (tmp_path / "exported").exists()


def test_int8_weights_alone_come_from_ascend_and_go_back(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "float", "llama", dtype="bfloat16")
    recipe = recipe_of(source, "ascend", schemes=[{"*": "W8A16"}]).replace("evaluation", sequences=0)
    first = quantize(recipe, tmp_path / "first", remember=False).folder
    export(first, ["compressed-tensors"], output=tmp_path / "packed")
    export(tmp_path / "packed", ["ascend"], output=tmp_path / "again")
    before, after = (load_file(next(path.glob("*-00001-of-*"))) for path in (first, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
