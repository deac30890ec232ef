"""A model's name leads to its folder, or to an error that says what would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import ModelError
from msquant.hub.models import is_hub_id, resolve_model
from msquant.zoo.bundled import smollm2_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def put_into_hub_cache(cache: Path, hub_id: str, source: Path, leave_out: tuple[str, ...] = ()) -> Path:
    """Lay a model's files out as huggingface_hub does: blobs, links to them in a snapshot, a ref to it."""
    model = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = model / "snapshots" / COMMIT
    for folder in (model / "blobs", model / "refs", snapshot):
        folder.mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(source.iterdir())):
        if file.name not in leave_out:
            (model / "blobs" / str(number)).write_bytes(file.read_bytes())
            (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache and an empty cache of msquant, for this process."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "msquant"))
    return tmp_path / "hub"


def test_bundled_name_is_the_converted_folder() -> None:
    assert resolve_model("smollm2-135m") == smollm2_folder()


def test_local_folder_is_itself(tiny_llama: Path) -> None:
    assert resolve_model(str(tiny_llama)) == tiny_llama


@pytest.mark.parametrize("name", ["", "no-such-model", "smollm2-135M", "~no-such-user/model"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(ModelError, match="no such model") as caught:
        resolve_model(name)
    assert "smollm2-135m" in (caught.value.remedy or "")


@pytest.mark.parametrize(
    "name",
    [
        "../etc/passwd-none",
        "org/../name",
        "org/..",
        "../name",
        "/org/name",
        "org\\name",
        "org/na\\me",
        "org/name/extra",
        "org/.hidden",
        "org/name.",
        "org/name\n",
        "org/na\0me",
        "org/na--me",
        "org/name.git",
        "org/na me",
        "-org/name",
        "o/" + "n" * 97,
    ],
)
def test_what_is_no_hub_id_never_reaches_a_cache(name: str, hub_cache: Path) -> None:
    assert not is_hub_id(name)
    with pytest.raises(ModelError, match="no such model"):
        resolve_model(name)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json") as caught:
        resolve_model(str(tmp_path))
    assert caught.value.where == str(tmp_path)


def test_file_instead_of_folder(tiny_llama: Path) -> None:
    with pytest.raises(ModelError, match="this is a file"):
        resolve_model(str(tiny_llama / "model.safetensors"))


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE"])
def test_a_hub_id_is_found_in_the_hugging_face_cache(variable: str, tmp_path: Path, tiny_llama: Path) -> None:
    cache = tmp_path / "hub"
    snapshot = put_into_hub_cache(cache, "some-org/Tiny-1.0", tiny_llama)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
        variable: str(tmp_path if variable == "HF_HOME" else cache),
        "HF_ENDPOINT": "http://127.0.0.1:9",
    }
    code = "from msquant.hub.models import resolve_model; print(resolve_model('some-org/Tiny-1.0'))"
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60
    )
    assert run.stdout.strip() == str(snapshot), run.stderr
    assert Checkpoint.open(snapshot).names() == Checkpoint.open(tiny_llama).names()


def test_the_cache_of_msquant_wins(hub_cache: Path, tiny_llama: Path) -> None:
    put_into_hub_cache(hub_cache, "some-org/tiny", tiny_llama)
    own = hub_cache.parent / "msquant" / "models" / "some-org" / "tiny"
    own.mkdir(parents=True)
    for file in tiny_llama.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    assert resolve_model("some-org/tiny") == own


def test_a_published_model_is_found_by_its_short_name(hub_cache: Path, tiny_llama: Path) -> None:
    snapshot = put_into_hub_cache(hub_cache, "Qwen/Qwen3-8B", tiny_llama)
    assert resolve_model("qwen3-8b") == resolve_model("qwen/qwen3-8b") == snapshot


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_an_incomplete_download_is_said_to_be_so(missing: str, hub_cache: Path, tiny_llama: Path) -> None:
    put_into_hub_cache(hub_cache, "some-org/tiny", tiny_llama, leave_out=(missing,))
    with pytest.raises(ModelError, match="is incomplete") as caught:
        resolve_model("some-org/tiny")
    assert "msquant download some-org/tiny" in (caught.value.remedy or "")


def test_weights_that_are_not_here_have_a_size_and_a_next_step(hub_cache: Path) -> None:
    with pytest.raises(ModelError, match="not on this machine") as caught:
        resolve_model("deepseek-ai/DeepSeek-R1")
    assert "about 689 GB" in caught.value.what
    assert caught.value.where == "deepseek-ai/DeepSeek-R1"
    assert "msquant download deepseek-ai/DeepSeek-R1 --output FOLDER" in (caught.value.remedy or "")
    assert "msquant quantize deepseek-r1 --source FOLDER" in (caught.value.remedy or "")


def test_an_unknown_hub_id_that_is_not_here(hub_cache: Path) -> None:
    with pytest.raises(ModelError, match="not on this machine") as caught:
        resolve_model("some-org/unheard-of")
    assert "GB" not in caught.value.what
    assert "msquant quantize FOLDER" in (caught.value.remedy or "")
