"""W4A8_DYNAMIC experts for MindFormers: two rows in a byte, uint64 scales of groups and their size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mindspore_gs.ptq.basic_functions.basic_quant_func import (
    convert_fp32_to_uint64,
    np_int4data_pack_to_int8_3d,
)

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import QuantizedLinear
from msquant.errors import RecipeError
from msquant.formats.folder_plan import plan_folder
from msquant.formats.golden_stick import int4_experts
from msquant.formats.golden_stick.form import GoldenStickFormat
from msquant.formats.golden_stick.layout import DESCRIPTION_NAME
from msquant.formats.summary import summarize
from msquant.schemes import W4A8_DYNAMIC, W8A8, W8A8_DYNAMIC, Scheme, parse_scheme
from tests.formats.expert_folders import (
    DEEPSEEK,
    four_bit_experts,
    groups_of,
    random_linear,
    write_experts,
)
from tests.formats.folders import CONFIG, assert_finds, change_json, stored

SIZED = {**DEEPSEEK, "hidden_size": 64, "moe_intermediate_size": 32}
IN_GROUPS = W4A8_DYNAMIC.in_groups(16)
FORM = GoldenStickFormat.of(SIZED, {})
UP, DOWN = (f"model.layers.1.mlp.experts.1.{name}_proj" for name in ("up", "down"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_experts(tmp_path / "m", SIZED, schemes=four_bit_experts(SIZED, IN_GROUPS))
    return tmp_path / "m"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    write_experts(tmp_path / "rows", SIZED, schemes=four_bit_experts(SIZED))
    return tmp_path / "rows"


@pytest.mark.parametrize("scheme", [W4A8_DYNAMIC, IN_GROUPS])
def test_layers_come_back_as_they_were_written(folder: Path, rows: Path, scheme: Scheme) -> None:
    path = folder if scheme == IN_GROUPS else rows
    assert FORM.validate(path, verify_hashes=True) == []
    source, schemes = FORM.open(path), four_bit_experts(SIZED, scheme)
    shapes = {name: shape for group in groups_of(SIZED) for name, shape in group.items()}
    experts = [module for module, its in schemes.items() if its == scheme]
    assert len(experts) == 9
    for module in experts:
        found = source.linear(module)
        expected = random_linear(module, shapes[f"{module}.weight"], scheme)
        assert isinstance(found, QuantizedLinear)
        assert isinstance(expected, QuantizedLinear)
        assert found.scheme == scheme
        np.testing.assert_array_equal(found.weight, expected.weight)
        np.testing.assert_array_equal(found.weight_scale, expected.weight_scale)
    assert FORM.stored_schemes(Checkpoint.open(path), list(schemes)) == schemes
    summary = summarize(path)
    assert summary.findings == []
    assert summary.schemes()[str(scheme)][0] == 9
    (shown,) = (module for module in summary.modules if module.name == UP)
    up = source.linear(UP)
    assert isinstance(up, QuantizedLinear)
    assert shown.shape == (32, 64)
    assert shown.weight_scale == (up.weight_scale.min(), up.weight_scale.max())


def test_the_bytes_are_golden_sticks_own() -> None:
    """Its packing works on experts `[E, K, N]`, and `MoeParamProcessor` transposes each when it saves."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-8, 8, (8, 32), dtype=np.int8)
    scale = rng.uniform(0.01, 0.02, (8, 2)).astype(np.float32)
    parts = int4_experts.encode(weight, scale, 16)
    assert {name: (part.dtype.str, part.shape) for name, part in parts.items()} == {
        "weight": ("|i1", (4, 32)),
        "weight_scale": ("<u8", (8, 2)),
        "weight_offset": ("<i4", (8, 2)),
    }
    packed = np_int4data_pack_to_int8_3d(np.ascontiguousarray(weight.T[None]))
    np.testing.assert_array_equal(parts["weight"], np.asarray(packed)[0].T.astype(np.int8))
    np.testing.assert_array_equal(parts["weight_scale"], convert_fp32_to_uint64(scale).reshape(8, 2))
    whole, found = int4_experts.decode(UP, parts["weight"], parts["weight_scale"], IN_GROUPS)
    np.testing.assert_array_equal(whole, weight)
    np.testing.assert_array_equal(found, scale)


def test_the_description(folder: Path, rows: Path) -> None:
    description = read_json(folder / DESCRIPTION_NAME)
    assert description["group_size"] == 16
    assert "weight_quant_granularity" not in description
    assert {description[f"{UP}.{part}"] for part in ("weight", "weight_scale", "weight_offset")} == {
        "W4A8_DYNAMIC"
    }
    assert description["model.layers.1.self_attn.o_proj.weight"] == "W8A8"
    assert description["model.layers.1.mlp.shared_experts.up_proj.weight"] == "W8A8_DYNAMIC"
    description = read_json(rows / DESCRIPTION_NAME)
    assert (description["group_size"], description["weight_quant_granularity"]) == (32, "per_channel")
    # Where nothing is in int4, nothing is said of groups.
    eight = four_bit_experts(SIZED, W8A8_DYNAMIC)
    assert "group_size" not in FORM.documents(eight, [f"{UP}.weight"], SIZED)[DESCRIPTION_NAME]


def test_golden_sticks_own_folder_is_read_and_what_it_forgot_is_named(folder: Path) -> None:
    change_json(folder / DESCRIPTION_NAME, lambda description: description.pop("group_size"))
    (folder / "msquant.json").unlink()
    assert FORM.open(folder).linear(UP).scheme == IN_GROUPS
    assert FORM.stored_schemes(Checkpoint.open(folder), [UP]) == {UP: IN_GROUPS}
    (found,) = FORM.validate(folder)
    assert found.where == DESCRIPTION_NAME
    assert 'put "group_size": 16 into it' in found.problem


@pytest.mark.parametrize(
    ("config", "changes", "problem"),
    [
        (
            SIZED,
            {"model.layers.1.self_attn.o_proj": W4A8_DYNAMIC},
            "runs int4 weights in routed experts alone",
        ),
        (SIZED, {"model.layers.0.mlp.down_proj": IN_GROUPS}, "runs int4 weights in routed experts alone"),
        (SIZED, {"model.layers.1.mlp.shared_experts.up_proj": IN_GROUPS}, "in routed experts alone"),
        (SIZED, {DOWN: W8A8_DYNAMIC}, "they run as one layer"),
        (SIZED, {"model.layers.1.mlp.experts.2.up_proj": W4A8_DYNAMIC.in_groups(32)}, "one size of groups"),
        ({**SIZED, "moe_intermediate_size": 8}, {}, "groups of 16 do not divide its 8 inputs"),
        ({**SIZED, "hidden_size": 16}, {}, "its 16 inputs are one group"),
        ({**SIZED, "moe_intermediate_size": 48}, {".experts.": W4A8_DYNAMIC}, "none fits its inputs"),
        (SIZED, {".experts.": parse_scheme("W4A8_DYNAMIC_G16_ASYM")}, "knows only W8A8, W8A8_DYNAMIC"),
        (SIZED, {".experts.": W8A8}, "as W8A8_DYNAMIC or W4A8_DYNAMIC only"),
    ],
)
def test_what_mindformers_does_not_run_is_refused_before_any_work(
    config: dict[str, Any], changes: dict[str, Scheme], problem: str
) -> None:
    linears = four_bit_experts(config, IN_GROUPS)
    for name, scheme in changes.items():
        linears |= {module: scheme for module in linears if name in module and "shared" not in module}
        linears |= {name: scheme} if name in linears else {}
    form = GoldenStickFormat.of(config, {})
    assert any(problem in str(finding) for finding in form.check(linears, config))
    with pytest.raises(RecipeError, match="MindSpore cannot serve this"):
        plan_folder(groups_of(config), linears, config, "bfloat16")


def test_the_native_backend_has_no_int4() -> None:
    linears = {"model.layers.0.mlp.down_proj": W4A8_DYNAMIC}
    (found,) = GoldenStickFormat("native").check(linears, CONFIG)
    assert "the native backend knows only W8A8 and FLOAT" in found.problem


@pytest.mark.parametrize(
    ("spoil", "where", "problem"),
    [
        (
            stored(f"{DOWN}.weight_scale", lambda a: a | np.uint64(1 << 40)),
            f"{DOWN}.weight_scale",
            "more than the bits",
        ),
        (
            stored(f"{DOWN}.weight_scale", lambda a: a | np.uint64(1 << 31)),
            f"{DOWN}.weight_scale",
            "not positive and",
        ),
        (
            stored(f"{DOWN}.weight_scale", lambda a: a[:, :0]),
            f"{DOWN}.weight_scale",
            "no scale for each group",
        ),
        (stored(f"{DOWN}.weight_scale", lambda a: a[:-2]), f"{DOWN}.weight_scale", "[64, 2] is expected"),
        (
            stored(f"{DOWN}.weight_scale", lambda a: None),
            f"{DOWN}.weight_scale",
            "missing from a quantized layer",
        ),
        (stored(f"{DOWN}.weight_offset", lambda a: a + 1), f"{DOWN}.weight_offset", "not zero everywhere"),
        (
            stored(f"{DOWN}.weight", lambda a: a[:-1]),
            f"{DOWN}.weight",
            "has shape [62, 32], config.json says [64, 32]",
        ),
        (
            lambda folder: change_json(folder / DESCRIPTION_NAME, lambda d: d.update(group_size=32)),
            DESCRIPTION_NAME,
            "group_size is 32, and the scales of",
        ),
        (
            lambda folder: change_json(
                folder / DESCRIPTION_NAME, lambda d: d.update(weight_quant_granularity="per_channel")
            ),
            f"{DOWN}.weight_scale",
            "differs within a row",
        ),
    ],
)
def test_a_broken_rule_is_found(folder: Path, spoil: Any, where: str, problem: str) -> None:
    spoil(folder)
    assert_finds(FORM, folder, where, problem)
