"""From a recipe's calibration section to samples and their record, with a real model and tokenizer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.algorithms import algorithm_names, make_algorithm
from msquant.calibration import streaming
from msquant.checkpoint.tokenizer import leading_tokens, load_tokenizer
from msquant.errors import CalibrationError, EngineError, RecipeError
from msquant.flows import calibration
from msquant.flows.calibration import calibration_of, look_at_calibration, most_characters
from msquant.flows.pipeline import quantize
from msquant.planning.quantization_plan import make_plan
from msquant.recipe.recipe import CalibrationSettings, Recipe, validate_recipe

CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def _rows(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def _settings(*source: Any, **options: Any) -> CalibrationSettings:
    options = {"samples": 4, "sequence_length": 16} | options
    return CalibrationSettings(source=[str(each) for each in source], **options)


def test_a_mix_says_where_every_sample_is_from(tiny_llama: Path, tmp_path: Path) -> None:
    mine = _rows(tmp_path / "mine.jsonl", *(f"sentence number {i} of mine. " * 9 for i in range(9)))
    found = calibration_of(_settings(f"{mine}=3", "builtin:code", samples=5), tiny_llama)
    assert found.record["shape"] == [5, 16]
    assert found.record["tokens"] == 80
    assert found.sources == [
        {"source": str(mine), "samples": 3, "tokens": 48},
        {"source": "builtin:code", "samples": 2, "tokens": 32},
    ]
    tokenizer = load_tokenizer(tiny_llama)
    texts = [tokenizer.decode(row) for row in found.samples.tokens]
    assert sum("mine" in text for text in texts) == 3


def test_counts_alone_are_the_number_of_samples(tiny_llama: Path) -> None:
    settings = _settings("builtin:code=2", "builtin:fiction=1", samples=16)
    assert settings.total == 3
    assert calibration_of(settings, tiny_llama).record["shape"] == [3, 16]


def test_the_model_writes_its_own_samples(tiny_llama: Path) -> None:
    found = calibration_of(_settings("self=3"), tiny_llama).samples
    assert found.tokens.shape == (3, 16)
    assert (found.lengths == 16).all()
    again = calibration_of(_settings("self=3"), tiny_llama).samples
    assert again.sha256 == found.sha256
    assert calibration_of(_settings("self=3", seed=1), tiny_llama).samples.sha256 != found.sha256
    assert len(np.unique(found.tokens[:, :8], axis=0)) == 3


def test_own_words_are_what_the_float_model_makes_of_their_beginning(tiny_llama: Path) -> None:
    """The engine of `run` is asked for the same continuation, one sample at a time."""
    from msquant.flows.engines import load_embedded
    from msquant.inference.engine_protocol import Sampling

    found = calibration_of(_settings("self=2"), tiny_llama).samples
    engine = load_embedded(tiny_llama)
    begin = calibration.SEED_TOKENS + len(leading_tokens(engine.tokenizer))
    for index, row in enumerate(found.tokens):
        sampling = Sampling(max_tokens=16 - begin, temperature=1.0, top_p=1.0, ignore_eos=True)
        assert list(engine.tokens(row[:begin].tolist(), sampling, index)) == row[begin:].tolist()


def test_a_model_that_does_not_fit_cannot_write(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msquant.flows.folder_checks.available_memory", lambda: 1000)
    with pytest.raises(EngineError, match=r"cannot write its own samples here: .* GB is free") as caught:
        calibration_of(_settings("self"), tiny_llama)
    assert "builtin" in (caught.value.remedy or "")


def test_samples_too_short_to_be_written(tiny_llama: Path) -> None:
    with pytest.raises(CalibrationError, match="too short to be written"):
        calibration_of(_settings("self", sequence_length=2), tiny_llama)


def test_spare_samples_are_counted_apart(tiny_llama: Path) -> None:
    found = calibration_of(_settings("builtin", max_samples=7), tiny_llama)
    assert found.spare is not None
    assert (found.samples.tokens.shape, found.spare.tokens.shape) == ((4, 16), (3, 16))
    assert found.size == 7 * 16
    assert found.record["spare"]["tokens"] == 48


@pytest.mark.parametrize(
    ("word", "what"),
    [("none.txt", "no such file, folder or dataset"), ("builtin:poems", "no domain 'poems'")],
)
def test_a_source_that_is_not_there_is_found_before_the_model_is(
    word: str, what: str, tmp_path: Path
) -> None:
    recipe = Recipe(model="org/nowhere", calibration=_settings(word))
    for work in (quantize, make_plan):
        with pytest.raises(CalibrationError, match=what):
            work(recipe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"text_field": "body"}, r"text_field is now written as template: '\{body\}'"),
        ({"source": "hf:x"}, "names no dataset on a hub; write it as hf:ORG/NAME"),
        ({"source": []}, "no source is named"),
        ({"template": "{"}, "a brace that is open"),
        ({"max_samples": 0}, "greater than or equal to 1"),
    ],
)
def test_a_section_that_is_not_valid(section: dict[str, Any], what: str) -> None:
    with pytest.raises(RecipeError, match=what):
        validate_recipe({"model": "x", "calibration": section}, "mine.yaml")


def test_what_is_read_grows_with_what_is_wanted() -> None:
    assert most_characters(_settings("builtin")) == 1 << 20
    assert most_characters(_settings("builtin", samples=128, sequence_length=1024)) == 64 * 128 * 1024
    wanted = _settings("builtin", samples=10_000, sequence_length=4096)
    assert most_characters(wanted) == streaming.MAX_CHARACTERS


def test_samples_are_shown_as_the_model_sees_them(tiny_llama: Path) -> None:
    shown = look_at_calibration(_settings("builtin:fiction=3", "builtin:code=1"), str(tiny_llama), 2)
    assert [sample.source for sample in shown.first] == ["builtin:fiction"] * 2 + ["builtin:code"]
    tokenizer = load_tokenizer(tiny_llama)
    ids = shown.calibration.samples.tokens[0].tolist()
    assert shown.first[0].text == tokenizer.decode(ids)
    assert shown.first[0].tokens == 16


@pytest.mark.parametrize("algorithm", algorithm_names())
def test_every_algorithm_takes_documents_of_their_own_length(
    algorithm: str, tiny_llama: Path, tmp_path: Path
) -> None:
    mine = _rows(tmp_path / "mine.jsonl", *("word " * n for n in (3, 5, 9, 9, 14, 40)))
    recipe = Recipe(
        model=str(tiny_llama),
        quantization=make_algorithm(algorithm=algorithm),
        calibration=_settings(mine, pack=False, samples=6),
    )
    result = quantize(recipe, tmp_path / "out", remember=False)
    manifest = json.loads((result.folder / "msquant.json").read_text())
    assert manifest["calibration"]["shape"] == [6, 16]
    assert manifest["calibration"]["tokens"] < 6 * 16
    assert all(layer["error"] < 0.1 for layer in manifest["layers"])
