"""`msquant quantize --max-kl` and `msquant analyze --frontier`: their options, outputs and exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from msquant.cli import promise
from msquant.errors import RecipeError
from msquant.recipe.recipe import load_recipe
from msquant.reporting.collect import collect
from msquant.schemes import W8A8, W8A8_DYNAMIC
from tests.cli.test_options import refused

SHORT = ("--samples", "4", "--sequence-length", "32")


def msquant(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "msquant", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("quantize", ["--max-kl", "0.1", "--scheme", "W8A8"], ["--scheme", "choose them"]),
        ("quantize", ["--max-kl", "0.1", "--dry-run"], ["--dry-run", "still to be chosen"]),
        ("quantize", ["--max-size", "1GB", "--workers", "2"], ["--workers", "one process"]),
        ("quantize", ["--max-kl", "0.1", "--no-evaluate"], ["--no-evaluate", "promise is made of"]),
        ("quantize", ["--max-kl", "0.1", "--calibration", "none"], ["--calibration", "calibrated linears"]),
        ("quantize", ["--max-kl", "-1"], ["--max-kl", "is -1"]),
        ("quantize", ["--max-size", "much"], ["--max-size", "much"]),
        (
            "quantize",
            ["--max-perplexity-increase", "two"],
            ["--max-perplexity-increase", "'two' is no number", "2%"],
        ),
        ("quantize", ["--max-kl", "0.1", "--for", "vllm", "--format", "ascend"], ["--for", "one format"]),
        ("quantize", ["--max-kl", "0.1", "--for", "vlm"], ["--for", "did you mean vllm"]),
        ("quantize", ["--max-kl", "0.1", "--schemes", "W9A9"], ["--schemes", "is not a scheme"]),
        ("quantize", ["--schemes", "W8A8"], ["--schemes", "none is made"]),
        ("quantize", ["--verdict-text", "x.txt"], ["--verdict-text", "none is made"]),
        ("quantize", ["--max-kl", "0.1", "--verdict-text", "no.txt"], ["no.txt"]),
        ("analyze", ["--point", "0.1"], ["--point", "give --frontier"]),
        ("analyze", ["--frontier", "--keep-float", "2"], ["--keep-float", "chooses every scheme"]),
        ("analyze", ["--frontier", "--scheme", "W8A8"], ["--scheme", "chooses every scheme"]),
        ("analyze", ["--frontier", "--output", "r.yaml"], ["--output", "--point 0.02"]),
        ("analyze", ["--frontier", "--point", "0"], ["--point", "above 0"]),
    ],
)
def test_wrong_options_are_named_before_any_work(
    command: str,
    options: list[str],
    words: list[str],
    tiny_llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(monkeypatch, command, str(tiny_llama), *options) == 1
    shown = " ".join(capsys.readouterr().err.split())
    for word in words:
        assert word in shown
    assert list(tmp_path.iterdir()) == []


def test_schemes_are_words_with_commas_between_them() -> None:
    assert promise.parse_schemes(None) == ()
    assert promise.parse_schemes(" W8A8 , W8A8_DYNAMIC,W8A8") == (W8A8, W8A8_DYNAMIC)
    with pytest.raises(RecipeError, match="names no scheme"):
        promise.parse_schemes(" , ")


def test_a_part_is_a_number_or_per_cent() -> None:
    assert promise.parse_part(None, "--x") is None
    assert promise.parse_part("2%", "--x") == promise.parse_part("0.02", "--x") == 0.02
    with pytest.raises(RecipeError, match="'a lot' is no number"):
        promise.parse_part("a lot", "--x")


@pytest.mark.e2e
def test_a_promise_is_kept_and_reported(tiny_llama: Path, tmp_path: Path) -> None:
    done = msquant(
        *("quantize", tiny_llama, "--max-kl", 0.01, "--for", "vllm-mindspore", *SHORT),
        *("--output", "out", "--json"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kept"] is True
    assert max(found["rounds"][found["round"] - 1]["verdict"].values()) <= 0.01
    assert "round 1:" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    facts = collect(tmp_path / "out", check=False).facts
    assert facts["promise"] == "KL <= 0.01: kept"
    assert "fiction" in facts["KL on the verdict texts"]
    assert "docs" in facts["KL on the texts that schemes were chosen by"]


@pytest.mark.e2e
def test_a_promise_that_cannot_be_kept_has_an_exit_code_of_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    done = msquant(
        *("quantize", tiny_llama, "--max-kl", 1e-9, "--for", "vllm-mindspore", *SHORT, "--output", "out"),
        cwd=tmp_path,
    )
    assert done.returncode == promise.EXIT_NOT_KEPT == 3
    assert "cannot be kept" in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.e2e
def test_the_frontier_is_a_table_and_a_recipe(tiny_llama: Path, tmp_path: Path) -> None:
    done = msquant(
        *("analyze", tiny_llama, "--frontier", "--for", "vllm-mindspore", "--point", 0.01, *SHORT),
        *("--points", 5, "--output", "small.yaml"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for word in ("Size against predicted KL", "14 W8A8", "14 FLOAT", "Next: msquant quantize small.yaml"):
        assert word in done.stdout
    recipe = load_recipe(tmp_path / "small.yaml")
    assert {str(scheme) for _, scheme in recipe.quantization.schemes} == {"W8A8", "FLOAT"}
