"""`msquant upload` as its user runs it."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.hub_server import Hub, serve

pytestmark = pytest.mark.e2e

REPOSITORY = "my-org/Tiny-W8A8"
RECIPE = """
model: {model}
quantization: {{smooth_alpha: [0.5]}}
calibration: {{samples: 2, sequence_length: 32}}
"""


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, quantized as quickly as possible."""
    place = tmp_path_factory.mktemp("upload")
    (place / "tiny.yaml").write_text(RECIPE.format(model=tiny_llama))
    command = [sys.executable, "-m", "msquant", "quantize", "tiny.yaml", "--output", "Tiny-W8A8"]
    subprocess.run(command, cwd=place, capture_output=True, check=True)
    return place / "Tiny-W8A8"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve(hub := Hub()) as address:
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", hub.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield hub


def upload(*arguments: object, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "msquant", "upload", *map(str, arguments)]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_a_folder_goes_up_with_its_card_and_comes_down_again(hub: Hub, folder: Path, tmp_path: Path) -> None:
    options = [folder, REPOSITORY, "--hub", "huggingface", "--create", "--private", "--license", "mit"]
    document = json.loads(upload(*options, "--json").stdout)
    assert "README.md" in document["sent"]
    assert hub.repository(REPOSITORY).private
    assert not (folder / "README.md").exists()
    again = upload(*options)
    assert "0 of them were sent" in again.stdout
    assert hub.token not in again.stdout + again.stderr

    command = [sys.executable, "-m", "msquant", "download", REPOSITORY, "--hub", "huggingface", "--json"]
    down = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(down.stdout)["commit"] == document["commit"]
    for path in folder.iterdir():
        assert (tmp_path / "Tiny-W8A8" / path.name).read_bytes() == path.read_bytes()
    card = (tmp_path / "Tiny-W8A8" / "README.md").read_text()
    assert "license: mit" in card
    assert "| 2 | " in card
    assert str(tmp_path.parent) not in card


def test_a_dry_run_sends_nothing(hub: Hub, folder: Path) -> None:
    out = upload(folder, REPOSITORY, "--dry-run").stdout
    assert "model-00001-of-0000" in out
    assert "vllm-mindspore serve Tiny-W8A8" in out
    assert "README.md" in json.loads(upload(folder, REPOSITORY, "--dry-run", "--json").stdout)["files"]
    assert hub.requests == []


def test_a_folder_that_inspect_refuses_is_not_uploaded(hub: Hub, folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-10])
    assert "error:" in upload(broken, REPOSITORY, "--hub", "huggingface", "--create", code=1).stderr
    assert hub.requests == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--hub", "huggingface"], "--create"),
        (["--hub", "auto"], "modelers, huggingface"),
        (["--hub", "modelers"], "needs a token"),
    ],
)
def test_what_is_missing_is_said(options: list[str], words: str, hub: Hub, folder: Path) -> None:
    assert words in upload(folder, REPOSITORY, *options, code=1, MODELERS_TOKEN="").stderr


def test_links_are_not_followed(hub: Hub, folder: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in folder.iterdir():
        (linked / path.name).write_bytes(path.read_bytes())
    (linked / "secrets.json").symlink_to("/etc/passwd")
    assert "is a link" in upload(linked, REPOSITORY, "--hub", "huggingface", code=1).stderr
    assert hub.requests == []
