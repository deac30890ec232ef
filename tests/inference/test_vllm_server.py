"""The command of vLLM's own server; see `stand_in_vllm` for what it stands for."""

import json
import subprocess
from pathlib import Path

import pytest

from msquant.deploy.vllm_server import server_command
from msquant.errors import EngineError
from msquant.inference.environments import SITE
from tests.inference.stand_in_vllm import compressed_folder, install_stand_in

PLUGINS = """
import json
from importlib.metadata import entry_points
found = list(entry_points(group="vllm.general_plugins"))
for each in found:
    each.load()()
print(json.dumps([each.value for each in found]))
"""


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "cache"))
    return install_stand_in() / "bin" / "python"


def test_command_and_environment(python: Path, tiny_llama: Path, tmp_path: Path) -> None:
    model = compressed_folder(tiny_llama, tmp_path / "my-model")
    launch = server_command(
        model,
        "127.0.0.1",
        8001,
        dtype="float32",
        options=["--max-num-seqs", "16"],
        environment={"HF_HUB_OFFLINE": "0"},
    )
    assert launch.argv[:3] == (str(python), "-m", "vllm.entrypoints.openai.api_server")
    options = " ".join(launch.argv[3:])
    assert options == (
        f"--model {model.resolve()} --served-model-name my-model --host 127.0.0.1 --port 8001 "
        "--dtype float32 --max-model-len -1 --enforce-eager --max-num-seqs 16"
    )
    assert launch.env["VLLM_CPU_KVCACHE_SPACE"] == "4"
    assert launch.env["PYTHONPATH"] == str(SITE)
    assert "HF_HUB_OFFLINE" not in launch.env
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in launch.env


def test_vllm_finds_the_workarounds_as_its_plugin(python: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """In the way that vLLM looks for plugins in each of its processes."""
    launch = server_command(compressed_folder(tiny_llama, tmp_path / "model"), "127.0.0.1", 8001)
    process = subprocess.run(
        [str(python), "-c", PLUGINS], env=launch.environment(), capture_output=True, text=True, timeout=60
    )
    assert json.loads(process.stdout) == ["msquant_vllm_workarounds:apply"]
    assert "stand-in: _init_amx" in process.stderr


def test_a_folder_that_vllm_cannot_serve(python: Path, tiny_quantized: Path) -> None:
    with pytest.raises(EngineError, match="golden-stick format"):
        server_command(tiny_quantized, "127.0.0.1", 8001)


def test_not_installed(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path))
    with pytest.raises(EngineError, match="vllm-cpu is not installed"):
        server_command(tiny_llama, "127.0.0.1", 8001)
