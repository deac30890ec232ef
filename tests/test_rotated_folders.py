"""`rotation: hadamard` from a recipe to the folder: what is written, planned and measured."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.writer import file_sha256
from msquant.errors import OutputError, RecipeError
from msquant.flows.comparison import compare
from msquant.flows.conversion import export
from msquant.flows.pipeline import Progress, quantize
from msquant.flows.short_evaluation import short_texts
from msquant.formats.summary import summarize
from msquant.models.config_json import read_config
from msquant.planning.quantization_plan import make_plan
from msquant.recipe.recipe import Recipe, validate_recipe
from tests.fixtures import torch_simulation
from tests.fixtures.quantize_process import digests
from tests.fixtures.tiny_families import write_tiny


def recipe_of(model: Path, rotation: str = "hadamard", **quantization: Any) -> Recipe:
    """Round to nearest, per token, with few tokens."""
    schemes = [{"lm_head": "FLOAT"}, {"kv_b_proj": "FLOAT"}, {"*": "W8A8_DYNAMIC"}]
    return validate_recipe(
        {
            "model": str(model),
            "format": "compressed-tensors",
            "quantization": {"algorithm": "rtn", "rotation": rotation, "schemes": schemes} | quantization,
            "calibration": {"samples": 2, "sequence_length": 16},
            "evaluation": {"sequence_length": 64},
        },
        "test",
    )


def evaluation(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "msquant.json").read_text())["evaluation"]
    return record


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe", "qwen3_next", "deepseek_v3"])
def test_a_folder_is_compared_with_the_unrotated_float_model(model_type: str, tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", model_type, dtype="bfloat16")
    recipe = recipe_of(source)
    plan = make_plan(recipe, tmp_path / "out")
    result = quantize(recipe, tmp_path / "out")
    assert plan.output_bytes == sum(path.stat().st_size for path in result.folder.glob("*.safetensors"))
    assert plan.notes == result.notes == ()
    record = evaluation(result.folder)
    # Compared in the rotated basis, a layer's outputs would have nothing in common with the float model's.
    assert all(layer["own_snr"] > 15 for layer in record["layers"])
    assert record["overall"]["kl"] < 0.1
    ours, expected = Checkpoint.open(result.folder), Checkpoint.open(source)
    name = "model.embed_tokens.weight"
    assert not np.allclose(ours.tensor(name), expected.tensor(name), atol=0.1), name
    ones = 1 - read_config(source).family.norm_offset("model.norm")
    assert np.array_equal(ours.tensor("model.norm.weight"), np.full(64, ones))

    export(result.folder, ["ascend"], output=tmp_path / "ascend")
    found = compare([str(tmp_path / "ascend")], sequences=1, sequence_length=64)
    measured = [layer.own_snr for layer in found.score.layers]
    assert measured == pytest.approx([layer["own_snr"] for layer in record["layers"]], abs=0.5)
    if model_type != "llama":
        return
    # As msModelSlim's QuaRot leaves a folder: the matrix beside it, in the terms of embeddings times Q.
    with_matrix = recipe_of(source, rotation_matrix=True).model_copy(update={"format": "ascend"})
    folder = quantize(with_matrix, tmp_path / "matrix").folder
    assert summarize(folder).findings == []
    record = json.loads((folder / "msquant.json").read_text())["files"]["optional/quarot.safetensors"]
    assert record["sha256"] == file_sha256(folder / "optional/quarot.safetensors")
    (folder / "msquant.json").unlink()
    assert summarize(folder).findings == []
    matrix = load_file(folder / "optional/quarot.safetensors")["global_rotation"]
    np.testing.assert_allclose(expected.tensor(name) @ matrix, ours.tensor(name), atol=0.02)
    found = compare([str(folder)], baseline=str(source), sequences=1, sequence_length=64)
    again = [layer.own_snr for layer in found.score.layers]
    assert again == pytest.approx(measured, abs=0.05)


@pytest.mark.parametrize(
    ("policy", "form", "problem"),
    [
        ({"rotation": "none"}, "ascend", "nothing is rotated"),
        ({}, "compressed-tensors", "compressed-tensors has no place for it"),
    ],
)
def test_a_matrix_that_cannot_be_written_is_refused(
    policy: dict[str, Any], form: str, problem: str, tmp_path: Path
) -> None:
    source = write_tiny(tmp_path / "source", "llama")
    recipe = recipe_of(source, rotation_matrix=True, **policy).model_copy(update={"format": form})
    with pytest.raises(RecipeError, match=problem) as caught:
        quantize(recipe, tmp_path / "out")
    assert caught.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tied_head_is_untied_and_the_cost_is_said(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", "qwen2", dtype="bfloat16", tie_word_embeddings=True)
    static = {"schemes": [{"lm_head": "FLOAT"}, {"*": "W8A8"}]}
    recipe = recipe_of(source, **static).model_copy(update={"format": "golden-stick"})
    plain = make_plan(recipe.replace("quantization", rotation="none"), tmp_path / "out")
    plan = make_plan(recipe, tmp_path / "out")
    result = quantize(recipe, tmp_path / "out")
    assert plan.output_bytes == sum(path.stat().st_size for path in result.folder.glob("*.safetensors"))
    assert 0 <= plan.output_bytes - plain.output_bytes - 2 * 512 * 64 < 200
    assert plain.notes == ()
    assert plan.notes == result.notes
    assert "lm_head.weight takes 0.1 MB" in plan.notes[0]
    config = json.loads((result.folder / "config.json").read_text())
    assert config["tie_word_embeddings"] is False

    # What transformers computes of the folder is what msquant measured of it.
    import torch
    from transformers import AutoModelForCausalLM

    simulation = torch_simulation.load_simulation(result.folder)
    floating = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    texts = short_texts(recipe.evaluation, source, read_config(source))
    for text, score in zip(texts, evaluation(result.folder)["texts"], strict=True):
        expected = torch_simulation.kl_divergence(simulation, floating, text.tokens)
        assert score["kl"] == pytest.approx(expected, rel=1e-3)
        assert 0 < score["kl"] < 0.5


def test_an_interrupted_run_ends_with_the_same_bytes_and_another_rotation_is_another_job(
    tmp_path: Path,
) -> None:
    source = write_tiny(tmp_path / "source", "llama", dtype="bfloat16", tie_word_embeddings=True)
    recipe = recipe_of(source).replace("evaluation", sequences=0)
    expected = digests(quantize(recipe, tmp_path / "expected").folder)

    def interrupt(record: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, tmp_path / "out", progress=Progress(layer=interrupt))
    with pytest.raises(OutputError, match="rotation"):
        quantize(recipe.replace("quantization", rotation="none"), tmp_path / "out")
    seen: list[tuple[int, int]] = []
    quantize(recipe, tmp_path / "out", progress=Progress(layers=lambda *counts: seen.append(counts)))
    assert seen == [(2, 1)]
    assert digests(tmp_path / "out") == expected


def test_norms_behind_the_blocks_are_refused_before_any_work(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", "glm4")
    for attempt in (make_plan, quantize):
        with pytest.raises(RecipeError, match="post_self_attn_layernorm, post_mlp_layernorm") as caught:
            attempt(recipe_of(source), tmp_path / "out")
        assert caught.value.where == "quantization.rotation"
        assert "rotation: none" in (caught.value.remedy or "")
    assert not list(tmp_path.glob("out*"))


def test_prediction_layers_are_refused_before_any_work(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "source", "deepseek_v3", prediction_layers=1)
    for attempt in (make_plan, quantize):
        with pytest.raises(RecipeError) as caught:
            attempt(recipe_of(source), tmp_path / "out")
        assert caught.value.where == "quantization.rotation"
        assert "multi-token-prediction layers (model.layers.2)" in caught.value.what
        assert "rotation: none" in (caught.value.remedy or "")
    assert not list(tmp_path.glob("out*"))
