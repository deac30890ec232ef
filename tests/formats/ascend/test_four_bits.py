"""W4A8_DYNAMIC experts for vllm-ascend: packed along the outputs, computed as the operator does, and back.

With one scale a row, and in groups.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import QuantizedLinear, token_scales
from msquant.errors import CheckpointError, RecipeError
from msquant.flows.conversion import open_quantized
from msquant.flows.folder_checks import weight_bytes
from msquant.flows.pipeline import quantize
from msquant.formats.ascend import four_bits
from msquant.formats.ascend.form import AscendFormat
from msquant.formats.ascend.layout import DESCRIPTION_NAME
from msquant.formats.folder_plan import plan_folder
from msquant.formats.int4_rows import unpack_rows
from msquant.formats.summary import summarize
from msquant.kernels import onednn
from msquant.kernels.weight_rounding import quantize_weight
from msquant.models.config_json import read_config
from msquant.schemes import W4A8_DYNAMIC, W8A8, Scheme, parse_scheme
from tests.fixtures.tiny_families import write_tiny
from tests.formats.expert_folders import (
    DEEPSEEK,
    QWEN,
    four_bit_experts,
    groups_of,
    random_linear,
    schemes_of,
    write_experts,
)
from tests.formats.folders import CONFIG, assert_finds, change_json, change_tensors, stored
from tests.test_pipeline_formats import recipe_of

FORM = AscendFormat()
UP, DOWN = (f"model.layers.1.mlp.experts.1.{name}_proj" for name in ("up", "down"))
SIZES = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
MODELS = {"qwen3-moe": {**QWEN, **SIZES}, "deepseek": {**DEEPSEEK, **SIZES, "n_group": 1, "topk_group": 1}}


IN_GROUPS = W4A8_DYNAMIC.in_groups(8)


def write(folder: Path, config: Mapping[str, Any], scheme: Scheme = W4A8_DYNAMIC) -> Path:
    write_experts(folder, config, schemes=four_bit_experts(config, scheme), format_name="ascend")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "m", MODELS["qwen3-moe"])


@pytest.fixture
def grouped(tmp_path: Path) -> Path:
    return write(tmp_path / "grouped", MODELS["qwen3-moe"], IN_GROUPS)


@pytest.mark.parametrize("scheme", [W4A8_DYNAMIC, IN_GROUPS])
@pytest.mark.parametrize("model", MODELS)
def test_layers_come_back_as_they_were_written(tmp_path: Path, model: str, scheme: Scheme) -> None:
    folder = write(tmp_path / "m", MODELS[model], scheme)
    assert FORM.validate(folder, verify_hashes=True) == []
    source = FORM.open(folder)
    schemes = four_bit_experts(MODELS[model], scheme)
    shapes = {name: shape for group in groups_of(MODELS[model]) for name, shape in group.items()}
    experts = [module for module, its in schemes.items() if its == scheme]
    assert experts
    for module in experts:
        found = source.linear(module)
        expected = random_linear(module, shapes[f"{module}.weight"], scheme)
        assert isinstance(found, QuantizedLinear)
        assert isinstance(expected, QuantizedLinear)
        assert found.scheme == scheme
        np.testing.assert_array_equal(found.weight, expected.weight)
        np.testing.assert_array_equal(found.weight_scale, expected.weight_scale)
    opened = FORM.stored_schemes(Checkpoint.open(folder), list(schemes))
    assert opened == schemes
    summary = summarize(folder)
    assert summary.findings == []
    assert summary.schemes()[str(scheme)][0] == len(experts)
    (shown,) = (module for module in summary.modules if module.name == DOWN)
    linear = source.linear(DOWN)
    assert isinstance(linear, QuantizedLinear)
    assert shown.weight_scale == (linear.weight_scale.min(), linear.weight_scale.max())


def test_bytes_hold_rows_in_pairs_and_the_operators_two_halves_add_up() -> None:
    """As `pack_to_int32` and the operator take them: nibbles of x, and `scale_bias` for what is taken off."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-8, 8, (8, 32), dtype=np.int8)
    scale = rng.uniform(0.01, 0.02, 8).astype(np.float32)
    parts = four_bits.encode(DOWN, weight, scale)
    assert {name: (part.dtype.str, part.shape) for name, part in parts.items()} == {
        "weight": ("|i1", (4, 32)),
        "weight_scale": ("<f4", (8, 1)),
        "weight_offset": ("<f4", (8, 1)),
        "scale_bias": ("<f4", (8, 16)),
    }
    packed = parts["weight"].view(np.uint8)
    for row in range(8):
        nibble = packed[row // 2] >> 4 if row % 2 else packed[row // 2] & 0xF
        np.testing.assert_array_equal((nibble.astype(np.int8) ^ 8) - 8, weight[row])
    np.testing.assert_array_equal(unpack_rows(parts["weight"]), weight)
    x = rng.normal(size=(5, 32)).astype(np.float32)
    s = token_scales(x)
    quantized = np.rint(x / s).astype(np.int64)
    high, low = quantized >> 4, (quantized & 0xF) - 8
    sums = (16 * high + low) @ weight.T.astype(np.int64) * scale.astype(np.float64)
    ideal = quantized @ weight.T.astype(np.int64) * scale.astype(np.float64)
    np.testing.assert_allclose(sums + parts["scale_bias"].sum(1), ideal, rtol=1e-5, atol=1e-6)
    # Processors that share the inputs each add the part of their own.
    for share in range(4):
        own = slice(8 * share, 8 * share + 8)
        added = parts["scale_bias"][:, 4 * share : 4 * share + 4].sum(1)
        np.testing.assert_allclose(added, 8 * scale * weight[:, own].sum(1), rtol=1e-5, atol=1e-6)


def test_a_scale_of_a_group_is_made_of_two_in_float16() -> None:
    """As `process_scale` multiplies them; `scale_bias` takes each column's own, wherever a part begins."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-8, 8, (8, 48), dtype=np.int8)
    scale = rng.uniform(0.01, 0.02, (8, 6)).astype(np.float16).astype(np.float32)
    parts = four_bits.encode(DOWN, weight, scale)
    assert {name: (part.dtype.str, part.shape) for name, part in parts.items()} == {
        "weight": ("|i1", (4, 48)),
        "weight_scale": ("<f4", (8, 1)),
        "weight_offset": ("<f4", (8, 1)),
        "scale_bias": ("<f4", (8, 16)),
        "weight_scale_second": ("<f4", (8, 6)),
        "weight_offset_second": ("<f4", (8, 6)),
    }
    products = parts["weight_scale"] * parts["weight_scale_second"]
    np.testing.assert_array_equal(products.astype(np.float16).astype(np.float32), scale)
    exact = (8 * weight * np.repeat(scale, 8, axis=1).astype(np.float64)).reshape(8, 16, 3).sum(2)
    np.testing.assert_allclose(parts["scale_bias"], exact, rtol=1e-6, atol=1e-7)
    # Another tool's two stages, of which the engine keeps what float16 does.
    scheme = W4A8_DYNAMIC.in_groups(8)
    first, second = rng.uniform(1e-3, 2e-3, (8, 1)), rng.uniform(5, 9, (8, 6))
    stages = {f"{DOWN}.weight_scale": first, f"{DOWN}.weight_scale_second": second}
    found = four_bits.scales({k: v.astype(np.float32) for k, v in stages.items()}, DOWN, scheme)
    assert (found == found.astype(np.float16)).all()
    np.testing.assert_allclose(found, first * second, rtol=2**-10)


def test_a_scale_that_float16_does_not_hold_is_refused() -> None:
    scale = np.full((8, 2), 0.0123456, np.float32)
    with pytest.raises(CheckpointError, match="more digits than float16 holds") as caught:
        four_bits.encode(DOWN, np.zeros((8, 32), np.int8), scale)
    assert "compressed-tensors" in str(caught.value.remedy)


def test_the_description_of_groups(grouped: Path) -> None:
    description = read_json(grouped / DESCRIPTION_NAME)
    assert (description["version"], description["group_size"]) == ("1.0.0", 8)
    parts = four_bits.parts_of(IN_GROUPS)
    assert {description[f"{DOWN}.{part}"] for part in parts} == {"W4A8_DYNAMIC"}


def test_the_description(folder: Path) -> None:
    description = read_json(folder / DESCRIPTION_NAME)
    assert (description["version"], description["group_size"]) == ("1.0.0", 0)
    assert {description[f"{DOWN}.{part}"] for part in four_bits.PARTS} == {"W4A8_DYNAMIC"}
    assert description["model.layers.0.self_attn.q_proj.weight"] == "W8A8"
    assert description["model_quant_type"] == "W8A8"


def test_the_bytes_that_an_engine_holds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for each int4, of which a stored byte is two."""
    monkeypatch.setattr(onednn, "load_int8", object)
    config = MODELS["qwen3-moe"]
    eight = {
        k: parse_scheme("W8A8_DYNAMIC") if v == W4A8_DYNAMIC else v
        for k, v in four_bit_experts(config).items()
    }
    plain = folder.with_name("plain")
    write_experts(plain, config, schemes=eight, format_name="ascend")
    four, whole = (weight_bytes(Checkpoint.open(each), read_config(each)) for each in (folder, plain))
    added = sum(
        4 * size[1] * size[0]
        for module, scheme in four_bit_experts(config).items()
        if scheme == W4A8_DYNAMIC and (size := (16, 16 if module.endswith("down_proj") else 1))
    )
    assert four == whole + added


@pytest.mark.parametrize("predictions", ["quantized", "none"])
def test_a_model_is_quantized_so_with_and_without_its_prediction_layer(
    predictions: str, tmp_path: Path
) -> None:
    source = write_tiny(tmp_path / "float", "deepseek_v3", dtype="bfloat16", prediction_layers=1)
    schemes = [
        {"kv_b_proj": "FLOAT"},
        {"mlp.experts.": "W4A8_DYNAMIC"},
        {"mlp.": "W8A8_DYNAMIC"},
        {"*": "W8A8"},
    ]
    recipe = recipe_of(source, "ascend", schemes=schemes).replace("evaluation", sequences=0)
    recipe = recipe.model_copy(update={"prediction_layers": predictions})
    folder = quantize(recipe, tmp_path / "quantized", remember=False).folder
    assert FORM.validate(folder, verify_hashes=True) == []
    opened, original = open_quantized(folder), Checkpoint.open(source)
    experts = [module for module, scheme in opened.linears.items() if scheme == W4A8_DYNAMIC]
    written = {name.split(".")[2] for name in opened.checkpoint.names() if ".layers." in name}
    if predictions == "none":
        assert written == {"0", "1"}
        assert len(experts) == 3 * 8
    else:
        assert written == {"0", "1", "2"}
        assert len(experts) == 2 * 3 * 8
    weight, found = original.tensor(f"{experts[0]}.weight"), opened.weights.linear(experts[0])
    assert isinstance(found, QuantizedLinear)
    # Rounded to nearest, with scales that bfloat16 holds.
    expected = quantize_weight(weight, "bfloat16", parse_scheme("W4A8_DYNAMIC").weights)
    np.testing.assert_array_equal(found.weight, expected.weight)
    np.testing.assert_array_equal(found.weight_scale, expected.scale)


@pytest.mark.parametrize(
    ("config", "linears", "problem"),
    [
        (CONFIG, dict.fromkeys(schemes_of(CONFIG), W4A8_DYNAMIC), "layers than routed experts"),
        (
            {**QWEN, **SIZES},
            {**four_bit_experts({**QWEN, **SIZES}), "model.layers.0.self_attn.o_proj": W4A8_DYNAMIC},
            "layers than routed experts",
        ),
        (QWEN, four_bit_experts(QWEN), "16, the parts of scale_bias, do not divide its 8 inputs"),
        (
            {**QWEN, **SIZES, "hidden_size": 12},
            four_bit_experts({**QWEN, **SIZES}),
            "is W4A8_DYNAMIC: 8 do not divide its 12 rows",
        ),
        (
            {**QWEN, **SIZES, "moe_intermediate_size": 6},
            four_bit_experts({**QWEN, **SIZES}),
            "is W4A8_DYNAMIC: 4 do not divide its 6 rows",
        ),
        (
            {**QWEN, **SIZES},
            {k: parse_scheme("W4A16_G8") for k in four_bit_experts({**QWEN, **SIZES})},
            "is W4A16_G8: in this format msquant writes FLOAT, W8A8, W8A8_DYNAMIC, W8A8_MIX, W4A8_DYNAMIC",
        ),
        (
            {**QWEN, **SIZES},
            dict.fromkeys(four_bit_experts({**QWEN, **SIZES}), IN_GROUPS),
            "layers than routed experts",
        ),
        (
            {**QWEN, **SIZES},
            {**four_bit_experts({**QWEN, **SIZES}), UP: IN_GROUPS},
            "is W4A8_DYNAMIC_G8, unlike model.layers.0.mlp.experts.0.",
        ),
        (
            {**QWEN, **SIZES, "moe_intermediate_size": 32},
            four_bit_experts({**QWEN, **SIZES}, W4A8_DYNAMIC.in_groups(16)) | {DOWN: IN_GROUPS},
            "(W4A8_DYNAMIC_G16): a folder has one size of groups",
        ),
    ],
)
def test_what_no_version_runs_is_refused_before_any_work(
    config: dict[str, Any], linears: dict[str, Scheme], problem: str
) -> None:
    assert any(problem in str(finding) for finding in FORM.check(linears, config))
    with pytest.raises(RecipeError, match="vllm-ascend cannot serve this"):
        plan_folder(groups_of(config), linears, config, "bfloat16", format_name="ascend")


def entry(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / DESCRIPTION_NAME, lambda d: d.update(changes))


def flipped(array: np.ndarray) -> np.ndarray:
    array[0, 0] ^= 0x7F
    return array


@pytest.mark.parametrize(
    ("spoil", "where", "problem"),
    [
        (stored(f"{DOWN}.weight", flipped), f"{DOWN}.scale_bias", "differs from 8 * sum(scale * weight) in"),
        (stored(f"{DOWN}.scale_bias", lambda a: a + 1), f"{DOWN}.scale_bias", "in 16 of 16 rows"),
        (stored(f"{DOWN}.scale_bias", lambda a: a * np.nan), f"{DOWN}.scale_bias", "in 16 of 16 rows"),
        (
            stored(f"{DOWN}.scale_bias", lambda a: a[:, :1]),
            f"{DOWN}.scale_bias",
            "has shape [16, 1], [16, 16] is",
        ),
        (
            stored(f"{DOWN}.scale_bias", lambda a: None),
            f"{DOWN}.scale_bias",
            "missing from a quantized layer",
        ),
        (stored(f"{DOWN}.weight_scale", lambda a: -a), f"{DOWN}.weight_scale", "not positive and finite"),
        (stored(f"{DOWN}.weight_offset", lambda a: a + 1), f"{DOWN}.weight_offset", "not zero everywhere"),
        (
            stored(f"{DOWN}.weight", lambda a: a[:-1]),
            f"{DOWN}.weight",
            "has shape [14, 16], config.json says [16, 16]",
        ),
        (entry(group_size=256), f"{DOWN}.weight_scale_second", "missing from a quantized layer"),
        (entry(group_size=None), DESCRIPTION_NAME, "group_size is None"),
        (entry(group_size=-1), DESCRIPTION_NAME, "group_size is -1"),
        (entry(group_size=10**30), DESCRIPTION_NAME, "group_size is 1000000"),
        (stored(f"{DOWN}.weight", lambda a: a[0, 0]), f"{DOWN}.weight", "has shape"),
        (entry(version="0.1"), f"{DOWN}.scale_bias", "only version 1.0.0 has it, with packed weights"),
        (
            lambda folder: change_tensors(
                folder, {f"{DOWN}.weight_scale_second": np.ones((16, 2), np.float32)}, described=False
            ),
            f"{DOWN}.weight_scale_second",
            "with group_size 0 int4 weights are read with one scale a row",
        ),
    ],
)
def test_a_broken_rule_is_found(folder: Path, spoil: Any, where: str, problem: str) -> None:
    spoil(folder)
    assert_finds(FORM, folder, where, problem)


@pytest.mark.parametrize(
    ("spoil", "where", "problem"),
    [
        (stored(f"{DOWN}.weight", flipped), f"{DOWN}.scale_bias", "differs from 8 * sum(scale * weight) in"),
        (
            stored(f"{DOWN}.weight_scale_second", lambda a: a[:, :1]),
            f"{DOWN}.weight_scale_second",
            "has shape [16, 1]",
        ),
        (
            stored(f"{DOWN}.weight_scale_second", lambda a: -a),
            f"{DOWN}.weight_scale_second",
            "not positive and",
        ),
        (
            stored(f"{DOWN}.weight_scale_second", lambda a: a * 1e-9),
            f"{DOWN}.weight_scale_second",
            "or 0 in float16",
        ),
        (
            stored(f"{DOWN}.weight_offset_second", lambda a: a + 1),
            f"{DOWN}.weight_offset_second",
            "not zero every",
        ),
        (entry(group_size=6), f"{DOWN}.weight", "groups of 6 do not divide its 16 inputs"),
        (entry(group_size=4), f"{DOWN}.weight_scale_second", "[16, 4] is expected"),
        (entry(version="0.1"), f"{DOWN}.scale_bias", "only version 1.0.0 has it, with packed weights"),
    ],
)
def test_a_broken_rule_of_groups_is_found(grouped: Path, spoil: Any, where: str, problem: str) -> None:
    spoil(grouped)
    assert_finds(FORM, grouped, where, problem)


def test_offsets_of_groups_as_msmodelslim_has_them(grouped: Path) -> None:
    stored(f"{DOWN}.weight_offset_second", lambda a: a.astype(np.int64))(grouped)
    (grouped / "msquant.json").unlink()
    assert FORM.validate(grouped) == []
    assert FORM.open(grouped).linear(DOWN).scheme == IN_GROUPS


def test_a_folder_that_says_it_has_no_groups_is_refused_by_the_reader(folder: Path) -> None:
    change_tensors(folder, {f"{UP}.weight_scale_second": np.ones((16, 2), np.float32)}, described=False)
    with pytest.raises(CheckpointError, match="are read with one scale a row"):
        FORM.open(folder).linear(UP)


def test_a_wrong_shape_is_refused_by_the_headers(folder: Path) -> None:
    stored(f"{DOWN}.weight", lambda a: a[:-1])(folder)
    (folder / "msquant.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds a weight of shape \[14, 16\], config.json says \[16, 16\]"
    ):
        open_quantized(folder)


def test_static_attention_beside_the_experts_stays_as_it_was(folder: Path) -> None:
    linear = FORM.open(folder).linear("model.layers.0.self_attn.o_proj")
    assert linear.scheme == W8A8
