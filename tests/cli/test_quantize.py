"""`msquant quantize` as its user runs it: a process, its two outputs and its exit code."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

RECIPE = """
model: {model}
quantization:
  smooth_alpha: [0.4, 0.7]
calibration:
  samples: 2
  sequence_length: 32
"""


@pytest.fixture
def recipe(tiny_llama: Path, tmp_path: Path) -> Path:
    """A recipe for the tiny model with a coarse grid."""
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE.format(model=tiny_llama))
    return path


def msquant(*arguments: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "msquant", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, **options)


def test_a_person_sees_progress_a_table_and_the_next_step(recipe: Path, tmp_path: Path) -> None:
    done = msquant("quantize", recipe.name, "--algo", "osl", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert (tmp_path / "tiny-osl" / "msquant.json").is_file()
    assert "2 of 2 decoder layers" in done.stderr
    assert "ETA" in done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    assert "GoldenStick" not in done.stdout + done.stderr
    for word in ("size before", "size after", "time", "peak memory", "error", "gate_up", "msquant run"):
        assert word in done.stdout
    inspected = msquant("inspect", "tiny-osl", "--verify", cwd=tmp_path)
    assert inspected.returncode == 0, inspected.stdout + inspected.stderr
    layers = json.loads((tmp_path / "tiny-osl" / "msquant.json").read_text())["layers"]
    assert [f"{layer['error']:.2e}" in inspected.stdout for layer in layers] == [True, True]


def test_a_script_reads_json_and_may_overwrite(recipe: Path, tmp_path: Path) -> None:
    options = ["--samples", 3, "--seed", 7, "--output", "out", "--json"]
    done = msquant("quantize", recipe, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["folder"] == str(tmp_path / "out")
    assert 0 < document["output_bytes"] < document["source_bytes"]
    assert [len(layer["groups"]) for layer in document["layers"]] == [4, 4]
    manifest = json.loads((tmp_path / "out" / "msquant.json").read_text())
    assert manifest["recipe"]["calibration"]["samples"] == 3
    assert manifest["seed"] == 7

    refused = msquant("quantize", recipe, *options, cwd=tmp_path)
    assert refused.returncode == 1
    assert "--overwrite" in json.loads(refused.stdout)["error"]["remedy"]
    assert msquant("quantize", recipe, *options, "--overwrite", cwd=tmp_path).returncode == 0


def test_verbose_shows_golden_sticks_log(recipe: Path, tmp_path: Path) -> None:
    done = msquant("quantize", recipe, "-v", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "GoldenStick" in done.stderr
    assert json.loads(done.stdout)["folder"] == str(tmp_path / "tiny-osl")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-model"], ["no-such-model", "msquant recipes list"]),
        (["smollm2-135m", "--algo", "ols"], ["--algo", "ols", "did you mean osl?"]),
        (["smollm2-135m", "--samples", "0"], ["calibration.samples"]),
        (["tiny.yaml", "--calibration", "missing.txt"], ["missing.txt"]),
        (["tiny.yaml", "--samples", "1000000"], ["tokens"]),
        (["tiny.yaml", "--device", "tpu"], ["tpu", "cpu"]),
        (["."], ["config.json"]),
    ],
)
def test_a_wrong_option_is_named(
    recipe: Path, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    done = msquant("quantize", *arguments, "--output", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_ctrl_c_exits_with_130_and_leaves_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    # A search over many tokens, to have the time to interrupt it.
    command = [sys.executable, "-m", "msquant", "quantize", str(tiny_llama), "--algo", "osl-golden-stick"]
    command += ["--output", "out", "--sequence-length", "64", "--samples", "256"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    # The outputs of the first layer are being written.
    while not list((tmp_path / "out.partial" / "scratch").glob("*hidden-00001*")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs root")
def test_the_network_is_not_used(recipe: Path, tmp_path: Path) -> None:
    command = ["unshare", "--net", sys.executable, "-m", "msquant", "quantize", str(recipe)]
    probe = subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True)
    if probe.returncode:
        pytest.skip("network namespaces are not allowed here")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
