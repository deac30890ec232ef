"""A folder that was changed, and a model that does not fit."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.writer import file_sha256
from msquant.errors import CheckpointError, EngineError
from msquant.flows import folder_checks
from msquant.flows.folder_checks import require_intact, require_memory, weight_bytes
from msquant.flows.generation import generate
from msquant.inference.engine_protocol import Sampling
from msquant.kernels import onednn
from msquant.models.config_json import read_config
from msquant.schemes import W8A16
from tests.fixtures.tiny_families import write_tiny
from tests.formats.expert_folders import schemes_of, write_experts
from tests.formats.folders import CONFIG
from tests.inference.quantized_folder import write_quantized

SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    """A quantized folder with a manifest."""
    folder = write_quantized(tiny_llama, tmp_path / "model", calibration=list(range(60)))
    files = {
        path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in folder.iterdir()
    }
    (folder / "msquant.json").write_text(json.dumps({"files": files}))
    return folder


def change_a_weight(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 1
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})


def test_a_changed_int8_weight_is_found_by_its_hash(folder: Path) -> None:
    require_intact(folder)
    size = (folder / SHARD).stat().st_size
    change_a_weight(folder)
    assert (folder / SHARD).stat().st_size == size
    with pytest.raises(CheckpointError, match="was changed: its sha256") as caught:
        generate(folder, ["I am"], Sampling(max_tokens=1))
    assert caught.value.where == str(folder / SHARD)
    assert f"msquant inspect {folder} --verify" in str(caught.value.remedy)
    require_intact(folder, verify=False)


def test_large_folders_are_hashed_on_demand(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_checks, "HASHED_BYTES", (folder / SHARD).stat().st_size - 1)
    change_a_weight(folder)
    require_intact(folder)
    with pytest.raises(CheckpointError, match="sha256"):
        require_intact(folder, verify=True)


def test_the_size_is_always_compared(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    save_file(tensors | {"added": np.zeros(3, np.int8)}, folder / SHARD)
    with pytest.raises(CheckpointError, match=r"[kMG]?B, msquant\.json says"):
        require_intact(folder, verify=False)


def test_a_missing_shard(folder: Path) -> None:
    (folder / SHARD).rename(folder / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: msquant\.json lists it"):
        require_intact(folder)


def test_settings_may_be_changed(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    require_intact(folder, verify=True)


def test_a_folder_of_another_tool_is_taken_as_it_is(folder: Path) -> None:
    (folder / "msquant.json").unlink()
    change_a_weight(folder)
    require_intact(folder, verify=True)


def test_a_damaged_manifest(folder: Path) -> None:
    (folder / "msquant.json").write_text('{"files": [')
    with pytest.raises(CheckpointError) as caught:
        require_intact(folder)
    assert caught.value.where == str(folder / "msquant.json")


def test_a_model_that_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_checks, "available_memory", lambda: 300_000_000)
    with pytest.raises(EngineError, match=r"about 0\.4 GB of memory, 0\.3 GB is free") as caught:
        generate(folder, ["I am"], Sampling())
    assert caught.value.where == str(folder)
    assert "vllm-mindspore" in str(caught.value.remedy)
    monkeypatch.setattr(folder_checks, "available_memory", lambda: None)
    require_memory(folder, read_config(folder))


@pytest.mark.parametrize("widened", [False, True])
def test_the_bytes_of_weights(folder: Path, widened: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "load_int8", lambda: None if widened else object())
    tensors = load_file(folder / SHARD).values()
    expected = sum(t.size * (1 if t.dtype == np.int8 and not widened else 4) for t in tensors)
    found = weight_bytes(Checkpoint.open(folder), read_config(folder))
    assert found == expected


def test_weights_that_alone_are_quantized_are_computed_in_floating_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "load_int8", object)
    alone = {module: W8A16 for module in schemes_of(CONFIG) if module.endswith("o_proj")}
    folder = tmp_path / "model"
    write_experts(folder, CONFIG, schemes=schemes_of(CONFIG) | alone, format_name="ascend")
    checkpoint = Checkpoint.open(folder)
    weights = [f"{module}.weight" for module in alone]
    each = {
        name: 4 if checkpoint.dtype(name) != "I8" or name in weights else 1 for name in checkpoint.names()
    }
    # The scales of weights that are dequantized are gone then.
    computed = [name for name in each if name.rpartition(".")[0] not in alone or name in weights]
    expected = sum(each[name] * math.prod(checkpoint.shape(name)) for name in computed)
    assert weight_bytes(checkpoint, read_config(folder)) == expected


def test_layers_that_are_not_computed_do_not_count(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "model", "deepseek_v3", num_nextn_predict_layers=1)
    config = read_config(folder)
    assert not config.tie_word_embeddings
    tensors = load_file(folder / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    expected = 4 * (sum(tensor.size for tensor in tensors.values()) - embedding.size)
    assert weight_bytes(Checkpoint.open(folder), config) == expected
    extra = f"model.layers.{config.num_hidden_layers}.eh_proj.weight"
    save_file(tensors | {extra: np.zeros((8, 8), np.float32)}, folder / "model.safetensors")
    assert weight_bytes(Checkpoint.open(folder), config) == expected
