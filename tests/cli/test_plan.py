"""`msquant plan` and `msquant quantize --dry-run` as their user runs them."""

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.test_quantize import msquant

pytestmark = pytest.mark.e2e

KEYS = {
    *("workers", "node_cores", "shared_bytes", "timelines"),
    *("model", "source", "output", "architecture", "stored", "variant", "samples", "sequence_length"),
    "formats",
    *("sources", "source_characters"),
    *("parts", "parameters", "source_bytes", "output_bytes", "scratch_bytes", "disk_bytes", "free_disk"),
    *("peak_memory", "available_memory", "seconds", "seconds_by_stage", "notes", "problems", "fits"),
    "machine",
    "serving",
}
PART_KEYS = {"kind", "index", "linears", "experts", "parameters", "source_bytes", "output_bytes", "seconds"}


def test_a_person_sees_what_it_takes(tiny_llama: Path, tmp_path: Path) -> None:
    done = msquant("plan", tiny_llama, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in (
        "0-1",
        "dense",
        "size after",
        "peak memory",
        "disk",
        "llama-osl",
        "comparing the result with the float model",
        "other processes at work",
    ):
        assert word in done.stdout
    assert "measuring this machine with a piece of the model" in done.stderr
    assert "WARNING" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_published_model_does_not_fit_and_is_shown_all_the_same(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free > 700e9:
        pytest.skip("DeepSeek-R1 fits on this disk")
    done = msquant("plan", "deepseek-r1", "--no-probe", cwd=tmp_path)
    assert done.returncode == 1
    for word in (
        "0-2",
        "3-60",
        "256 experts",
        "prediction",
        "ends",
        "not estimated",
        "16 NPUs of 64 GiB by size",
        "published config.json",
    ):
        assert word in done.stdout
    assert "does not fit: disk:" in done.stderr
    assert "--output" in done.stderr

    as_json = msquant("plan", "deepseek-r1", "--no-probe", "--json", "--samples", 8, cwd=tmp_path)
    assert as_json.returncode == 1
    document = json.loads(as_json.stdout)
    assert document["fits"] is False
    assert "does not fit" not in as_json.stderr
    assert document["source"] is None
    assert document["samples"] == 8
    assert len(document["parts"]) == 63
    assert document["serving"]["npus"] == 16


@pytest.mark.parametrize("command", [["plan"], ["quantize", "--dry-run"]])
def test_a_script_reads_json(tiny_llama: Path, tmp_path: Path, command: list[str]) -> None:
    options = ["--samples", 3, "--sequence-length", 32, "--memory-budget", "100MB", "--output", "there/out"]
    done = msquant(*command, tiny_llama, *options, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert set(document) == KEYS
    assert all(set(part) == PART_KEYS for part in document["parts"])
    assert [document[key] for key in ("samples", "sequence_length", "fits")] == [3, 32, True]
    assert document["output"] == "there/out"
    assert document["source"] == str(tiny_llama)
    assert document["disk_bytes"] == document["output_bytes"] + document["scratch_bytes"]
    assert 0 < document["seconds"]["low"] < document["seconds"]["high"]
    assert list(tmp_path.iterdir()) == []


def test_a_source_in_place_of_the_recipes_model(tiny_llama: Path, tmp_path: Path) -> None:
    done = msquant("plan", "llama-3.1-8b", "--source", tiny_llama, "--no-probe", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"] == str(tiny_llama)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no-such-model"], ["no-such-model", "msquant recipes list"]),
        (["llama-3.1-8b", "--source", "."], ["config.json"]),
        (["llama-3.1-8b", "--source", "../../etc"], ["try:"]),
        (["llama-3.1-8b", "--samples", "0"], ["calibration.samples"]),
        (["llama-3.1-8b", "--memory-budget", "much"], ["--memory-budget", "4GB"]),
        (["llama-3.1-8b", "--node-cores", "8"], ["--node-cores", "--workers", "try:"]),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    done = msquant("plan", *arguments, "--no-probe", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") == 1
    for word in words:
        assert word in done.stderr
