"""`quantize` from end to end on a tiny model: what is written, what it computes, and what bad input does."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from msquant.calibration.tokens import evaluation_tokens
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.results import newest_result
from msquant.checkpoint.tokenizer import load_tokenizer
from msquant.checkpoint.writer import file_sha256
from msquant.errors import MsquantError
from msquant.evaluation.inputs import Text
from msquant.flows.comparison import score_folders
from msquant.flows.generation import generate
from msquant.flows.pipeline import Progress, quantize
from msquant.formats.golden_stick.form import GoldenStickFormat
from msquant.inference.engine_protocol import Sampling
from msquant.recipe.recipe import Recipe, validate_recipe
from tests.fixtures import torch_simulation
from tests.fixtures.quantize_process import digests
from tests.fixtures.tiny_model import write_tiny_llama


def short_recipe(model: Path, **calibration: object) -> Recipe:
    """A recipe with a coarse grid: these tests are about the flow."""
    return validate_recipe(
        {
            "model": str(model),
            "quantization": {"smooth_alpha": [0.4, 0.6, 0.8]},
            "calibration": {"samples": 4, "sequence_length": 32, **calibration},
        },
        "test",
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in bfloat16, in several shards."""
    folder = tmp_path_factory.mktemp("source") / "tiny"
    return write_tiny_llama(folder, dtype="bfloat16", max_shard_size="50KB")


@pytest.fixture(scope="module")
def result(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(short_recipe(source), tmp_path_factory.mktemp("result") / "tiny-osl").folder


def test_the_folder_keeps_the_contract(result: Path, source: Path) -> None:
    assert GoldenStickFormat().validate(result, verify_hashes=True) == []
    config = json.loads((result / "config.json").read_text())
    assert "quantization_config" not in config
    assert config == json.loads((source / "config.json").read_text())
    names = {path.name for path in result.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "quantization_description.json"} <= names
    assert {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)} <= names
    assert not list(result.parent.glob("*.partial*"))
    assert newest_result() == result


def test_the_manifest_tells_all(result: Path) -> None:
    manifest = json.loads((result / "msquant.json").read_text())
    assert manifest["recipe"]["calibration"]["samples"] == 4
    assert manifest["versions"]["mindspore-gs"] == "1.4.1"
    assert [layer["index"] for layer in manifest["layers"]] == [0, 1]
    for layer in manifest["layers"]:
        assert [group["name"] for group in layer["groups"]] == ["qkv", "o", "gate_up", "down"]
        assert all(group["alpha"] in (0.4, 0.6, 0.8) and group["loss"] > 0 for group in layer["groups"])
        assert 0 < layer["error"] < 0.05
    files = manifest["files"]
    assert set(files) == {path.name for path in result.iterdir()} - {"msquant.json"}
    for name, entry in files.items():
        assert entry["sha256"] == file_sha256(result / name)


def test_equal_inputs_give_equal_bytes(result: Path, source: Path, tmp_path: Path) -> None:
    again = quantize(short_recipe(source), tmp_path / "again").folder
    assert {p.name for p in again.iterdir()} == {p.name for p in result.iterdir()}
    for path in again.iterdir():
        assert path.read_bytes() == (result / path.name).read_bytes(), path.name


def test_engine_and_perplexity_agree_with_the_torch_simulation(result: Path, source: Path) -> None:
    simulation, tokenizer = torch_simulation.load_simulation(result), load_tokenizer(result)
    prompts = ["The for statement", "import", "A class definition is an executable statement"]

    completions = generate(
        result, prompts, Sampling(max_tokens=32, ignore_eos=True), engine="embedded"
    ).completions

    for prompt, completion in zip(prompts, completions, strict=True):
        assert list(completion.token_ids) == torch_simulation.greedy(simulation, tokenizer, prompt, 32)

    tokens = evaluation_tokens(tokenizer, sequences=4, sequence_length=64)
    floating, quantized = score_folders([source, result], [Text("held out", tokens)], "cpu")
    ours = quantized.overall.perplexity
    assert ours == pytest.approx(torch_simulation.perplexity(simulation, tokens), rel=1e-4)
    assert ours == pytest.approx(floating.overall.perplexity, rel=0.05)
    assert ours != pytest.approx(floating.overall.perplexity, rel=1e-6)


def test_a_float32_model_is_written_in_bfloat16(tiny_llama: Path, tmp_path: Path) -> None:
    folder = quantize(short_recipe(tiny_llama), tmp_path / "out").folder
    assert GoldenStickFormat().validate(folder) == []
    config = json.loads((folder / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "bfloat16"
    assert Checkpoint.open(folder).dtype("model.norm.weight") == "BF16"


def drop(folder: Path, name: str) -> None:
    (folder / name).unlink()


def rewrite(folder: Path, tensor: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    shard = Checkpoint.open(folder).shard_path(tensor)
    tensors = load_file(shard)
    tensors[tensor] = change(tensors[tensor])
    save_file(tensors, shard, metadata={"format": "pt"})


def set_nan(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.reshape(-1)[3] = np.nan
    return array


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 100)


UP = "model.layers.1.mlp.up_proj.weight"
BAD_SOURCES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "truncated shard": (truncate, [".safetensors", "truncated"]),
    "missing shard": (lambda f: drop(f, sorted(f.glob("*.safetensors"))[0].name), [".safetensors"]),
    "missing index": (lambda f: drop(f, "model.safetensors.index.json"), ["model.safetensors.index.json"]),
    "wrong shape": (lambda f: rewrite(f, UP, lambda a: a[:, :-1].copy()), [UP, "[128, 63]", "[128, 64]"]),
    "NaN in the first decoder layer": (
        lambda f: rewrite(f, UP.replace("1", "0"), set_nan),
        [UP.replace("1", "0"), "NaN"],
    ),
    "NaN in the embedding": (
        lambda f: rewrite(f, "model.embed_tokens.weight", set_nan),
        ["model.embed_tokens.weight", "NaN"],
    ),
    "unsupported architecture": (lambda f: edit_config(f, model_type="gpt2"), ["gpt2", "llama"]),
    "unknown rope scaling": (
        lambda f: edit_config(f, rope_scaling={"rope_type": "spiral", "factor": 2.0}),
        ["spiral", "supported types"],
    ),
    "quantized source": (
        lambda f: edit_config(f, quantization_config={"quant_method": "fp8"}),
        ["quantization_config", "unquantized"],
    ),
    "no tokenizer": (
        lambda f: [p.unlink() for p in f.iterdir() if "token" in p.name and p.suffix == ".json"] and None,
        ["tokenizer"],
    ),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_a_bad_source_is_named_and_leaves_nothing(source: Path, tmp_path: Path, case: str) -> None:
    damage, words = BAD_SOURCES[case]
    model = shutil.copytree(source, tmp_path / "model")
    damage(model)
    before = newest_result()
    with pytest.raises(MsquantError) as caught:
        quantize(short_recipe(model), tmp_path / "out")
    for word in words:
        assert word in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    assert newest_result() == before


def test_an_empty_calibration_set_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(MsquantError) as caught:
        quantize(short_recipe(source, source=str(tmp_path / "empty.txt")), tmp_path / "out")
    assert "empty.txt" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_occupied_output_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(MsquantError, match=r"msquant did not write"):
            quantize(short_recipe(source), tmp_path / "out", overwrite=overwrite)
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "thesis.txt"]


def test_ctrl_c_before_a_layer_is_finished_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupt(count: int, done: int) -> None:
        assert (tmp_path / "out.partial" / "model-00003-of-00003.safetensors").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(short_recipe(source), tmp_path / "out", progress=Progress(layers=interrupt))
    assert list(tmp_path.iterdir()) == []


BAD_LATER: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "NaN": (lambda f: rewrite(f, UP, set_nan), [UP, "NaN"]),
    "truncated meanwhile": (
        lambda f: os.truncate(Checkpoint.open(f).shard_path(UP), 900),
        [".safetensors", "truncated"],
    ),
    "replaced meanwhile": (
        lambda f: rewrite(f, UP, lambda a: a[::-1].copy()),
        [".safetensors", "written to"],
    ),
}


@pytest.mark.parametrize("case", BAD_LATER)
def test_what_is_finished_survives_an_error_in_a_later_layer(
    source: Path, result: Path, tmp_path: Path, case: str
) -> None:
    damage, words = BAD_LATER[case]
    model = shutil.copytree(source, tmp_path / "model")
    if "meanwhile" in case:
        progress = Progress(layer=lambda record: damage(model))
    else:
        progress = Progress()
        damage(model)
    with pytest.raises(MsquantError) as caught:
        quantize(short_recipe(model), tmp_path / "out", progress=progress)
    for word in words:
        assert word in str(caught.value)
    assert "1 of 2 decoder layers are finished" in caught.value.__notes__[0]
    assert not (tmp_path / "out").exists()

    shutil.rmtree(model)
    shutil.copytree(source, model)
    seen: list[tuple[int, int]] = []
    progress = Progress(layers=lambda count, done: seen.append((count, done)))
    quantize(short_recipe(model), tmp_path / "out", progress=progress)
    assert seen == [(2, 1)]
    ours, expected = digests(tmp_path / "out"), digests(result)
    # The manifest names the model's folder.
    assert ours.pop("msquant.json") != expected.pop("msquant.json")
    assert ours == expected


RUN = """
import resource, signal, sys
from msquant.flows.pipeline import Progress, quantize
from tests.test_pipeline import short_recipe
if sys.argv[3] == "full":
    # Stands for a full disk without the right to mount one: no file may grow beyond this.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
progress = Progress(layer=lambda record: print("layer", record["index"], flush=True))
quantize(short_recipe(sys.argv[1]), sys.argv[2], progress=progress)
"""


def run_pipeline(source: Path, output: Path, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", RUN, str(source), str(output), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.e2e
def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path) -> None:
    process = run_pipeline(source, tmp_path / "out", "full")
    _, errors = process.communicate()
    assert process.returncode != 0
    assert "OutputError" in errors
    assert "model-0000" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.e2e
def test_a_killed_process_leaves_nothing_that_looks_finished(source: Path, tmp_path: Path) -> None:
    process = run_pipeline(source, tmp_path / "out", "")
    assert process.stdout is not None
    assert process.stdout.readline() == "layer 0\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()

    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial" / "config.json").exists()
    with pytest.raises(MsquantError, match="unfinished"):
        generate(tmp_path / "out.partial", ["I am"], Sampling(), engine="embedded")
    assert GoldenStickFormat().validate(quantize(short_recipe(source), tmp_path / "out").folder) == []
