"""`msquant export` as its user runs it, and formats as other commands take them."""

import json
from pathlib import Path

import pytest

from tests.cli.test_quantize import msquant
from tests.formats.expert_folders import write_experts
from tests.test_export import MODELS

pytestmark = pytest.mark.e2e


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_experts(tmp_path / "m", MODELS["llama"])
    return tmp_path / "m"


def test_a_person_sees_progress_and_a_table(folder: Path, tmp_path: Path) -> None:
    done = msquant("export", "m", "--format", "compressed-tensors,ascend", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 of 3 parts" in done.stderr
    assert "compressed-tensors" in done.stdout
    inspected = msquant("inspect", "m-ascend", "--verify", cwd=tmp_path)
    assert inspected.returncode == 0, inspected.stdout + inspected.stderr
    said = inspected.stdout.replace("\n", " ")
    assert "it keeps every rule of 'ascend' for vllm-ascend, all file hashes match" in said


def test_a_script_reads_json_and_sees_errors(folder: Path, tmp_path: Path) -> None:
    options = ["--format", "ascend", "--output", "out", "--json"]
    done = msquant("export", folder, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (document,) = json.loads(done.stdout)
    assert (document["folder"], document["format"]) == (str(tmp_path / "out"), "ascend")

    refused = msquant("export", folder, *options, cwd=tmp_path)
    assert refused.returncode == 1
    assert "--overwrite" in json.loads(refused.stdout)["error"]["remedy"]


@pytest.mark.parametrize("command", [["export", "m"], ["quantize", "m-source"]])
def test_an_unknown_format(folder: Path, tmp_path: Path, command: list[str]) -> None:
    done = msquant(*command, "--format", "ascend,gguf", cwd=tmp_path)
    assert done.returncode == 1
    assert "--format" in done.stderr
    assert "golden-stick, compressed-tensors, ascend" in " ".join(done.stderr.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "m-source"]
