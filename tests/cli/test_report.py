"""`msquant report` as a person or a script calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.formats.folders import write_folder

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
