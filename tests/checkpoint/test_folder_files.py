"""A folder is made of what its marker and its manifest list; what else would be read is refused by name."""

import json
import shutil
from pathlib import Path

import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.download_marker import DownloadMarker, MarkedFile
from msquant.checkpoint.folder_files import listed_files, require_own_files
from msquant.checkpoint.tokenizer import load_tokenizer
from msquant.checkpoint.weight_map import find_weights
from msquant.errors import CheckpointError
from msquant.models.config_json import read_config


def mark(folder: Path, *names: str, complete: bool = True) -> None:
    files = {name: MarkedFile(1, "sha256", "0" * 64, 1) for name in names}
    DownloadMarker("modelers", "org/name", "main", "2" * 40, complete, files).write(folder)


def write_manifest(folder: Path, *names: str) -> None:
    files = {name: {"size": 1, "sha256": "0" * 64} for name in names}
    (folder / "msquant.json").write_text(json.dumps({"files": files}))


def test_a_folder_that_says_nothing_lists_nothing(tmp_path: Path) -> None:
    (tmp_path / "anything.safetensors").touch()
    assert require_own_files(tmp_path) is None
    assert require_own_files(tmp_path / "nowhere") is None
    (tmp_path / "msquant.json").write_text("{}")
    assert listed_files(tmp_path) is None


def test_a_result_is_what_its_manifest_lists(tmp_path: Path) -> None:
    write_manifest(tmp_path, "a.safetensors", "../../evil")
    assert require_own_files(tmp_path) == {"a.safetensors", "msquant.json"}


def test_a_result_that_was_downloaded_is_what_both_list(tmp_path: Path) -> None:
    write_manifest(tmp_path, "a.safetensors", "b.safetensors")
    mark(tmp_path, "a.safetensors", "README.md", "msquant.json")
    assert listed_files(tmp_path) == {"a.safetensors", "msquant.json"}


def test_a_manifest_that_was_not_downloaded_counts_for_nothing(tmp_path: Path) -> None:
    mark(tmp_path, "a.safetensors")
    write_manifest(tmp_path, "b.safetensors")
    assert listed_files(tmp_path) == {"a.safetensors"}
    with pytest.raises(CheckpointError, match="does not belong") as caught:
        require_own_files(tmp_path)
    assert caught.value.where == str(tmp_path / "msquant.json")


@pytest.mark.parametrize(
    "name",
    [
        "model-00009-of-00009.safetensors",
        "model.safetensors.index.json",
        "generation_config.json",
        "quant_model_description.json",
        "tokenizer.model",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
    ],
)
@pytest.mark.parametrize("kind", ["marker", "manifest"])
def test_what_is_not_listed_and_would_be_read_is_named(kind: str, name: str, tmp_path: Path) -> None:
    (mark if kind == "marker" else write_manifest)(tmp_path, "model.safetensors", "config.json")
    (tmp_path / "README.md").touch()
    (tmp_path / "evaluation.json").touch()
    require_own_files(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="does not belong to this model") as caught:
        require_own_files(tmp_path)
    assert caught.value.where == str(tmp_path / name)
    assert "remove it" in (caught.value.remedy or "")


def test_every_reader_refuses_it(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    mark(folder, *(path.name for path in folder.iterdir()))
    for read in (Checkpoint.open, read_config, load_tokenizer, find_weights):
        read(folder)
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    for read in (Checkpoint.open, read_config, load_tokenizer, find_weights):
        with pytest.raises(CheckpointError, match="does not belong"):
            read(folder)


def test_weights_that_are_listed_are_not_replaced_by_others(tiny_llama: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    names = [path.name for path in folder.iterdir()]
    mark(folder, *names, "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match="missing") as caught:
        Checkpoint.open(folder)
    assert caught.value.where == str(folder / "model.safetensors.index.json")
