"""A quantization that is killed, at any moment, ends with the bytes of one that is not."""

import json
import random
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from msquant.checkpoint.writer import write_shard
from tests.fixtures import quantize_process
from tests.fixtures.quantize_process import FEED_FORWARD, RECIPE, digests, ended, journaled, records
from tests.fixtures.tiny_families import write_tiny
from tests.fixtures.tiny_model import write_tiny_llama

pytestmark = pytest.mark.e2e

LAYERS = 4
PARTS = 24
start = partial(quantize_process.start, threads=1)


def finish(recipe: Path, output: Path, *options: str, code: int = 0) -> str:
    return ended(start(recipe, output, *options), code)


def kill_after(process: subprocess.Popen[str], seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    model = write_tiny_llama(folder / "model", layers=LAYERS, dtype="bfloat16")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=model, feed_forward=""))
    return path


@pytest.fixture(scope="module")
def expected(recipe: Path) -> dict[str, str]:
    """What a run that nobody disturbs writes."""
    finish(recipe, recipe.parent / "whole")
    return digests(recipe.parent / "whole")


def start_layers(recipe: Path, output: Path, count: int) -> subprocess.Popen[str]:
    """A process that has finished so many decoder layers, and goes on."""
    process = start(recipe, output)
    deadline = time.monotonic() + 120
    while journaled(output) < count:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_a_killed_run_continues_with_the_layer_it_was_in(
    recipe: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    kill_after(start_layers(recipe, output, 2), 0)
    done = journaled(output)
    assert not output.exists()

    errors = finish(recipe, output)
    assert f"continuing: {done} of {LAYERS} decoder layers are done" in errors
    assert errors.count(f" of {LAYERS} decoder layers  ") == LAYERS - done
    assert digests(output) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of no known architecture in shards enough to be killed among them."""
    folder = tmp_path_factory.mktemp("stranger")
    generator, names = np.random.default_rng(0), {}
    for layer in range(PARTS):
        tensors = {
            f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight": generator.standard_normal(
                (1024, 1024), np.float32
            ).astype(ml_dtypes.bfloat16)
            for expert in range(2)
            for part in ("gate", "up", "down")
        }
        write_shard(folder / f"model-{layer}.safetensors", tensors)
        names |= dict.fromkeys(tensors, f"model-{layer}.safetensors")
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    sizes = {"hidden_size": 1024, "num_hidden_layers": PARTS, "vocab_size": 512}
    config = {"model_type": "unknown_moe", "torch_dtype": "bfloat16", **sizes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_killed_run_without_calibration_continues_with_equal_bytes(stranger: Path, tmp_path: Path) -> None:
    options = ("--calibration", "none", "--format", "ascend", "--no-evaluate")
    finish(stranger, tmp_path / "whole", *options)
    output = tmp_path / "out"
    process = start(stranger, output, *options)
    deadline = time.monotonic() + 120
    while len(records(output)) < 2:
        assert process.poll() is None, "it must not be finished before it is killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    kill_after(process, 0)
    assert not output.exists()
    assert 2 <= len(records(output)) < PARTS
    partial = tmp_path / "out.partial"
    kept = [name for line in records(output) for name in json.loads(line)["record"]["files"]]
    written = {name: (partial / name).stat().st_ino for name in kept}

    finish(stranger, output, *options)
    assert {name: (output / name).stat().st_ino for name in written} == written, "nothing is done again"
    assert digests(output) == digests(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(
    recipe: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start_layers(recipe, output, 1)
    process.send_signal(signal.SIGINT)
    errors = ended(process, 130)
    assert "the same command continues" in errors
    assert "Traceback" not in errors
    finish(recipe, output)
    assert digests(output) == expected


def test_another_recipe_is_refused_until_it_starts_over(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    kill_after(start_layers(recipe, output, 1), 0)

    errors = finish(recipe, output, "--seed", "3", code=1)
    assert "seed" in errors
    assert "--restart" in errors
    assert journaled(output) >= 1, "being refused must not lose what is finished"

    finish(recipe, output, "--seed", "3", "--restart")
    assert json.loads((output / "msquant.json").read_text())["seed"] == 3


def test_a_second_process_is_told_who_works_on_the_output(recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = start_layers(recipe, output, 1)
    process.send_signal(signal.SIGSTOP)
    assert f"process {process.pid}" in finish(recipe, output, code=1)
    process.send_signal(signal.SIGCONT)
    ended(process)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "deepseek_v3"])
def test_twenty_kills_at_random_moments(kind: str, tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", kind, layers=LAYERS, dtype="bfloat16")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model, feed_forward=FEED_FORWARD[kind]))
    began = time.monotonic()
    finish(recipe, tmp_path / "whole")
    whole = time.monotonic() - began
    expected = digests(tmp_path / "whole")

    moments, kills, runs = random.Random(0), 0, 0
    while kills < 20:
        runs += 1
        output = tmp_path / f"out{runs}"
        while not output.exists():
            before = journaled(output)
            process = start(recipe, output)
            kill_after(process, moments.uniform(0, whole) if kills < 20 else 120)
            if process.returncode == -signal.SIGKILL:
                kills += 1
                # It may have been done, and only not yet gone.
                assert output.exists() or journaled(output) >= before
        assert digests(output) == expected
        assert not output.with_name(output.name + ".partial").exists()
