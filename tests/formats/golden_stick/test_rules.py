"""Every rule of the golden-stick contract, kept and broken."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.writer import write_json, write_shard
from msquant.formats.golden_stick.form import GoldenStickFormat
from msquant.formats.golden_stick.layout import DESCRIPTION_NAME
from tests.formats import folders
from tests.formats.folders import change_json, change_tensors, write_folder, write_manifest

FORM = GoldenStickFormat()

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
UP = "model.layers.1.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
BF16 = ml_dtypes.bfloat16

stored = partial(folders.stored, described=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model")


def described(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        change_json(folder / DESCRIPTION_NAME, change)
        write_manifest(folder)

    return apply


def configured(**values: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        change_json(folder / "config.json", lambda config: config.update(values))
        write_manifest(folder)

    return apply


def with_first(value: object) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[0] = value
        return array

    return change


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"torch_dtype": "float16"},
        {"tie_word_embeddings": False},
        {"attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen2"},
        {"model_type": "qwen3", "head_dim": 8},
        {"num_key_value_heads": 4},
    ],
)
def test_a_correct_folder_has_no_findings(tmp_path: Path, changes: dict[str, object]) -> None:
    assert FORM.validate(write_folder(tmp_path / "m", **changes), verify_hashes=True) == []


def test_floating_point_layers_are_no_finding(tmp_path: Path) -> None:
    attention = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert FORM.validate(write_folder(tmp_path / "m", float_modules=(*attention, DOWN))) == []


def test_a_folded_smooth_scale_is_no_finding(folder: Path) -> None:
    scales = Checkpoint.open(folder).raw(f"{DOWN}.input_scale")
    change_tensors(folder, {f"{DOWN}.input_scale": (scales * np.arange(1, 25)).astype(BF16)})
    assert FORM.validate(folder) == []


@pytest.mark.parametrize(
    ("breakage", "where", "problem"),
    [
        (described(lambda d: d.pop(f"{Q}.weight")), f"{Q}.weight", "stored, but not described"),
        (described(lambda d: d.update({"x.weight": "FLOAT"})), "x.weight", "described, but not stored"),
        (described(lambda d: d.update({"model.norm.weight": "W4A8"})), "model.norm.weight", "'W4A8'"),
        (described(lambda d: d.update({f"{Q}.deq_scale": "FLOAT"})), f"{Q}.", "another tensor of the layer"),
        (described(lambda d: d.update({"model.norm.weight": 3})), DESCRIPTION_NAME, "model.norm.weight is 3"),
        (
            described(lambda d: d.update(dict.fromkeys([n for n in d if n.startswith(K)], "FLOAT"))),
            K,
            "run as one layer",
        ),
        (
            described(lambda d: d.update({"model.embed_tokens.weight": "W8A8"})),
            "model.embed_tokens",
            "never quantizes embeddings",
        ),
        (described(lambda d: d.update({"model.norm.weight": "W8A8"})), "model.norm.deq_scale", "missing"),
        (configured(quantization_config={}), "config.json", "quantization_config"),
        (configured(compression_config={}), "config.json", "compression_config"),
        (configured(text_config={"quantization_config": {}}), "config.json", "quantization_config"),
        (configured(torch_dtype="float32"), "config.json", "dtype is float32"),
        (configured(torch_dtype=None), "config.json", "dtype is None"),
        (configured(num_hidden_layers=3), "model.layers.2.mlp.up_proj.weight", "config.json says"),
        (configured(num_hidden_layers="2"), "config.json", "num_hidden_layers is '2'"),
        (configured(intermediate_size=25), UP, "has shape [24, 16], config.json says [25, 16]"),
        (configured(tie_word_embeddings=False), "lm_head.weight", "missing"),
        (stored("model.norm.weight", lambda a: None), "model.norm.weight", "missing"),
        (stored("model.norm.weight", with_first(np.nan)), "model.norm.weight", "NaN"),
        (
            stored("model.norm.weight", lambda a: a.astype(np.int32)),
            "model.norm.weight",
            "described as FLOAT",
        ),
        (stored(f"{Q}.quant_bias", lambda a: None), f"{Q}.quant_bias", "missing from a quantized layer"),
        (stored(f"{Q}.quant_bias", lambda a: a + 1), f"{Q}.quant_bias", "in 16 of 16 rows"),
        (stored(f"{Q}.quant_bias", with_first(2**31 - 1)), f"{Q}.quant_bias", "in 1 of 16 rows"),
        (stored(f"{Q}.quant_bias", lambda a: a.astype(np.float32)), f"{Q}.quant_bias", "I32 is expected"),
        (stored(f"{Q}.weight", lambda a: a.astype(np.int16)), f"{Q}.weight", "I8 is expected"),
        (stored(f"{Q}.weight", lambda a: a.reshape(-1)), f"{Q}.weight", "a matrix [N, K]"),
        (stored(f"{Q}.deq_scale", lambda a: a.view(np.int32).astype(np.int64)), f"{Q}.deq_scale", "I64"),
        (stored(f"{Q}.deq_scale", lambda a: a.astype(np.float16)), f"{Q}.deq_scale", "F32 is expected"),
        (stored(f"{Q}.deq_scale", lambda a: a[:1]), f"{Q}.deq_scale", "has shape [1], [16] is expected"),
        (stored(f"{Q}.deq_scale", with_first(0)), f"{Q}.deq_scale", "not positive and finite"),
        (stored(f"{Q}.deq_scale", with_first(np.inf)), f"{Q}.deq_scale", "not positive and finite"),
        (stored(f"{DOWN}.input_scale", with_first(-1)), f"{DOWN}.input_scale", "not positive and finite"),
        (stored(f"{DOWN}.input_scale", lambda a: a[:1]), f"{DOWN}.input_scale", "[24] is expected"),
        (
            stored(f"{DOWN}.input_scale", lambda a: a.astype(np.float32)),
            f"{DOWN}.input_scale",
            "BF16 is expected",
        ),
        (
            stored(f"{DOWN}.input_offset", lambda a: a.astype(np.int32)),
            f"{DOWN}.input_offset",
            "I8 is expected",
        ),
        (stored(f"{DOWN}.input_offset", with_first(1)), f"{DOWN}.quant_bias", "differs from"),
        (stored(f"{K}.input_scale", lambda a: a * BF16(2)), f"{K}.input_scale", "run as one layer"),
        (stored(f"{UP}.input_scale", lambda a: a * BF16(2)), f"{UP}.input_scale", "run as one layer"),
    ],
)
def test_a_broken_rule_is_found(
    folder: Path, breakage: Callable[[Path], None], where: str, problem: str
) -> None:
    breakage(folder)
    findings = FORM.validate(folder)
    assert any(f.where.startswith(where) and problem in f.problem for f in findings), findings


def test_a_bias_on_one_of_three_fused_projections_is_found(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", attention_bias=True)
    change_tensors(folder, {f"{K}.bias": None})
    assert any(f.where == f"{K}.bias" and "no bias" in f.problem for f in FORM.validate(folder))


def test_a_bias_that_does_not_fit_is_found(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", attention_bias=True)
    change_tensors(folder, {f"{Q}.bias": np.full(16, np.nan, BF16), f"{K}.bias": np.ones(3, BF16)})
    findings = {finding.where: finding.problem for finding in FORM.validate(folder)}
    assert "NaN" in findings[f"{Q}.bias"]
    assert "shape" in findings[f"{K}.bias"]


@pytest.mark.parametrize("extra", ["quant_model_description.json", "old_quantization_description.json"])
def test_two_descriptions_are_found(folder: Path, extra: str) -> None:
    (folder / extra).write_text("{}")
    assert any(
        "exactly one" in finding.problem and extra in finding.problem for finding in FORM.validate(folder)
    )


def test_a_folder_without_description_is_found(folder: Path) -> None:
    (folder / DESCRIPTION_NAME).unlink()
    assert any("found none" in finding.problem for finding in FORM.validate(folder))


def test_the_other_name_of_the_description_is_accepted(folder: Path) -> None:
    (folder / DESCRIPTION_NAME).rename(folder / "quant_model_description.json")
    write_manifest(folder)
    assert FORM.validate(folder) == []


@pytest.mark.parametrize("kind", ["FAQuant", "FAKQuant"])
def test_an_int8_latent_cache_is_refused_by_name(folder: Path, kind: str) -> None:
    """As MindFormers reads it (golden_stick/config.py, `fa3_quant`)."""
    change_json(folder / DESCRIPTION_NAME, lambda d: d.update(fa_quant_type=kind))
    (problem,) = (found for found in map(str, FORM.validate(folder)) if "fa_quant_type" in found)
    assert f"fa_quant_type is '{kind}': MindFormers' int8 latent cache" in problem


def test_undotted_entries_of_a_description_are_not_taken_for_tensors(folder: Path) -> None:
    change_json(folder / DESCRIPTION_NAME, lambda d: d.update({"version": "1.0.0"}))
    write_manifest(folder)
    assert FORM.validate(folder) == []


def test_a_tensor_that_the_index_does_not_list_is_found(folder: Path) -> None:
    shard = folder / "model-00001-of-00003.safetensors"
    tensors = {
        name: Checkpoint.open(folder).raw(name) for name in Checkpoint.open(folder).shards[shard.name].entries
    }
    write_shard(shard, {**tensors, "stray.weight": np.ones(1, BF16)})
    write_manifest(folder)
    assert [finding.where for finding in FORM.validate(folder)] == ["stray.weight"]


def test_a_damaged_shard_is_found_and_the_rest_still_checked(folder: Path) -> None:
    shard = folder / "model-00001-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    change_json(folder / "config.json", lambda config: config.update(quantization_config={}))
    wheres = [finding.where for finding in FORM.validate(folder)]
    assert shard.name in wheres
    assert "config.json" in wheres


def test_a_missing_or_damaged_config_is_found(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert any(f.where == "config.json" and "JSON" in f.problem for f in FORM.validate(folder))
    (folder / "config.json").unlink()
    assert any(f.where == "config.json" and "missing" in f.problem for f in FORM.validate(folder))


def test_a_changed_byte_is_found_by_its_hash(folder: Path) -> None:
    shard = folder / "model-00003-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert FORM.validate(folder) == []
    assert [finding.where for finding in FORM.validate(folder, verify_hashes=True)] == [shard.name]


def test_a_file_of_another_size_or_none_is_found_without_hashing(folder: Path) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    change_json(folder / "msquant.json", lambda m: m["files"].update({"gone.txt": {"size": 1, "sha256": ""}}))
    assert {finding.where for finding in FORM.validate(folder)} == {"config.json", "gone.txt"}


@pytest.mark.parametrize(
    "files", [3, {"config.json": 3}, {"config.json": {}}, {"../x": {"size": 1, "sha256": ""}}]
)
def test_a_manifest_that_makes_no_sense_is_found(folder: Path, files: object) -> None:
    write_json(folder / "msquant.json", {"files": files})
    # Files that it does not list any more are found, too.
    assert "msquant.json" in [finding.where for finding in FORM.validate(folder, verify_hashes=True)]


def test_a_folder_of_another_tool_needs_no_manifest(folder: Path) -> None:
    (folder / "msquant.json").unlink()
    assert FORM.validate(folder, verify_hashes=True) == []


def test_an_unknown_architecture_is_checked_for_all_but_completeness(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    change_json(folder / "config.json", lambda config: config.update(model_type="mamba", num_hidden_layers=9))
    write_manifest(folder)
    assert FORM.validate(folder) == []


def test_the_description_lists_every_stored_tensor(folder: Path) -> None:
    description = json.loads((folder / DESCRIPTION_NAME).read_text())
    assert sorted(description) == Checkpoint.open(folder).names()
    assert description["model.norm.weight"] == "FLOAT"
    assert description[f"{Q}.input_offset"] == "W8A8"
