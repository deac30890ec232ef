"""`msquant analyze` as its user runs it: a process, its two outputs and its exit code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from msquant.recipe.recipe import load_recipe

pytestmark = pytest.mark.e2e

RECIPE = """
description: two layers
model: {model}
quantization:
  algorithm: smoothquant
calibration:
  samples: 4
  sequence_length: 16
"""


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(model=tiny_llama))
    return path


def msquant(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "msquant", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_a_person_sees_the_ranking_and_gets_a_recipe_that_quantize_takes(
    recipe: Path, tmp_path: Path
) -> None:
    done = msquant("analyze", recipe.name, "--keep-float", 2, "--output", "mixed.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 of 2 decoder layers" in done.stderr
    assert "ETA" in done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    for word in ("gate_up", "share", "if float", "summed error then", "size then", "peak memory", "8 of 8"):
        assert word in done.stdout
    assert "Next: msquant quantize mixed.yaml" in done.stdout
    mixed = load_recipe(tmp_path / "mixed.yaml")
    assert mixed.description == "two layers"
    kept = [name for name, _ in mixed.quantization.schemes[:-2]]
    assert 0 < len(kept) <= 2
    quantized = msquant("quantize", "mixed.yaml", "--output", "out", "--json", cwd=tmp_path)
    assert quantized.returncode == 0, quantized.stderr
    description = json.loads((tmp_path / "out" / "quantization_description.json").read_text())
    assert [name for name, kind in description.items() if kind == "FLOAT" and "_proj" in name] == sorted(
        f"{name}.weight" for name in kept
    )


def test_without_a_file_the_recipe_is_printed(recipe: Path, tmp_path: Path) -> None:
    done = msquant("analyze", recipe, "--max-error", 0, "--algo", "rtn", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    printed = yaml.safe_load(done.stdout[done.stdout.index("description: two layers") :])
    assert printed["quantization"]["algorithm"] == "rtn"
    assert len(printed["quantization"]["schemes"]) == 14 + 2


def test_a_script_reads_json(recipe: Path, tmp_path: Path) -> None:
    options = ["--samples", 2, "--sequence-length", 8, "--memory-budget", "10KB", "--json"]
    done = msquant("analyze", recipe, *options, "--max-size", "1GB", "--output", "mixed.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert len(document["groups"]) == 8
    for group in document["groups"]:
        assert group["error"] > 0
        assert group["float_bytes"] > 0
        assert group["dynamic_error"] is None
    assert len(document["kept"]) == 14
    grown = sum(group["float_bytes"] for group in document["groups"])
    assert document["mixed_bytes"] == document["output_bytes"] + grown
    assert document["recipe"] == load_recipe(tmp_path / "mixed.yaml").model_dump(mode="json")
    assert document["file"] == "mixed.yaml"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-model"], ["no-such-model", "msquant recipes list"]),
        (["tiny.yaml", "--keep-float", "15"], ["--keep-float", "15", "14"]),
        (["tiny.yaml", "--keep-dynamic", "1"], ["--keep-dynamic", "native backend", "W8A8 and FLOAT"]),
        (["tiny.yaml", "--keep-float", "1", "--max-error", "1"], ["--keep-float and --max-error"]),
        (["tiny.yaml", "--max-size", "lots"], ["--max-size", "lots"]),
        (["tiny.yaml", "--max-size", "1KB"], ["--max-size", "or more"]),
        (["tiny.yaml", "--output", "mixed.yaml"], ["--output", "--keep-float"]),
        (["tiny.yaml", "--keep-float", "1", "--output", "mixed"], ["mixed", ".yaml"]),
        (["tiny.yaml", "--keep-float", "1", "--output", "tiny.yaml"], ["tiny.yaml", "--overwrite"]),
        (["tiny.yaml", "--algo", "aqlm"], ["aqlm", "osl"]),
        (["tiny.yaml", "--calibration", "empty.txt"], ["empty.txt"]),
    ],
)
def test_a_wrong_option_is_named(
    recipe: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    (tmp_path / "empty.txt").write_text("")
    before = recipe.read_text()
    done = msquant("analyze", *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    for word in words:
        assert word in done.stderr
    assert recipe.read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "tiny.yaml"]


def test_ctrl_c_exits_with_130_and_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    # A search over many tokens, to have the time to interrupt it.
    text = RECIPE.format(model=tiny_llama).replace("smoothquant", "osl-golden-stick")
    (tmp_path / "slow.yaml").write_text(text)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    command = [
        sys.executable,
        "-m",
        "msquant",
        "analyze",
        "slow.yaml",
        "--sequence-length",
        "64",
        "--samples",
        "256",
    ]
    command += ["--keep-float", "1", "--output", "mixed.yaml"]
    environment = os.environ | {"TMPDIR": str(scratch)}
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    deadline = time.monotonic() + 120
    while not list(scratch.glob(".msquant-*/*hidden-00001*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert list(scratch.iterdir()) == []
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["scratch", "slow.yaml"]
