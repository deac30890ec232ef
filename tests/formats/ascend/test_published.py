"""What msModelSlim publishes beside what msquant writes: W8A8_MIX, older int4 weights, int4 in any linear.

The layouts are written here by their definition: msModelSlim 26.1.0, save/ascendv1.py `on_w8a8_pd_mix` and
`on_w4a8_dynamic`; vllm-ascend 0.23.0, quantization/methods/w4a8.py and w8a8_pdmix.py.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.weights import QuantizedLinear
from msquant.checkpoint.writer import shard_name, write_index, write_json, write_shard
from msquant.errors import CheckpointError, RecipeError
from msquant.families import expected_shapes
from msquant.flows.comparison import compare
from msquant.flows.conversion import export, open_quantized
from msquant.flows.engines import open_prefill, open_weights
from msquant.flows.pipeline import quantize
from msquant.formats.ascend.form import AscendFormat
from msquant.formats.ascend.layout import DESCRIPTION_NAME
from msquant.formats.dtypes import cast
from msquant.formats.folder_plan import plan_folder
from msquant.formats.int4_rows import unpack_rows
from msquant.formats.summary import summarize
from msquant.recipe.recipe import validate_recipe
from msquant.schemes import W4A8_DYNAMIC, W8A8_DYNAMIC, W8A8_MIX, Scheme, parse_scheme
from tests.fixtures.tiny_model import write_tiny_llama
from tests.formats.expert_folders import QWEN, four_bit_experts, groups_of, schemes_of, write_experts
from tests.formats.folders import CONFIG, change_json, change_tensors

MOE: dict[str, Any] = {**QWEN, "hidden_size": 64, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
DENSE: dict[str, Any] = {**CONFIG, "hidden_size": 64, "intermediate_size": 96}
UP, QUERY = "model.layers.1.mlp.experts.1.up_proj", "model.layers.0.self_attn.q_proj"


def mixed(config: dict[str, Any]) -> dict[str, Scheme]:
    """Attention for servers that read prompts and write answers apart, experts per token."""
    return {module: W8A8_MIX if ".self_attn." in module else W8A8_DYNAMIC for module in schemes_of(config)}


@pytest.fixture
def mix(tmp_path: Path) -> Path:
    write_experts(tmp_path / "mix", MOE, schemes=mixed(MOE), format_name="ascend")
    return tmp_path / "mix"


def test_a_mixed_folder_has_the_tensors_of_both(mix: Path) -> None:
    """As `on_w8a8_pd_mix` writes them, each described by the one word."""
    description = json.loads((mix / DESCRIPTION_NAME).read_text())
    parts = {name.rpartition(".")[2]: word for name, word in description.items() if name.startswith(QUERY)}
    expected = ("deq_scale", "input_offset", "input_scale", "quant_bias", "weight")
    assert parts == dict.fromkeys((*expected, "weight_offset", "weight_scale"), "W8A8_MIX")
    assert description["model_quant_type"] == "W8A8_MIX"
    summary = summarize(mix, verify_hashes=True)
    assert summary.findings == []
    assert {word: count for word, (count, _) in summary.schemes().items()}["W8A8_MIX"] == 8
    assert [str(one.server) for one in summary.served if one.served] == [
        "vllm-ascend 0.23.0",
        "vllm-ascend 0.26.0rc1",
        "vllm-ascend main",
    ]


def test_a_mixed_layer_is_read_in_both_ways(mix: Path) -> None:
    prefill = open_prefill(mix)
    assert prefill is not None
    one, other = open_weights(mix).linear(QUERY), prefill.linear(QUERY)
    assert isinstance(one, QuantizedLinear)
    assert isinstance(other, QuantizedLinear)
    assert (one.scheme, other.scheme) == (W8A8_MIX, W8A8_DYNAMIC)
    assert one.input_scale is not None
    assert other.input_scale is None
    np.testing.assert_array_equal(one.weight, other.weight)
    np.testing.assert_allclose(one.weight_scale, other.weight_scale, rtol=1e-6)
    assert prefill.linear(UP).scheme == W8A8_DYNAMIC


def test_no_other_format_has_it(mix: Path) -> None:
    for name in ("golden-stick", "compressed-tensors"):
        with pytest.raises(CheckpointError, match=f"cannot be exported as {name}: .*W8A8_MIX"):
            export(mix, [name])
    experts = dict.fromkeys(schemes_of(MOE), W8A8_MIX)
    with pytest.raises(RecipeError, match="routed experts with per-token activations"):
        plan_folder(groups_of(MOE), experts, MOE, "bfloat16", format_name="ascend")
    assert AscendFormat().fitting(UP, W8A8_MIX) == W8A8_DYNAMIC


@pytest.mark.parametrize(
    ("part", "changed", "problem"),
    [
        ("weight_scale", None, "missing from a quantized layer"),
        ("weight_scale", np.full((32, 1), -1, np.float32), "not positive and finite"),
        ("weight_scale", np.ones((32, 1), np.float32), "is not input_scale * weight_scale"),
        ("weight_scale", np.ones(32, np.float32), "has shape [32], [32, 1] is expected"),
        ("weight_offset", np.ones((32, 1), np.float32), "is not zero everywhere"),
        ("quant_bias", np.ones(32, np.int32), "differs from round(bias / deq_scale)"),
        ("deq_scale", None, "missing from a quantized layer"),
    ],
)
def test_tensors_of_a_mixed_layer_that_contradict_each_other(
    mix: Path, part: str, changed: Any, problem: str
) -> None:
    change_tensors(mix, {f"{QUERY}.{part}": changed}, described=False)
    (mix / "msquant.json").unlink()
    found = [str(finding) for finding in AscendFormat().validate(mix)]
    assert any(QUERY in one and problem in one for one in found), found


def test_a_mixed_folder_is_evaluated_both_ways(tmp_path: Path) -> None:
    """As answers are written it scores what its static layers do, as prompts are read its per-token ones."""
    source = write_tiny_llama(tmp_path / "float", dtype="bfloat16")
    recipe = validate_recipe(
        {
            "model": str(source),
            "format": "ascend",
            "quantization": {"algorithm": "rtn", "schemes": [{"lm_head": "FLOAT"}, {"*": "W8A8_MIX"}]},
            "calibration": {"samples": 2, "sequence_length": 32},
        },
        "test",
    )
    folder = quantize(recipe, tmp_path / "mix").folder
    others = []
    for word, dropped in (
        ("W8A8", ("weight_scale", "weight_offset")),
        ("W8A8_DYNAMIC", ("deq_scale", "quant_bias", "input_scale", "input_offset")),
    ):
        checkpoint = Checkpoint.open(folder)
        kept = {n: checkpoint.raw(n) for n in checkpoint.names() if not n.endswith(dropped)}
        other = tmp_path / word
        other.mkdir()
        write_shard(other / shard_name(1, 1), kept)
        write_index(other, dict.fromkeys(kept, shard_name(1, 1)), 0)
        described = json.loads((folder / DESCRIPTION_NAME).read_text())
        named = {n: word if w == "W8A8_MIX" else w for n, w in described.items() if not n.endswith(dropped)}
        write_json(other / DESCRIPTION_NAME, named)
        (other / "config.json").write_bytes((folder / "config.json").read_bytes())
        others.append(str(other))
    result = compare(
        [str(folder), *others], baseline=str(source), builtin=True, sequences=1, sequence_length=32
    )
    assert [model.phase for model in result.models] == ["decode", "prefill", "", ""]
    decode, prefill, static, dynamic = (model.score.overall.kl for model in result.models)
    assert decode == static
    assert prefill == dynamic
    assert prefill != decode


def test_int4_weights_of_older_versions_are_one_in_a_byte(tmp_path: Path) -> None:
    """Without `version` 1.0.0: the same numbers, `scale_bias` left to the engine."""
    for scheme in (W4A8_DYNAMIC, W4A8_DYNAMIC.in_groups(16)):
        new, old = tmp_path / f"new-{scheme}", tmp_path / f"old-{scheme}"
        write_experts(new, MOE, schemes=four_bit_experts(MOE, scheme), format_name="ascend")
        checkpoint = Checkpoint.open(new)
        tensors = {n: checkpoint.raw(n) for n in checkpoint.names() if not n.endswith(".scale_bias")}
        for name in checkpoint.names():
            if name.endswith(".scale_bias"):
                weight = name.replace("scale_bias", "weight")
                tensors[weight] = unpack_rows(tensors[weight])
        old.mkdir()
        # By the names that msModelSlim has for its files.
        shard = "quant_model_weight_w4a8_dynamic-00001-of-00001.safetensors"
        write_shard(old / shard, tensors)
        index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, shard)}
        write_json(old / "quant_model_weight_w4a8_dynamic.safetensors.index.json", index)
        described = json.loads((new / DESCRIPTION_NAME).read_text())
        gone = {n for n in described if n.endswith(".scale_bias")} | {"version"}
        write_json(old / DESCRIPTION_NAME, {n: w for n, w in described.items() if n not in gone})
        (old / "config.json").write_bytes((new / "config.json").read_bytes())
        assert summarize(old).findings == []
        mine, theirs = open_quantized(new), open_quantized(old)
        assert mine.linears == theirs.linears
        assert theirs.linears[UP] == scheme
        a, b = mine.weights.linear(UP), theirs.weights.linear(UP)
        assert isinstance(a, QuantizedLinear)
        assert isinstance(b, QuantizedLinear)
        np.testing.assert_array_equal(a.weight, b.weight)
        np.testing.assert_array_equal(a.weight_scale, b.weight_scale)
        (result,) = export(old, ["compressed-tensors"])
        again = open_quantized(result.folder).weights.linear(UP)
        assert isinstance(again, QuantizedLinear)
        np.testing.assert_array_equal(a.weight, again.weight)
        change_tensors(old, {f"{UP}.weight": np.full((32, 64), 8, np.int8)}, described=False)
        with pytest.raises(CheckpointError, match="no integers of 4 bits"):
            AscendFormat().open(old).linear(UP)


def write_dense(folder: Path, size: int, group_size: int | None) -> Path:
    """A dense model in int4, packed as `w4a8_pack_int4` does: rows 2j in the low halves of bytes."""
    rng = np.random.default_rng(3)
    tensors: dict[str, np.ndarray] = {}
    description: dict[str, Any] = {"lm_head.weight": "FLOAT"}
    shapes = expected_shapes(DENSE)
    assert shapes is not None
    for name, (rows, *rest) in shapes.items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = cast(name, rng.normal(size=(rows, *rest)), "bfloat16")
            description[name] = "FLOAT"
            continue
        columns = rest[0]
        weight = rng.integers(-8, 8, (rows, columns))
        first = rng.uniform(1e-3, 1e-2, (rows, 1)).astype(np.float32)
        second = rng.integers(1, 16, (rows, columns // size)).astype(np.float32)
        scale = (first * second).repeat(size, 1)
        runs = 16 if module.endswith(("o_proj", "down_proj")) else 1
        parts = {
            "weight": ((weight[0::2] & 15) | (weight[1::2] << 4)).astype(np.int8),
            "weight_scale": first,
            "weight_offset": np.zeros((rows, 1), np.float32),
            "weight_scale_second": second,
            "weight_offset_second": np.zeros(second.shape, np.int64),
            "scale_bias": 8 * (weight * scale).reshape(rows, runs, -1).sum(2).astype(np.float32),
        }
        tensors |= {f"{module}.{part}": array for part, array in parts.items()}
        description |= {f"{module}.{part}": "W4A8_DYNAMIC" for part in parts}
    folder.mkdir()
    write_shard(folder / shard_name(1, 1), tensors)
    write_index(folder, dict.fromkeys(tensors, shard_name(1, 1)), 0)
    entries = {"version": "1.0.0", "model_quant_type": "W4A8_DYNAMIC", "metadata": {}, "optional": {}}
    entries |= {} if group_size is None else {"group_size": group_size}
    write_json(folder / DESCRIPTION_NAME, {**description, **entries})
    write_json(folder / "config.json", DENSE)
    return folder


def test_int4_weights_of_any_linear_are_read(tmp_path: Path) -> None:
    """vllm-ascend 0.23.0 and 0.26.0rc1 serve them in groups, and its main branch does not."""
    folder = write_dense(tmp_path / "m", 16, 16)
    summary = summarize(folder)
    assert summary.findings == []
    assert summary.schemes()["W4A8_DYNAMIC_G16"][0] == 14
    served = [str(one.server) for one in summary.served if one.served]
    assert served == ["vllm-ascend 0.23.0", "vllm-ascend 0.26.0rc1"]
    (result,) = export(folder, ["compressed-tensors"])
    for module, scheme in open_quantized(folder).linears.items():
        assert scheme == parse_scheme("W4A8_DYNAMIC_G16")
        one, other = open_weights(folder).linear(module), open_weights(result.folder).linear(module)
        assert isinstance(one, QuantizedLinear)
        assert isinstance(other, QuantizedLinear)
        np.testing.assert_array_equal(one.weight, other.weight)
        np.testing.assert_array_equal(one.weight_scale, other.weight_scale)


def test_groups_are_of_256_where_a_description_does_not_say(tmp_path: Path) -> None:
    """As vllm-ascend takes it, so that tensors in other groups contradict it."""
    folder = write_dense(tmp_path / "m", 16, None)
    found = [str(finding) for finding in AscendFormat().validate(folder)]
    assert any("groups of 256 do not divide its 64 inputs" in one for one in found), found


def test_an_entry_that_is_not_known_is_named(mix: Path) -> None:
    change_json(
        mix / DESCRIPTION_NAME, lambda d: d.update(reduce_quant_type="per_channel", online_hadamard=[])
    )
    AscendFormat().open(mix)
    change_json(mix / DESCRIPTION_NAME, lambda d: d.update(svd_rank=16))
    with pytest.raises(CheckpointError, match="svd_rank is 16: what it changes is not known"):
        AscendFormat().open(mix)
    assert any("svd_rank" in finding.problem for finding in summarize(mix).findings)
