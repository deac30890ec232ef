"""Folders for the MindFormers backend: read back in the Hugging Face order, and every rule broken."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import FloatLinear, QuantizedLinear
from msquant.checkpoint.writer import write_json, write_shard
from msquant.errors import CheckpointError
from msquant.families import row_orders
from msquant.formats.golden_stick.form import GoldenStickFormat
from msquant.formats.golden_stick.layout import DESCRIPTION_NAME, decode_linear
from msquant.formats.golden_stick.reader import GoldenStickCheckpoint
from msquant.formats.summary import summarize
from msquant.schemes import FLOAT, W8A8, W8A8_DYNAMIC
from tests.formats.expert_folders import (
    DEEPSEEK,
    QWEN,
    groups_of,
    random_linear,
    random_tensor,
    schemes_of,
    write_experts,
)
from tests.formats.folders import change_json, change_tensors, stored

FORM = GoldenStickFormat()

LATENT = "model.layers.1.self_attn"
MLP = "model.layers.1.mlp"
UP = f"{MLP}.experts.1.up_proj"
LATER = {**DEEPSEEK, "attention_bias": True}
V2 = {**DEEPSEEK, "model_type": "deepseek_v2", "q_lora_rank": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_experts(tmp_path / "m", DEEPSEEK)
    return tmp_path / "m"


@pytest.mark.parametrize("config", [DEEPSEEK, QWEN, LATER, V2])
def test_layers_and_tensors_come_back(tmp_path: Path, config: dict[str, Any]) -> None:
    plan = write_experts(tmp_path / "m", config)
    source = GoldenStickCheckpoint.open(tmp_path / "m")
    assert source.variant == "mindformers"
    shapes = {name: shape for group in groups_of(config) for name, shape in group.items()}
    for module, scheme in plan.linears.items():
        bias = f"{module}.bias" in shapes
        expected = random_linear(module, shapes[f"{module}.weight"], scheme, bias=bias)
        found = source.linear(module)
        assert type(found) is type(expected)
        if isinstance(found, FloatLinear):
            stored = expected.weight.astype(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(found.weight, stored)
        elif isinstance(expected, QuantizedLinear):
            np.testing.assert_array_equal(found.weight, expected.weight)
            np.testing.assert_allclose(found.weight_scale, expected.weight_scale, rtol=2e-7)
            np.testing.assert_array_equal(found.input_offset, expected.input_offset)
            assert found.is_static == (scheme == W8A8)
        if bias:
            assert found.bias is not None
            np.testing.assert_allclose(found.bias, expected.bias, rtol=2**-8)
    for name, shape in shapes.items():
        if name.rpartition(".")[0] not in plan.linears:
            np.testing.assert_array_equal(source.tensor(name), random_tensor(name, shape))


def test_rows_in_halves_are_stored_as_they_are_and_come_back_interleaved(tmp_path: Path) -> None:
    """MindFormers 1.8.0 refuses the key that says so, and needs none: they are in its order."""
    name = f"{LATENT}.q_b_proj"
    write_experts(tmp_path / "m", {**DEEPSEEK, "rope_interleave": False})
    assert "rope_interleave" not in read_json(tmp_path / "m" / "config.json")
    expected = random_linear(name, (20, 12), W8A8).weight
    np.testing.assert_array_equal(Checkpoint.open(tmp_path / "m").raw(f"{name}.weight"), expected)
    order = row_orders(DEEPSEEK).orders["self_attn.q_b_proj"].interleaved()
    found = GoldenStickCheckpoint.open(tmp_path / "m").linear(name).weight
    np.testing.assert_array_equal(found, expected[order])


def test_rows_come_back_in_their_order(tmp_path: Path) -> None:
    name = f"{LATENT}.q_b_proj"
    write_experts(tmp_path / "m", DEEPSEEK, schemes=dict.fromkeys(schemes_of(DEEPSEEK), FLOAT))
    source = GoldenStickCheckpoint.open(tmp_path / "m")
    whole = source.tensor(f"{name}.weight")
    np.testing.assert_array_equal(source.rows(f"{name}.weight", np.array([19, 7, 8])), whole[[19, 7, 8]])
    linear = source.linear(name)
    np.testing.assert_array_equal(linear.weight, whole)
    assert (whole != Checkpoint.open(tmp_path / "m").tensor(f"{name}.weight")).any()
    assert FORM.validate(tmp_path / "m") == []


@pytest.mark.parametrize("config", [DEEPSEEK, QWEN, LATER, V2])
def test_a_correct_folder_has_no_findings(tmp_path: Path, config: dict[str, Any]) -> None:
    write_experts(tmp_path / "m", config, max_shard_bytes=1500)
    assert FORM.validate(tmp_path / "m", verify_hashes=True) == []


@pytest.mark.parametrize("section", [None, {}, {"quant_method": "golden-stick", "more": 1}])
def test_mindformers_needs_its_section_to_the_letter(folder: Path, section: Any) -> None:
    change_json(folder / "config.json", lambda config: config.update(quantization_config=section))
    (folder / "msquant.json").unlink()
    (found,) = FORM.validate(folder)
    assert found.where == "config.json"
    assert 'only if it is {"quant_method": "golden-stick"}' in found.problem


def test_what_other_tools_write_has_no_findings(folder: Path) -> None:
    scale = Checkpoint.open(folder).raw(f"{UP}.weight_scale")
    column = scale.reshape(-1, 1).astype(ml_dtypes.bfloat16)
    change_tensors(
        folder,
        {f"{UP}.weight_scale": column, f"{UP}.weight_offset": np.zeros_like(column)},
        described=False,
    )
    (folder / "msquant.json").unlink()
    assert FORM.validate(folder) == []
    linear = GoldenStickCheckpoint.open(folder).linear(UP)
    assert isinstance(linear, QuantizedLinear)
    np.testing.assert_allclose(linear.weight_scale, scale, rtol=2**-8)


def described(changes: dict[str, str | None]) -> Callable[[Path], None]:
    def change(description: dict[str, Any]) -> None:
        for module, value in changes.items():
            for name in [name for name in description if name.startswith(f"{module}.")]:
                if value is None:
                    del description[name]
                else:
                    description[name] = value

    return lambda folder: change_json(folder / DESCRIPTION_NAME, change)


def with_first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[0] = value
        return array

    return change


@pytest.mark.parametrize(
    ("spoil", "where", "problem"),
    [
        (stored(f"{UP}.weight_offset", with_first(1)), f"{UP}.weight_offset", "not zero everywhere"),
        (stored(f"{UP}.weight_scale", with_first(0)), f"{UP}.weight_scale", "not positive and finite"),
        (stored(f"{UP}.weight_scale", with_first(np.inf)), f"{UP}.weight_scale", "not positive and finite"),
        (stored(f"{UP}.weight_scale", lambda a: a[1:]), f"{UP}.weight_scale", "has shape [7], [8]"),
        (
            stored(f"{UP}.weight_scale", lambda a: a.astype(np.float64)),
            f"{UP}.weight_scale",
            "stored as F64, BF16 or F32 is expected",
        ),
        (stored(f"{UP}.weight", lambda a: a.astype(np.int16)), f"{UP}.weight", "stored as I16, I8"),
        (stored(f"{UP}.weight", lambda a: a[:-1]), f"{UP}.weight", "config.json says [8, 16]"),
        (
            stored(f"{LATENT}.kv_a_proj_with_mqa.input_offset", lambda a: a + 1),
            f"{LATENT}.kv_a_proj_with_mqa.input_offset",
            "they run as one layer",
        ),
        (
            stored(f"{LATENT}.q_b_proj.quant_bias", with_first(7)),
            f"{LATENT}.q_b_proj.quant_bias",
            "differs from -sum",
        ),
        (described({UP: None}), f"{UP}.weight", "stored, but not described"),
        (described({UP: "FLOAT"}), UP, "run as one layer"),
        (described({f"{LATENT}.o_proj": "W8A8_DYNAMIC"}), f"{LATENT}.o_proj.weight_scale", "missing from a"),
        (described({"lm_head": "W4A8_DYNAMIC"}), "lm_head", "runs int4 weights in routed experts alone"),
        (
            described({"lm_head": "W8A16"}),
            "lm_head.weight",
            "only W8A8, W8A8_DYNAMIC, W4A8_DYNAMIC and FLOAT",
        ),
        (
            lambda folder: write_shard(folder / "old.safetensors", {"x": np.ones(1)}),
            "old.safetensors",
            "does not belong to this model",
        ),
        (
            lambda folder: (
                (folder / "msquant.json").unlink(),
                write_shard(folder / "old.safetensors", {"x": np.ones(1)}),
            ),
            "old.safetensors",
            "MindFormers would load it",
        ),
        (
            lambda folder: write_json(folder / "quantization_description.old.json", {}),
            "quantization_description.old.json",
            "does not belong to this model",
        ),
        (
            lambda folder: (
                (folder / "msquant.json").unlink(),
                write_json(folder / "quantization_description.old.json", {}),
            ),
            "quantization_description.old.json",
            "because of its name",
        ),
        (
            lambda folder: change_json(folder / "msquant.json", lambda m: m.update(variant="both")),
            "msquant.json",
            "variant is 'both'",
        ),
        (
            lambda folder: change_json(folder / "config.json", lambda c: c.update(n_routed_experts=4)),
            f"{MLP}.experts.3.gate_proj.weight",
            "missing: config.json says",
        ),
    ],
)
def test_a_broken_rule_is_found(folder: Path, spoil: Any, where: str, problem: str) -> None:
    spoil(folder)
    found = [finding for finding in FORM.validate(folder) if finding.where == where]
    assert any(problem in finding.problem for finding in found), list(map(str, FORM.validate(folder)))


def test_a_missing_expert_is_found(folder: Path) -> None:
    change_tensors(
        folder,
        {f"{UP}.{part}": None for part in ("weight", "weight_scale", "weight_offset")},
        described=False,
    )
    problems = {finding.where: finding.problem for finding in FORM.validate(folder)}
    assert problems[f"{UP}.weight"]
    assert "missing from a quantized layer" in problems[f"{UP}.weight_scale"]


def test_a_prediction_layer_is_there_as_a_whole_or_not_at_all(folder: Path) -> None:
    change_tensors(folder, {"model.layers.2.eh_proj.weight": None}, described=False)
    change_json(folder / DESCRIPTION_NAME, lambda d: d.pop("model.layers.2.eh_proj.weight"))
    (folder / "msquant.json").unlink()
    assert [str(finding) for finding in FORM.validate(folder)] == [
        "model.layers.2.eh_proj.weight: missing: config.json says the model has it"
    ]
    names = [name for name in Checkpoint.open(folder).names() if name.startswith("model.layers.2.")]
    change_tensors(folder, dict.fromkeys(names), described=False)
    change_json(folder / DESCRIPTION_NAME, lambda d: [d.pop(name) for name in names])
    (folder / "model-00003-of-00004.safetensors").unlink()
    assert FORM.validate(folder) == []


def test_a_layer_per_token_is_stored_exactly() -> None:
    linear = random_linear("a.up_proj", (3, 4), W8A8_DYNAMIC)
    tensors = GoldenStickFormat("mindformers").encode_linear("a.up_proj", linear, "bfloat16")
    assert {name: (array.dtype, array.shape) for name, array in tensors.items()} == {
        "a.up_proj.weight": (np.int8, (3, 4)),
        "a.up_proj.weight_scale": (np.float32, (3,)),
        "a.up_proj.weight_offset": (np.float32, (3,)),
    }
    back = decode_linear("a.up_proj", tensors)
    assert isinstance(linear, QuantizedLinear)
    np.testing.assert_array_equal(back.weight_scale, linear.weight_scale)
    # MindFormers keeps the scales in bfloat16 in a model of that dtype, and in float32 in any other.
    wider = linear.weight_scale * np.float32(1.001)
    tensors["a.up_proj.weight_scale"] = wider
    bfloat16, float16 = (decode_linear("a.up_proj", tensors, dtype) for dtype in ("bfloat16", "float16"))
    np.testing.assert_array_equal(bfloat16.weight_scale, linear.weight_scale)
    np.testing.assert_array_equal(float16.weight_scale, wider)
    assert back.input_scale is None
    assert not tensors["a.up_proj.weight_offset"].any()


def test_a_row_of_zeros_gets_a_scale() -> None:
    linear = QuantizedLinear(np.zeros((2, 3), np.int8), np.zeros(2, np.float32), W8A8_DYNAMIC)
    tensors = GoldenStickFormat("mindformers").encode_linear("a", linear, "bfloat16")
    assert (tensors["a.weight_scale"] == 1).all()


@pytest.mark.parametrize("scale", [0, -1, np.inf, np.nan])
def test_a_bad_weight_scale_is_refused(scale: float) -> None:
    linear = QuantizedLinear(np.ones((2, 3), np.int8), np.full(2, scale, np.float32), W8A8_DYNAMIC)
    with pytest.raises(CheckpointError, match="not positive and finite"):
        GoldenStickFormat("mindformers").encode_linear("a", linear, "bfloat16")
    tensors = {"a.weight": linear.weight, "a.weight_scale": linear.weight_scale}
    with pytest.raises(CheckpointError, match="not positive and finite"):
        decode_linear("a", {**tensors, "a.weight_offset": np.zeros(2)})


def test_weights_that_are_not_symmetric_are_refused(folder: Path) -> None:
    change_tensors(folder, {f"{UP}.weight_offset": np.ones(8, np.float32)}, described=False)
    with pytest.raises(CheckpointError, match="weights as symmetric"):
        GoldenStickCheckpoint.open(folder).linear(UP)


def test_a_projection_that_does_not_fit_the_config_is_refused(folder: Path) -> None:
    change_json(folder / "config.json", lambda config: config.update(qk_nope_head_dim=7))
    with pytest.raises(CheckpointError, match=r"q_b_proj\.weight has shape"):
        GoldenStickCheckpoint.open(folder).linear(f"{LATENT}.q_b_proj")


def test_a_summary_counts_schemes_and_experts(folder: Path) -> None:
    summary = summarize(folder)
    assert (summary.findings, summary.variant, summary.notes) == ([], "mindformers", [])
    # Of two decoder layers: five projections but kv_b_proj; one dense MLP, a shared one and three experts.
    schemes = summary.schemes()
    assert schemes["W8A8"] == (8, 2 * (12 * 16 + 20 * 12 + 14 * 16 + 16 * 10))
    assert schemes["W8A8_DYNAMIC"] == (15, 3 * 24 * 16 + 4 * 3 * 8 * 16)
    assert summary.quantized_parameters == schemes["W8A8"][1] + schemes["W8A8_DYNAMIC"][1]
    assert summary.parameters == sum(elements for _, elements in schemes.values())
    # Three in the decoder layer and three in the prediction layer, which has the same kinds.
    assert summary.experts == 6
    kinds = summary.kinds()
    assert len(kinds["mlp.experts.*.up_proj", "W8A8_DYNAMIC", "I8", (8, 16)]) == 3
    assert len(kinds["mlp.experts.*.up_proj", "FLOAT", "BF16", (8, 16)]) == 3
    up = next(module for module in summary.modules if module.name == UP)
    assert up.weight_scale is not None
    assert 0.9e-4 < up.weight_scale[0] < up.weight_scale[1] < 1.1e-2
    assert (up.input_scale, up.input_offset) == (None, None)
    assert up.nbytes == 8 * 16 + 2 * 4 * 8


def test_what_no_engine_serves_yet_is_noted(tmp_path: Path) -> None:
    write_experts(tmp_path / "m", QWEN)
    summary = summarize(tmp_path / "m")
    assert summary.findings == []
    assert "Qwen3-MoE" in summary.notes[0]
