"""`msquant doctor` as a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.inference.packages import write_package

pytestmark = pytest.mark.e2e


def doctor(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "msquant", "doctor", *options],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100"} | environment,
    )


def test_this_machine_is_fine(tmp_path: Path) -> None:
    run = doctor("--json", MSQUANT_CACHE=str(tmp_path))
    document = json.loads(run.stdout)
    assert (run.returncode, document["ok"]) == (0, True), run.stdout
    sections = [check["section"] for check in document["checks"]]
    assert list(dict.fromkeys(sections)) == [
        "python", "packages", "machine", "disk", "ascend", "engines", "hubs"
    ]  # fmt: skip
    status = {check["subject"]: check["status"] for check in document["checks"]}
    # On a very busy machine it may take longer than doctor waits, which is a warning.
    assert status["MindSpore"] in ("ok", "warning")
    assert status["vllm"] == "note"
    assert all(check["remedy"] for check in document["checks"] if check["status"] != "ok")


def test_what_is_broken_is_named_with_its_remedy(tmp_path: Path) -> None:
    write_package(tmp_path, "numpy", "2.1.0")
    # A package that is there and cannot be imported ends nothing but its own line.
    (tmp_path / "psutil.py").write_text("raise ImportError('no psutil here', name='psutil')")
    (tmp_path / "mindspore.py").write_text("raise ImportError('no MindSpore here')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    run = doctor(PYTHONPATH=path, MSQUANT_CACHE="/proc/cache")
    assert run.returncode == 1
    lines = [" ".join(line.split()) for line in run.stdout.splitlines()]
    assert any(line.startswith("error numpy 2.1.0; numpy<2,>=1.26 is needed") for line in lines)
    assert "try: pip install 'numpy<2,>=1.26'" in lines
    assert "error psutil no psutil here" in lines
    assert "error MindSpore does not compute here: ImportError: no MindSpore here" in lines
    assert any(line.startswith("error cache /proc/cache cannot be written to") for line in lines)
    assert any(line.startswith("ok Python 3.11") for line in lines)


def test_a_folder_that_cannot_be_served_here(tmp_path: Path) -> None:
    """This machine has no NPU and no vLLM-MindSpore: errors, each with its remedy, and nothing is started."""
    manifest = {"recipe": {"serving": {"tensor_parallel_size": 16, "nodes": 2, "launcher": "ray"}}}
    (tmp_path / "msquant.json").write_text(json.dumps(manifest))
    run = doctor(str(tmp_path), "--network-interface", "lo", "--json")
    document = json.loads(run.stdout)
    assert (run.returncode, document["ok"]) == (1, False)
    errors = {(c["section"], c["subject"]): c for c in document["checks"] if c["status"] == "error"}
    assert {("model", str(tmp_path)), ("ascend", "vllm-mindspore"), ("cluster", "Ray")} <= set(errors)
    assert all(check["remedy"] for check in errors.values())
    assert ("network", "interface") not in errors


def test_serving_options_that_do_not_fit(tmp_path: Path) -> None:
    run = doctor(str(tmp_path), "--recipe", "deepseek-r1", "--head-address=--head", "--json")
    assert run.returncode == 1
    assert json.loads(run.stdout)["error"]["what"].startswith("serving.head_address")
