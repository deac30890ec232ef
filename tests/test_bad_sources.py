"""What `quantize` says to damaged mixtures of experts in FP8, and that it goes on where it stopped."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from msquant.checkpoint.checkpoint_reader import INDEX_NAME
from msquant.checkpoint.output_folder import OutputFolder
from msquant.errors import MsquantError
from msquant.flows.pipeline import Progress, quantize
from msquant.formats.golden_stick.form import GoldenStickFormat
from msquant.recipe.recipe import Recipe, validate_recipe
from tests.fixtures.fp8 import dequantize_blocks, to_fp8
from tests.fixtures.policies import rules
from tests.fixtures.quantize_process import digests
from tests.fixtures.tiny_families import write_tiny

LAYERS = 3  # The first is dense; another one behind them predicts a second token.
PREDICTION = f"model.layers.{LAYERS}."
BLOCK = (32, 32)
EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
DENSE = "model.layers.0.mlp.up_proj.weight"


def recipe_for(model: Path) -> Recipe:
    return validate_recipe(
        {
            "model": str(model),
            "quantization": {
                "schemes": rules(skip=["lm_head", "kv_b_proj"], dynamic=["mlp."]),
                "smooth_alpha": [0.5],
            },
            "calibration": {"samples": 2, "sequence_length": 32},
        },
        "test",
    )


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for shard in folder.glob("*.safetensors") for name, t in load_file(shard).items()}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny DeepSeek-V3 in FP8, in several shards; copy it, never change it."""
    folder = tmp_path_factory.mktemp("published")
    write_tiny(
        folder / "bfloat16",
        "deepseek_v3",
        layers=LAYERS,
        dtype="bfloat16",
        max_shard_size="150KB",
        prediction_layers=1,
    )
    return to_fp8(folder / "bfloat16", folder / "fp8", BLOCK)


@pytest.fixture(scope="module")
def recipe(published: Path) -> Recipe:
    return recipe_for(published)


@pytest.fixture(scope="module")
def result(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run that nothing disturbs writes."""
    return quantize(recipe, tmp_path_factory.mktemp("result") / "out").folder


@pytest.fixture
def model(published: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(published, tmp_path / "model")


def test_an_fp8_source_gives_what_its_dequantized_twin_gives(
    published: Path, result: Path, tmp_path: Path
) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(published, twin, ignore=shutil.ignore_patterns("model*"))
    tensors = read_tensors(published)
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("_scale_inv")}
    assert EXPERT + "_scale_inv" in scales
    for name, scale in scales.items():
        weight = name.removesuffix("_scale_inv")
        tensors[weight] = dequantize_blocks(tensors[weight], scale, BLOCK)
    save_file(tensors, twin / "model.safetensors", metadata={"format": "pt"})
    edit_config(twin, quantization_config=None)

    expected, ours = digests(quantize(recipe_for(twin), tmp_path / "out").folder), digests(result)
    # The manifest names the source.
    assert expected.pop("msquant.json") != ours.pop("msquant.json")
    assert expected == ours
    config = json.loads((result / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "golden-stick"}
    assert GoldenStickFormat().validate(result, verify_hashes=True) == []


def test_the_prediction_layer_is_carried_through(published: Path, result: Path) -> None:
    source, written = read_tensors(published), read_tensors(result)
    names = [name for name in source if name.startswith(PREDICTION) and not name.endswith("_scale_inv")]
    assert len(names) > 30
    assert {name for name in written if name.startswith(PREDICTION)} == set(names)
    description = json.loads((result / "quantization_description.json").read_text())
    for name in names:
        values = source[name]
        if values.dtype == torch.float8_e4m3fn:
            values = dequantize_blocks(values, source[f"{name}_scale_inv"], BLOCK)
        assert torch.equal(written[name].float(), values.to(written[name].dtype).float()), name
        assert description[name] == "FLOAT"
    assert {written[name].dtype for name in names} == {torch.bfloat16, torch.float32}
    assert written[EXPERT].dtype == torch.int8


def test_a_model_without_its_prediction_layer_is_taken_as_it_is(model: Path, tmp_path: Path) -> None:
    for shard in model.glob("*.safetensors"):
        change(shard, lambda tensors: [tensors.pop(n) for n in list(tensors) if n.startswith(PREDICTION)])
    rebuild_index(model)
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe_for(model), tmp_path / "out", progress=Progress(layers=stop))


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def shard_of(folder: Path, tensor: str) -> Path:
    index = json.loads((folder / INDEX_NAME).read_text())
    return folder / index["weight_map"][tensor]


def change(shard: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(shard)
    edit(tensors)
    save_file(tensors, shard, metadata={"format": "pt"})


def rebuild_index(folder: Path) -> None:
    weight_map = {}
    for shard in folder.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            weight_map |= dict.fromkeys(file.keys(), shard.name)
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def remove(folder: Path, *names: str) -> None:
    """Remove tensors as if they had never been there."""
    for name in names:
        change(shard_of(folder, name), lambda tensors, name=name: tensors.pop(name))
    rebuild_index(folder)


def add(folder: Path, name: str) -> None:
    change(shard_of(folder, DENSE), lambda tensors: tensors.update({name: torch.ones(4)}))
    rebuild_index(folder)


def replace(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    change(shard_of(folder, name), lambda tensors: tensors.update({name: edit(tensors[name]).contiguous()}))


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept, indent=2))


def edit_index(folder: Path, tensor: str, shard: str) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"][tensor] = shard
    (folder / INDEX_NAME).write_text(json.dumps(index))


BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing expert": (lambda f: remove(f, EXPERT, EXPERT + "_scale_inv"), ["no tensor", EXPERT]),
    "expert of a wrong shape": (
        lambda f: replace(f, EXPERT, lambda w: w[:-1]),
        [EXPERT, "[31, 64]", "[32, 64]"],
    ),
    "missing scale": (lambda f: remove(f, DENSE + "_scale_inv"), [DENSE + "_scale_inv", "missing"]),
    "scale of a wrong shape": (
        lambda f: replace(f, DENSE + "_scale_inv", lambda s: s[:-1]),
        [DENSE + "_scale_inv", "[2, 2]", "[3, 2]", "[32, 32]"],
    ),
    "config with another block size": (
        lambda f: edit_config(f, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 32]}),
        ["_scale_inv", "weight_block_size"],
    ),
    "index that names a shard that is not there": (
        lambda f: edit_index(f, EXPERT, "model-00077-of-00077.safetensors"),
        ["model-00077-of-00077.safetensors", "missing"],
    ),
    "index that names the wrong shard": (
        lambda f: edit_index(f, EXPERT, shard_of(f, DENSE).name),
        [EXPERT, "does not hold it"],
    ),
    "tensor that config.json does not ask for": (
        lambda f: add(f, "model.layers.1.mlp.experts.0.lora_A.weight"),
        ["model.layers.1.mlp.experts.0.lora_A.weight", "config.json does not ask for"],
    ),
    "config with more experts": (
        lambda f: edit_config(f, n_routed_experts=12),
        ["model.layers.1.mlp.gate.weight", "[8, 64]", "[12, 64]"],
    ),
    "config with fewer experts": (
        lambda f: edit_config(f, n_routed_experts=4, n_group=1, topk_group=1),
        ["model.layers.1.mlp.gate.weight", "[8, 64]", "[4, 64]"],
    ),
    "config with more layers": (
        lambda f: edit_config(f, num_hidden_layers=LAYERS + 2),
        [f"no tensor model.layers.{LAYERS + 1}."],
    ),
    "config with fewer layers": (
        lambda f: edit_config(f, num_hidden_layers=LAYERS - 1),
        [f"model.layers.{LAYERS - 1}."],
    ),
    "config with another dense layer": (
        lambda f: edit_config(f, first_k_dense_replace=2),
        ["model.layers.1.mlp.down_proj.weight"],
    ),
    "part of the prediction layer": (
        lambda f: remove(f, PREDICTION + "eh_proj.weight"),
        ["no tensor", PREDICTION + "eh_proj.weight"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_source_is_refused_and_leaves_nothing(model: Path, tmp_path: Path, case: str) -> None:
    damage, words = BAD[case]
    damage(model)
    with pytest.raises(MsquantError) as caught:
        quantize(recipe_for(model), tmp_path / "out")
    for word in words:
        assert word in str(caught.value)
    assert caught.value.where
    assert caught.value.remedy
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def set_nan(codes: torch.Tensor) -> torch.Tensor:
    codes = codes.clone()
    codes.view(torch.uint8)[7, 9] = 0x7F
    return codes


def test_nan_in_the_last_layer_keeps_the_others_and_can_be_repaired(
    recipe: Recipe, published: Path, result: Path, model: Path, tmp_path: Path
) -> None:
    replace(model, EXPERT, set_nan)
    with pytest.raises(MsquantError) as caught:
        quantize(recipe, tmp_path / "out", source=str(model))
    assert f"{EXPERT} holds NaN or infinity in 1 of 2048 places" in str(caught.value)
    assert caught.value.where == str(shard_of(model, EXPERT))
    assert "2 of 3 decoder layers are finished" in caught.value.__notes__[0]
    assert not (tmp_path / "out").exists()

    shutil.copy(shard_of(published, EXPERT), shard_of(model, EXPERT))
    seen: list[tuple[int, int]] = []
    progress = Progress(layers=lambda count, done: seen.append((count, done)))
    quantize(recipe, tmp_path / "out", source=str(model), progress=progress)
    assert seen == [(3, 2)]
    assert digests(tmp_path / "out") == digests(result)


RUN = """
import resource, sys
from pathlib import Path
from msquant.flows.pipeline import Progress, quantize
from tests.test_bad_sources import recipe_for

def fill(record):
    # Stands for a full disk without the right to mount one: no file may grow beyond this from now on.
    if record["index"] == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

quantize(recipe_for(Path(sys.argv[1])), Path(sys.argv[2]), progress=Progress(layer=fill))
"""


@pytest.mark.e2e
def test_a_disk_that_fills_at_a_middle_layer_keeps_the_one_before(
    recipe: Recipe, published: Path, result: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-c", RUN, str(published), str(output)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "OutputError" in process.stderr
    assert "model-00002-of-00005.safetensors" in process.stderr
    assert "1 of 3 decoder layers are finished" in process.stderr
    assert not output.exists()
    partial = tmp_path / "out.partial"
    assert not list(partial.glob(".*.tmp"))
    assert not (partial / "model-00002-of-00005.safetensors").exists()

    seen: list[tuple[int, int]] = []
    quantize(recipe, output, progress=Progress(layers=lambda count, done: seen.append((count, done))))
    assert seen == [(3, 1)]
    assert digests(output) == digests(result)


def test_damaged_hidden_states_are_noticed_and_the_run_starts_over(
    recipe: Recipe, result: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        quantize(recipe, tmp_path / "out", progress=Progress(layer=stop))
    partial = OutputFolder(tmp_path / "out", overwrite=False).path
    (hidden,) = (path for path in (partial / "scratch").iterdir() if path.is_file())
    content = np.fromfile(hidden, np.uint8)
    content[1000] ^= 4
    content.tofile(hidden)
    journal = (partial / "journal.jsonl").read_bytes()

    with pytest.raises(MsquantError, match="checksum") as caught:
        quantize(recipe, tmp_path / "out")
    assert caught.value.where == str(hidden)
    assert "--restart" in str(caught.value.remedy)
    assert (partial / "journal.jsonl").read_bytes() == journal

    quantize(recipe, tmp_path / "out", restart=True)
    assert digests(tmp_path / "out") == digests(result)
