"""`msquant recipes` as a person or a script calls it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from msquant.recipe.recipe import load_recipe, shipped_recipes

pytestmark = pytest.mark.e2e


def msquant(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "msquant", "recipes", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "80", "PATH": ""})


def test_list_shows_every_name_in_full_in_80_columns() -> None:
    run = msquant("list")
    assert run.returncode == 0, run.stderr
    for name in shipped_recipes():
        assert f"│ {name} " in run.stdout
    # Sentences are left whole where they are not shown on a terminal.
    assert max(len(line) for line in run.stdout.splitlines() if not line[:1].isalpha()) <= 80


def test_list_of_a_pattern_as_json() -> None:
    run = msquant("list", "deepseek-r1-distill-*", "--json")
    listed = json.loads(run.stdout)
    assert run.returncode == 0
    assert [entry["name"] for entry in listed] == [
        name for name in shipped_recipes() if name.startswith("deepseek-r1-distill-")
    ]
    assert listed[0]["model"] == "deepseek-ai/DeepSeek-R1-Distill-Llama-70B"
    assert listed[0]["description"]


def test_show_prints_the_file() -> None:
    run = msquant("show", "deepseek-ai/DeepSeek-R1")
    assert run.returncode == 0
    assert run.stdout == shipped_recipes()["deepseek-r1"].read_text(encoding="utf-8")
    assert "The router (mlp.gate) is never quantized." in run.stdout


def test_show_as_json_has_the_defaults_too() -> None:
    run = msquant("show", "deepseek-r1", "--json")
    document = json.loads(run.stdout)
    assert document["name"] == "deepseek-r1"
    assert document["recipe"]["calibration"]["seed"] == 0
    assert document["recipe"] == load_recipe(shipped_recipes()["deepseek-r1"]).model_dump(mode="json")


@pytest.mark.parametrize("command", ["list", "show"])
def test_an_unknown_name_exits_with_1_and_names_the_nearest(command: str) -> None:
    run = msquant(command, "deepsek-r1")
    assert run.returncode == 1
    assert run.stdout == ""
    assert "did you mean deepseek-r1?" in run.stderr
    error = json.loads(msquant(command, "deepsek-r1", "--json").stdout)["error"]
    assert "did you mean deepseek-r1?" in error["remedy"]


def test_copy_validate_and_change(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    run = msquant("copy", "qwen3-30b-a3b", file)
    assert run.returncode == 0, run.stderr
    assert f"msquant recipes validate {file}" in run.stdout
    run = msquant("validate", file)
    assert run.returncode == 0
    assert run.stdout == f"Valid: {file}, for Qwen/Qwen3-30B-A3B.\n"
    document = json.loads(msquant("validate", file, "--json").stdout)
    assert document["valid"] is True
    assert {"*": "W8A8_DYNAMIC"} in document["recipe"]["quantization"]["schemes"]

    file.write_text(file.read_text().replace("schemes:", "schems:"))
    run = msquant("validate", file)
    assert run.returncode == 1
    assert "unknown key quantization.schems (did you mean schemes?)" in run.stderr
    assert str(file) in run.stderr
    run = msquant("validate", file, "--json")
    assert run.returncode == 1
    assert "did you mean schemes?" in json.loads(run.stdout)["error"]["what"]


def test_copy_replaces_a_file_only_with_overwrite(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("mine")
    run = msquant("copy", "qwen3-8b", file)
    assert run.returncode == 1
    assert "exists already" in run.stderr
    assert "--overwrite" in run.stderr
    assert file.read_text() == "mine"
    assert msquant("copy", "qwen3-8b", file, "--overwrite").returncode == 0
    assert load_recipe(file).model == "Qwen/Qwen3-8B"


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    run = msquant("validate", tmp_path / "none.yaml")
    assert run.returncode == 1
    assert "cannot be read" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize("command", [(), ("list",), ("show",), ("copy",), ("validate",)])
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    run = msquant(*command, "--help")
    assert run.returncode == 0
    assert "Example: msquant recipes" in run.stdout
