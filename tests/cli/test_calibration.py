"""`msquant calibration`: what a person sees of samples, and of datasets with a short name."""

import json
from pathlib import Path

from typer.testing import CliRunner

from msquant.calibration.known_sets import KNOWN_SETS
from msquant.calibration.sources import parse_source
from msquant.cli.app import app


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["calibration", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_show_prints_samples_and_counts(tiny_llama: Path) -> None:
    output = _run("show", tiny_llama, "--samples", 3, "--sequence-length", 24, "--first", 1)
    assert "Sample 1, from builtin, 24 tokens:" in output
    assert "Sample 2" not in output
    assert "builtin" in output
    assert "72" in output


def test_show_as_json(tiny_llama: Path) -> None:
    options = ("--calibration", "builtin:code=2", "--calibration", "builtin:chinese=1")
    document = json.loads(_run("show", tiny_llama, *options, "--sequence-length", 24, "--json"))
    assert [(source["source"], source["samples"]) for source in document["sources"]] == [
        ("builtin:code", 2),
        ("builtin:chinese", 1),
    ]
    assert len(document["first"]) == 3
    assert document["first"][0]["tokens"] == 24


def test_every_dataset_with_a_short_name_is_a_source() -> None:
    rows = json.loads(_run("datasets", "--json"))
    assert [row["name"] for row in rows] == list(KNOWN_SETS)
    assert all(row["licence"] for row in rows)
    for row in rows:
        assert parse_source(row["source"]).word == row["source"]
        assert parse_source(f"{row['name']}=8").count == 8
    assert "gsm8k" in _run("datasets")
