"""The short evaluation at the end of `quantize`: what it writes, when it warns, what a kill in it loses."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from msquant.errors import MsquantError
from msquant.flows.comparison import compare
from msquant.flows.pipeline import Progress, quantize
from msquant.recipe.recipe import Recipe
from tests.fixtures import torch_simulation
from tests.fixtures.quantize_process import RECIPE, digests, journaled
from tests.fixtures.tiny_model import write_tiny_llama
from tests.test_pipeline import short_recipe
from tests.test_resume import finish, start


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("short") / "float", dtype="bfloat16")


@pytest.fixture(scope="module")
def recipe(source: Path) -> Recipe:
    raw = short_recipe(source).replace("evaluation", sequence_length=64)
    return raw.replace("quantization", algorithm="rtn")


@pytest.fixture(scope="module")
def result(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(recipe, tmp_path_factory.mktemp("result") / "out").folder


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "msquant.json").read_text())
    return content


def test_the_manifest_says_how_far_the_result_is_from_the_float_model(source: Path, result: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from msquant.flows.comparison import builtin_texts

    record = manifest(result)["evaluation"]
    assert (record["sequences"], record["sequence_length"]) == (1, 64)
    assert [layer["index"] for layer in record["layers"]] == [0, 1]
    simulation = torch_simulation.load_simulation(result)
    floating = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    for text, score in zip(builtin_texts(source, 1, 64), record["texts"], strict=True):
        assert score["text"] == text.name
        expected = torch_simulation.perplexity(simulation, text.tokens)
        assert score["perplexity"] == pytest.approx(expected, rel=1e-3)
        expected = torch_simulation.kl_divergence(simulation, floating, text.tokens)
        assert score["kl"] == pytest.approx(expected, rel=1e-3)


def test_the_next_tokens_are_those_of_both_models(source: Path, result: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from msquant.flows.comparison import builtin_texts

    texts = {text.name: text.tokens[0] for text in builtin_texts(source, 1, 64)}
    shown = manifest(result)["evaluation"]["predictions"]
    assert len(shown) == 3
    tokenizer = AutoTokenizer.from_pretrained(source)
    models = {
        "expected": AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval(),
        "found": torch_simulation.load_simulation(result),
    }
    for one in shown:
        ids = torch.as_tensor(texts[one["text"]], dtype=torch.int64)
        # 24 tokens in the middle of 64.
        assert one["actual"] == [tokenizer.decode([int(token)]) for token in ids[20:44]]
        assert one["before"] == tokenizer.decode(ids[:20].tolist(), clean_up_tokenization_spaces=False)
        for name, model in models.items():
            with torch.inference_mode():
                best = model(ids[None]).logits[0, 19:43].argmax(-1)
            assert one[name] == [tokenizer.decode([int(token)]) for token in best], (one["text"], name)


def test_evaluate_finds_the_float_model_by_the_manifest(source: Path, result: Path) -> None:
    found = compare([str(result)], sequences=1, sequence_length=64)
    assert found.baseline is not None
    assert found.baseline.folder == source
    assert found.notes == []


def test_without_it_the_tensors_are_the_same(recipe: Recipe, result: Path, tmp_path: Path) -> None:
    without = quantize(recipe.replace("evaluation", sequences=0), tmp_path / "out")
    assert without.evaluation is None
    assert "evaluation" not in manifest(without.folder)
    ours, expected = digests(without.folder), digests(result)
    assert ours.pop("msquant.json") != expected.pop("msquant.json")
    assert ours == expected


@pytest.mark.parametrize("limit", ["max_kl", "max_perplexity_increase"])
def test_a_broken_limit_is_recorded(recipe: Recipe, tmp_path: Path, limit: str) -> None:
    from msquant.evaluation.domain_scores import ModelScore, TextScore

    score = ModelScore((), TextScore("all", 9, 1.3, baseline_perplexity=1.0, kl=0.2, top1=1, top5=1))
    settings = recipe.replace("evaluation", max_kl=1, max_perplexity_increase=1).evaluation
    assert settings.beyond(score) == []
    settings = recipe.replace(
        "evaluation", **{"max_kl": 1, "max_perplexity_increase": 1, limit: 0.15}
    ).evaluation
    (broken,) = settings.beyond(score)
    assert f"max_{broken['measure']}" == limit
    assert broken["limit"] == 0.15
    assert broken["value"] == pytest.approx(0.2 if limit == "max_kl" else 0.3)


@pytest.mark.e2e
def test_a_result_beyond_the_limits_is_a_warning(source: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    path = tmp_path / "recipe.yaml"
    text = RECIPE.format(model=source, feed_forward="")
    path.write_text(f"{text}evaluation: {{sequence_length: 32, max_kl: 0.000001}}\n")
    command = [sys.executable, "-m", "msquant", "quantize", str(path), "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Compared with the float model" in done.stdout
    for words in (
        "KL divergence from the float model is",
        "limit 1e-06",
        "add most noise are",
        "analyze MODEL",
    ):
        assert words in done.stderr
    assert (tmp_path / "out" / "msquant.json").is_file()


@pytest.mark.e2e
def test_a_kill_while_it_is_evaluated_loses_nothing(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=source, feed_forward=""))
    finish(path, tmp_path / "whole")
    process = start(path, tmp_path / "out")
    assert process.stderr is not None
    while "comparing the result" not in (line := process.stderr.readline()):
        assert line, "it ended without evaluating"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "out").exists()
    assert journaled(tmp_path / "out") == 2

    shutil.copytree(tmp_path / "out.partial", tmp_path / "other.partial")
    errors = finish(path, tmp_path / "out")
    assert "1 of 2 decoder layers" not in errors
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    # One who has not the time for it may go on without it.
    finish(path, tmp_path / "other", "--no-evaluate")
    assert "evaluation" not in manifest(tmp_path / "other")


def test_an_error_in_it_keeps_the_layers(recipe: Recipe, tmp_path: Path) -> None:
    def damage(text: str) -> None:
        if "comparing the result" in text:
            shard = sorted((tmp_path / "out.partial").glob("*.safetensors"))[0]
            shard.write_bytes(shard.read_bytes()[:-50])

    with pytest.raises(MsquantError, match=r"\.safetensors") as caught:
        quantize(recipe, tmp_path / "out", progress=Progress(stage=damage))
    assert "2 of 2 decoder layers are finished" in caught.value.__notes__[0]
    assert not (tmp_path / "out").exists()
