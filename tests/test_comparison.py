"""Models beside their float model: how it is found, what is checked, and what bad input does."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from msquant.checkpoint.tokenizer import load_tokenizer
from msquant.errors import CalibrationError, MsquantError
from msquant.flows.comparison import builtin_texts, compare
from msquant.progress import Progress
from tests.fixtures import torch_simulation
from tests.fixtures.tiny_model import write_tiny_llama
from tests.inference.quantized_folder import write_quantized

SHORT: dict[str, Any] = {"sequences": 1, "sequence_length": 48}
BUILTIN = ("docs", "code", "chinese", "dialogue", "fiction", "math")
OWN = "Nobody has seen this sentence before, and nobody will see it again. " * 20


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One short text of one's own."""
    path = tmp_path_factory.mktemp("text") / "own.txt"
    path.write_text(OWN)
    return {"texts": [str(path)], "builtin": False, **SHORT}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("comparison") / "float")


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    """A folder that says what it was made from, though not from which very checkpoint."""
    folder = write_quantized(source, source.parent / "quantized", list(range(3, 120)))
    (folder / "msquant.json").write_text(json.dumps({"recipe": {"model": str(source)}}))
    return folder


@pytest.fixture
def copy(quantized: Path, tmp_path: Path) -> Path:
    return shutil.copytree(quantized, tmp_path / "copy")


def test_a_folder_beside_the_model_it_was_made_from(source: Path, quantized: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    (tmp_path / "mine.txt").write_text(OWN)
    layers: list[Any] = []
    result = compare(
        [str(quantized)], texts=[str(tmp_path / "mine.txt")], progress=Progress(layer=layers.append), **SHORT
    )
    assert result.baseline is not None
    assert result.baseline.folder == source
    assert "not the very checkpoint" in result.notes[0]
    assert result.texts == dict.fromkeys((*BUILTIN, "mine.txt"), (1, 48))
    (model,) = result.models
    assert model.nbytes == (quantized / "model-00001-of-00001.safetensors").stat().st_size
    assert [layer["layers"][0] for layer in layers] == list(model.score.layers)

    texts = builtin_texts(source, 1, 48)
    simulation = torch_simulation.load_simulation(quantized)
    floating = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for text, score in zip(texts, model.score.texts, strict=False):
        assert score.perplexity == pytest.approx(
            torch_simulation.perplexity(simulation, text.tokens), rel=1e-3
        )
        assert score.kl == pytest.approx(
            torch_simulation.kl_divergence(simulation, floating, text.tokens), rel=1e-3
        )
    assert json.dumps(model.score.as_dict(), allow_nan=False)


def test_several_folders_give_what_each_gives_alone(
    source: Path, quantized: Path, copy: Path, few: dict[str, Any]
) -> None:
    other = write_quantized(source, copy.parent / "other", list(range(200, 210)))
    together = compare([str(quantized), str(other)], **few)
    alone = [compare([str(folder)], baseline=str(source), **few) for folder in (quantized, other)]
    assert [model.score for model in together.models] == [result.models[0].score for result in alone]
    assert together.models[0].score != together.models[1].score
    assert together.baseline == alone[0].baseline


def test_without_a_float_model_there_is_perplexity_alone(
    copy: Path, source: Path, few: dict[str, Any]
) -> None:
    (copy / "msquant.json").unlink()
    result = compare([str(copy)], **few)
    assert result.baseline is None
    assert "no msquant.json says" in result.notes[-1]
    assert result.models[0].score.overall.kl is None
    expected = compare([str(copy)], baseline=str(source), **few).models[0].score
    assert result.models[0].score.overall.perplexity == pytest.approx(expected.overall.perplexity)

    (copy / "msquant.json").write_text(json.dumps({"recipe": {"model": "/nowhere/float"}}))
    result = compare([str(copy)], **few)
    assert result.baseline is None
    assert "/nowhere/float, which cannot be taken" in result.notes[-1]

    with pytest.raises(MsquantError, match=r"no float model to compare with.*/nowhere"):
        compare([str(copy), str(copy)], **few)


def test_a_recipe_stands_for_its_float_model(source: Path, tmp_path: Path, few: dict[str, Any]) -> None:
    (tmp_path / "recipe.yaml").write_text(f"model: {source}\n")
    result = compare([str(tmp_path / "recipe.yaml")], **few)
    assert result.models[0].folder == source


def test_a_folder_without_a_tokenizer_takes_the_float_models(
    copy: Path, source: Path, few: dict[str, Any]
) -> None:
    for path in copy.glob("tokenizer*"):
        path.unlink()
    result = compare([str(copy)], baseline=str(source), **few)
    assert result.notes == [f"{copy} has no tokenizer: the float model's was taken"]


def test_another_tokenizer_is_refused(copy: Path, source: Path, few: dict[str, Any]) -> None:
    tokenizer = load_tokenizer(copy)
    tokenizer.add_tokens(["sentence"])
    tokenizer.save_pretrained(copy)
    with pytest.raises(MsquantError, match="other tokens of the text own") as caught:
        compare([str(copy)], baseline=str(source), **few)
    assert caught.value.where == str(copy)


def test_another_vocabulary_is_refused(quantized: Path, tmp_path: Path, few: dict[str, Any]) -> None:
    other = write_tiny_llama(tmp_path / "other", vocab_size=520)
    with pytest.raises(MsquantError, match="vocab_size is 512, but 520"):
        compare([str(quantized)], baseline=str(other), **few)


def test_bad_texts_are_named(quantized: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(CalibrationError, match="one window of 48 tokens") as caught:
        compare([str(quantized)], texts=[str(tmp_path / "short.txt")], builtin=False, **SHORT)
    assert caught.value.where == "short.txt"
    with pytest.raises(CalibrationError, match="no such file"):
        compare([str(quantized)], texts=["nowhere.txt"], **SHORT)
    with pytest.raises(CalibrationError, match="no text to evaluate on"):
        compare([str(quantized)], builtin=False, **SHORT)
    with pytest.raises(CalibrationError, match="300 tokens are longer than what is computed of the model"):
        compare([str(quantized)], sequence_length=300)


def test_bad_folders_are_named(quantized: Path, copy: Path, few: dict[str, Any]) -> None:
    with pytest.raises(MsquantError, match="no such model"):
        compare(["./nothing/here"], **few)
    (copy / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(MsquantError, match="model-00001"):
        compare([str(copy)], **few)
    partial = shutil.copytree(quantized, copy.with_name("out.partial"))
    with pytest.raises(MsquantError, match="unfinished result"):
        compare([str(partial)], **few)
