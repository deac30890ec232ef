"""W4A8_DYNAMIC experts for vllm-ascend: packed along the outputs, computed as the operator does, and back."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import QuantizedLinear, token_scales
from msquant.errors import CheckpointError, RecipeError
from msquant.flows.conversion import export, open_quantized
from msquant.flows.folder_checks import weight_bytes
from msquant.flows.pipeline import quantize
from msquant.formats.ascend import four_bits
from msquant.formats.ascend.form import AscendFormat
from msquant.formats.ascend.layout import DESCRIPTION_NAME
from msquant.formats.folder_plan import plan_folder
from msquant.formats.summary import summarize
from msquant.inference.cpu import onednn
from msquant.kernels.weight_rounding import quantize_weight
from msquant.models.config_json import read_config
from msquant.schemes import W4A8_DYNAMIC, W8A8, Scheme, parse_scheme
from tests.fixtures.tiny_families import write_tiny
from tests.formats.expert_folders import DEEPSEEK, QWEN, groups_of, random_linear, schemes_of, write_experts
from tests.formats.folders import CONFIG, change_json, change_tensors
from tests.test_pipeline_formats import recipe_of

FORM = AscendFormat()
UP, DOWN = (f"model.layers.1.mlp.experts.1.{name}_proj" for name in ("up", "down"))
SIZES = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
MODELS = {"qwen3-moe": {**QWEN, **SIZES}, "deepseek": {**DEEPSEEK, **SIZES, "n_group": 1, "topk_group": 1}}


def four_bit_experts(config: Mapping[str, Any]) -> dict[str, Scheme]:
    """Routed experts in int4, all else as ever."""
    schemes = schemes_of(config)
    own = f".layers.{config['num_hidden_layers']}."
    experts = [module for module in schemes if ".experts." in module and own not in module]
    return schemes | dict.fromkeys(experts, W4A8_DYNAMIC)


def write(folder: Path, config: Mapping[str, Any], name: str = "ascend") -> Path:
    write_experts(folder, config, schemes=four_bit_experts(config), format_name=name)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "m", MODELS["qwen3-moe"])


@pytest.mark.parametrize("model", MODELS)
def test_layers_come_back_as_they_were_written(tmp_path: Path, model: str) -> None:
    folder = write(tmp_path / "m", MODELS[model])
    assert FORM.validate(folder, verify_hashes=True) == []
    source = FORM.open(folder)
    schemes = four_bit_experts(MODELS[model])
    shapes = {name: shape for group in groups_of(MODELS[model]) for name, shape in group.items()}
    experts = [module for module, scheme in schemes.items() if scheme == W4A8_DYNAMIC]
    assert experts
    for module in experts:
        found = source.linear(module)
        expected = random_linear(module, shapes[f"{module}.weight"], W4A8_DYNAMIC)
        assert isinstance(found, QuantizedLinear)
        assert isinstance(expected, QuantizedLinear)
        assert found.scheme == W4A8_DYNAMIC
        np.testing.assert_array_equal(found.weight, expected.weight)
        np.testing.assert_array_equal(found.weight_scale, expected.weight_scale)
    opened = FORM.stored_schemes(Checkpoint.open(folder), list(schemes))
    assert opened == schemes
    summary = summarize(folder)
    assert summary.findings == []
    assert summary.schemes()["W4A8_DYNAMIC"][0] == len(experts)


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
    np.testing.assert_array_equal(four_bits.unpack_rows(parts["weight"]), weight)
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


def test_the_description(folder: Path) -> None:
    description = read_json(folder / DESCRIPTION_NAME)
    assert (description["version"], description["group_size"]) == ("1.0.0", 0)
    assert {description[f"{DOWN}.{part}"] for part in four_bits.PARTS} == {"W4A8_DYNAMIC"}
    assert description["model.layers.0.self_attn.q_proj.weight"] == "W8A8"
    assert description["model_quant_type"] == "W8A8"


@pytest.mark.parametrize("model", MODELS)
def test_conversion_loses_nothing(tmp_path: Path, model: str) -> None:
    """ascend to compressed-tensors and back: every byte of every tensor."""
    folder = write(tmp_path / "m", MODELS[model])
    (vllm,) = export(folder, ["compressed-tensors"])
    assert open_quantized(vllm.folder).linears == open_quantized(folder).linears
    (back,) = export(vllm.folder, ["ascend"])
    ours, again = Checkpoint.open(folder), Checkpoint.open(back.folder)
    assert set(ours.names()) == set(again.names())
    for name in ours.names():
        assert ours.raw(name).tobytes() == again.raw(name).tobytes(), name
    assert read_json(folder / DESCRIPTION_NAME) == read_json(back.folder / DESCRIPTION_NAME)


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
            {k: parse_scheme("W4A8_DYNAMIC_G8") for k in four_bit_experts({**QWEN, **SIZES})},
            "is W4A8_DYNAMIC_G8: in this format msquant writes FLOAT, W8A8, W8A8_DYNAMIC, W4A8_DYNAMIC",
        ),
    ],
)
def test_what_no_version_runs_is_refused_before_any_work(
    config: dict[str, Any], linears: dict[str, Scheme], problem: str
) -> None:
    assert any(problem in str(finding) for finding in FORM.check(linears, config))
    with pytest.raises(RecipeError, match="vllm-ascend cannot serve this"):
        plan_folder(groups_of(config), linears, config, "bfloat16", format_name="ascend")


def stored(part: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        name = f"{DOWN}.{part}"
        change_tensors(folder, {name: change(Checkpoint.open(folder).raw(name))}, described=False)

    return apply


def entry(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: change_json(folder / DESCRIPTION_NAME, lambda d: d.update(changes))


def flipped(array: np.ndarray) -> np.ndarray:
    array[0, 0] ^= 0x7F
    return array


@pytest.mark.parametrize(
    ("spoil", "where", "problem"),
    [
        (stored("weight", flipped), f"{DOWN}.scale_bias", "differs from 8 * weight_scale * sum(weight) in"),
        (stored("scale_bias", lambda a: a + 1), f"{DOWN}.scale_bias", "in 16 of 16 rows"),
        (stored("scale_bias", lambda a: a * np.nan), f"{DOWN}.scale_bias", "in 16 of 16 rows"),
        (stored("scale_bias", lambda a: a[:, :1]), f"{DOWN}.scale_bias", "has shape [16, 1], [16, 16] is"),
        (stored("scale_bias", lambda a: None), f"{DOWN}.scale_bias", "missing from a quantized layer"),
        (stored("weight_scale", lambda a: -a), f"{DOWN}.weight_scale", "not positive and finite"),
        (stored("weight_offset", lambda a: a + 1), f"{DOWN}.weight_offset", "not zero everywhere"),
        (
            stored("weight", lambda a: a[:-1]),
            f"{DOWN}.weight",
            "has shape [14, 16], config.json says [16, 16]",
        ),
        (entry(group_size=256), DESCRIPTION_NAME, "group_size is 256"),
        (entry(group_size=None), DESCRIPTION_NAME, "group_size is None"),
        (entry(version="0.1"), DESCRIPTION_NAME, "version is '0.1'"),
        (
            lambda folder: change_tensors(
                folder, {f"{DOWN}.weight_scale_second": np.ones((16, 2), np.float32)}, described=False
            ),
            f"{DOWN}.weight_scale_second",
            "not in groups",
        ),
    ],
)
def test_a_broken_rule_is_found(folder: Path, spoil: Any, where: str, problem: str) -> None:
    spoil(folder)
    found = [str(finding) for finding in FORM.validate(folder)]
    assert any(one.startswith(where) and problem in one for one in found), found


def test_a_folder_in_groups_is_refused_by_the_reader(folder: Path) -> None:
    change_tensors(folder, {f"{UP}.weight_scale_second": np.ones((16, 2), np.float32)}, described=False)
    with pytest.raises(CheckpointError, match="one scale a row, not in groups"):
        FORM.open(folder).linear(UP)


def test_a_wrong_shape_is_refused_by_the_headers(folder: Path) -> None:
    stored("weight", lambda a: a[:-1])(folder)
    (folder / "msquant.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds a weight of shape \[14, 16\], config.json says \[16, 16\]"
    ):
        open_quantized(folder)


def test_static_attention_beside_the_experts_stays_as_it_was(folder: Path) -> None:
    linear = FORM.open(folder).linear("model.layers.0.self_attn.o_proj")
    assert linear.scheme == W8A8
