"""`msquant report` as a person or a script calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.formats.folders import write_folder
from tests.reporting.test_comparison import scored

pytestmark = pytest.mark.e2e


def msquant(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "msquant", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model")


def test_a_page_is_written_and_the_verdict_said(folder: Path, tmp_path: Path) -> None:
    run = msquant("report", folder)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("check: Its accuracy was not measured")
    assert f"Wrote {tmp_path / 'model-report.html'}." in run.stdout
    assert "counting the levels of integer weights" in run.stderr
    page = (tmp_path / "model-report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "<script" not in page
    again = msquant("report", folder)
    assert again.returncode == 1
    assert "exists already" in again.stderr
    assert "--overwrite" in again.stderr
    assert msquant("report", folder, "--overwrite", "--no-check").returncode == 0


def test_json_is_one_document_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    run = msquant("report", folder, "--json")
    document = json.loads(run.stdout)
    assert run.returncode == 0, run.stderr
    assert document["verdict"]["level"] == "check"
    assert document["size"]["tensors"] > 0
    assert len(document["histograms"][0]["counts"]) == 256
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_markdown_goes_where_it_is_asked_to(folder: Path, tmp_path: Path) -> None:
    run = msquant("report", folder, "--format", "markdown", "--output", tmp_path / "r.md", "--json")
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["name"] == "model"
    assert (tmp_path / "r.md").read_text(encoding="utf-8").startswith("# model\n")


def test_bad_input_is_said_clearly(folder: Path, tmp_path: Path) -> None:
    run = msquant("report", folder, "--format", "pdf")
    assert run.returncode == 1
    assert "there is no format 'pdf'" in run.stderr
    assert "html, markdown" in run.stderr
    run = msquant("report", tmp_path / "nothing", "--json")
    assert run.returncode == 1
    assert "there is no such folder" in json.loads(run.stdout)["error"]["what"]


def test_several_runs_are_put_on_one_page(folder: Path, tmp_path: Path) -> None:
    other = scored(tmp_path / "other", 0.0435, 1)
    run = msquant("report", folder, other, "--no-check")
    assert run.returncode == 0, run.stderr
    assert "model, check: Its accuracy was not measured" in run.stdout
    assert "Note: model was not evaluated." in run.stdout
    assert f"Wrote {tmp_path / 'model-comparison.html'}." in run.stdout
    assert (tmp_path / "model-comparison.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    run = msquant("report", folder, other, "--no-check", "--json")
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert document["labels"] == ["model", "other"]
    assert document["runs"][1]["limits"]["kl"] == 0.1


def test_what_cannot_be_compared_is_said_clearly(folder: Path, tmp_path: Path) -> None:
    theirs = write_folder(tmp_path / "theirs")
    (theirs / "msquant.json").unlink()
    run = msquant("report", folder, theirs, "--json")
    assert run.returncode == 1
    error = json.loads(run.stdout)["error"]
    assert error["where"] == str(theirs)
    assert "was not made by msquant" in error["what"]
    assert "msquant compare" in error["remedy"]
    run = msquant("report", folder, theirs, "--sensitivity", "x.json")
    assert run.returncode == 1
    assert "--sensitivity: is for the report on one folder" in run.stderr
