"""`msquant quantize NAME` downloads what is not here; folders that are not complete are refused."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from msquant.checkpoint.download_marker import DownloadMarker, MarkedFile
from tests.fixtures.hub_faults import Fault
from tests.fixtures.hub_server import Hub, serve

pytestmark = pytest.mark.e2e

HUB_ID = "some-org/tiny"
RECIPE = f"""
model: {HUB_ID}
quantization: {{smooth_alpha: [0.5]}}
calibration: {{samples: 2, sequence_length: 32}}
"""


@pytest.fixture
def hub(tiny_llama: Path, tmp_path: Path) -> Iterator[Hub]:
    """Serves the tiny model beside what nobody needs, and writes a recipe for it."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    with serve(hub := Hub()) as address:
        files = {path.name: path.read_bytes() for path in tiny_llama.iterdir()}
        hub.repository(HUB_ID).push(
            files | {"consolidated.safetensors": b"x", "original/params.json": b"{}", "model.bin": b"x"}
        )
        os.environ["TEST_ENDPOINT"] = address
        yield hub


def msquant(*arguments: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "HF_ENDPOINT": os.environ.get("TEST_ENDPOINT", "http://127.0.0.1:9"),
        "OPENMIND_HUB_ENDPOINT": "http://127.0.0.1:9",
        "HF_HOME": str(cwd / "home"),
        "MSQUANT_CACHE": str(cwd / "cache"),
    }
    command = [sys.executable, "-m", "msquant", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=environment | variables, capture_output=True, text=True, check=False
    )


def test_what_is_not_here_is_fetched_once(hub: Hub, tmp_path: Path) -> None:
    hub.faults.once("model.safetensors", Fault(status=404))
    broken = msquant("quantize", "tiny.yaml", "--output", "out", cwd=tmp_path)
    assert broken.returncode == 1
    assert not (tmp_path / "out").exists()
    planned = msquant("plan", "tiny.yaml", "--no-probe", cwd=tmp_path)
    assert "is incomplete" in planned.stderr

    done = msquant("quantize", "tiny.yaml", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "kB in 6 files, commit " in done.stderr
    assert "from Hugging Face Hub into" in done.stderr
    fetched = tmp_path / "cache" / "models" / "some-org" / "tiny"
    names = {path.name for path in fetched.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not {"consolidated.safetensors", "original", "model.bin"} & names
    assert msquant("inspect", "out", cwd=tmp_path).returncode == 0

    again = msquant("quantize", "tiny.yaml", "--output", "again", "--offline", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "downloading" not in again.stderr


@pytest.mark.parametrize("way", ["--offline", "HF_HUB_OFFLINE", "unreachable"])
def test_without_a_network_the_size_and_the_next_step_are_said(way: str, tmp_path: Path) -> None:
    options = [way] if way.startswith("-") else []
    variables = {"HF_HUB_OFFLINE": "1"} if way.startswith("HF") else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = msquant("quantize", "deepseek-r1-distill-qwen-1.5b", *options, cwd=tmp_path, **variables)
    assert done.returncode == 1
    assert "about 4 GB" in done.stderr
    assert "msquant plan deepseek-r1-distill-qwen-1.5b says what quantizing it needs" in done.stderr
    assert "msquant download deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --output FOLDER" in done.stderr
    assert done.stderr.count("error:") == 1
    assert ("cannot be reached" in done.stderr) == (way == "unreachable")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_a_taken_output_is_refused_before_the_download(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    done = msquant("quantize", "tiny.yaml", "--output", "out", cwd=tmp_path)
    assert done.returncode == 1
    assert hub.requests == []


def test_what_has_no_room_to_be_quantized_is_not_downloaded(
    hub: Hub, tmp_path: Path, small_disk: Path
) -> None:
    hub.repository("deepseek-ai/DeepSeek-R1").push({"config.json": b"{}", "model.safetensors": b"x"})
    done = msquant("quantize", "deepseek-r1", "--output", small_disk / "out", cwd=tmp_path)
    assert done.returncode == 1
    assert "B are free on its disk, 702.7 GB are needed" in done.stderr
    assert "MSQUANT_CACHE" in done.stderr
    assert done.stderr.rstrip().endswith("msquant plan deepseek-r1")
    assert hub.requests == []


@pytest.mark.parametrize(
    "command",
    [("inspect",), ("run", "--prompt", "x", "--model"), ("quantize",), ("quantize", "tiny.yaml", "--source")],
    ids=lambda command: " ".join(command),
)
def test_an_incomplete_folder_is_refused(command: tuple[str, ...], tiny_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    folder = tmp_path / "half"
    folder.mkdir()
    for path in tiny_llama.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    marker = DownloadMarker("modelers", HUB_ID, "main", "0" * 40)
    marker.files = {"config.json": MarkedFile(1, "git-sha1", "0" * 40, 1), "x": MarkedFile(1, "sha256", "")}
    marker.write(folder)
    done = msquant(*command, "half", cwd=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "download is not complete: 1 of 2 files are missing" in done.stderr
    assert f"msquant download {HUB_ID} --hub modelers --output half" in done.stderr
    marker.complete = True
    marker.files = {
        path.name: MarkedFile(path.stat().st_size, "sha256", "")
        for path in folder.iterdir()
        if path.is_file()
    }
    marker.write(folder)
    if command == ("inspect",):
        assert msquant(*command, "half", cwd=tmp_path).returncode == 0
