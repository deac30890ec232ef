"""The layer that costs most stands first wherever layers are ranked.

Layer 2 adds a massive activation to one token, as a layer of many models does: its error is small relative to
what it adds, and yet most of the noise is its own.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.cli import scores
from msquant.cli.quantize import _print_result
from msquant.evaluation.domain_scores import LayerScore, ModelScore, Noise, TextScore
from msquant.flows.analysis import _ranked
from msquant.flows.pipeline import QuantizeResult
from msquant.flows.publishing import model_card
from msquant.kernels.layer_report import GroupError, relative_error
from msquant.models.config_json import read_config
from msquant.recipe.recipe import Recipe
from msquant.reporting.collect import collect
from msquant.reporting.write import html_page, markdown_page
from msquant.schemes import W8A8
from tests.formats.folders import change_json, write_folder

LAYERS, WORST = 4, 2
TOKENS, WIDTH = 64, 16


def layer(index: int) -> tuple[float, float, float]:
    """The error relative to what the layer adds, its absolute squared error, and its own noise in dB."""
    rng = np.random.default_rng(index)
    before = rng.normal(size=(TOKENS, WIDTH)).astype(np.float32)
    added = rng.normal(size=(TOKENS, WIDTH)).astype(np.float32)
    wrong = (0.3 if index == WORST else 0.05) * rng.normal(size=added.shape).astype(np.float32)
    if index == WORST:
        added[0, 0] = 3000
    after = before + added
    noise = Noise()
    noise.add(after, after + wrong)
    assert noise.decibels is not None
    return relative_error(before, after, after + wrong), float(np.square(wrong).sum()), noise.decibels


FOUND = [layer(index) for index in range(LAYERS)]


def record() -> dict[str, Any]:
    """The evaluation as the manifest has it."""
    score = TextScore("prose", TOKENS, 11.0, 10.0, 0.04, 0.9, 0.9, 1e-3)
    layers = tuple(LayerScore(index, 20.0, found[2]) for index, found in enumerate(FOUND))
    return ModelScore((score,), score, layers).as_dict() | {"beyond": []}


def layers() -> list[dict[str, Any]]:
    group = {"name": "qkv", "alpha": 0.5}
    return [{"index": index, "error": found[0], "groups": [group]} for index, found in enumerate(FOUND)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "model", num_hidden_layers=LAYERS)
    change_json(folder / "msquant.json", lambda m: m.update(layers=layers(), evaluation=record()))
    return folder


def test_the_case_is_what_it_is_to_be() -> None:
    relative, absolute, decibels = zip(*FOUND, strict=True)
    assert relative.index(min(relative)) == WORST
    assert absolute[WORST] > 0.9 * sum(absolute)
    assert decibels.index(min(decibels)) == WORST


def test_in_the_closing_table_of_quantize(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = QuantizeResult(
        folder, {"golden-stick": folder}, layers(), record(), [1.0], 200, 100, None, (), 1.0, 1
    )
    _print_result(result)
    printed = capsys.readouterr().out
    rows = re.findall(r"(?m)^│\s+(\d)\s+│", printed)
    assert len(rows) == LAYERS
    assert rows[0] == str(WORST)
    assert "of 4 layers" in printed
    assert f"most noise of their own: {WORST} (" in printed


def test_without_an_evaluation_the_closing_table_has_the_layers_in_order(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _print_result(
        QuantizeResult(folder, {"golden-stick": folder}, layers(), None, [1.0], 200, 100, None, (), 1.0, 1)
    )
    assert re.findall(r"(?m)^│\s+(\d)\s+│", capsys.readouterr().out) == ["0", "1", "2", "3"]


def test_in_the_scores(capsys: pytest.CaptureFixture[str]) -> None:
    scores.print_scores("Compared", record())
    assert f"most noise of their own: {WORST} (" in capsys.readouterr().out


def test_in_the_report(folder: Path) -> None:
    report = collect(folder, check=False)
    assert report.ranking is not None
    assert report.ranking.rows[0].name == f"layer {WORST}"
    assert report.ranking.rows[0].share > 0.9
    assert any(remark.startswith(f"Layer {WORST} (") for remark in report.verdict.remarks)
    table = markdown_page(report).partition("## What quantization costs most")[2]
    assert re.findall(r"(?m)^\| layer (\d) \|", table)[0] == str(WORST)
    page = html_page(report)
    assert f"<dt>Costs most</dt>\n<dd><strong>layer {WORST}</strong>" in page
    table = page.partition('<section id="sensitivity">')[2]
    assert re.findall(r'<th scope="row">layer (\d)</th>', table)[0] == str(WORST)


def test_in_the_model_card(folder: Path) -> None:
    card = model_card({"layers": layers(), "evaluation": record()}, "a/b", "mit")
    assert re.findall(r"(?m)^\| (\d) \| [\d.]+ \| [\d.]+% \|", card)[0] == str(WORST)


def test_in_an_analysis(tiny_llama: Path) -> None:
    config = read_config(tiny_llama)
    errors = [
        GroupError(index % 2, group, (f"model.layers.{index % 2}.mlp.down_proj",), W8A8, 10 ** (-snr / 10))
        for index, (group, (_, _, snr)) in enumerate(zip("abcd", FOUND, strict=True))
    ]
    ranked = _ranked(errors, config, Recipe(model=str(tiny_llama)))
    assert ranked[0].measured.group == "abcd"[WORST]
    assert ranked[0].share == pytest.approx(collect_share())


def collect_share() -> float:
    """Of the worst layer's noise."""
    noise = [10 ** (-found[2] / 10) for found in FOUND]
    return noise[WORST] / sum(noise)
