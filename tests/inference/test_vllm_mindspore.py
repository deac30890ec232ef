"""The vLLM-MindSpore engine against a stand-in of the package.

The package runs on an Ascend NPU only, so what is tested here is the order of imports, the environment and
the exact arguments that reach it, in a process of its own. The stand-in takes the place of the missing NPU
and of nothing else; no text it returns says anything about the real engine.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from msquant.errors import EngineError
from msquant.inference.serving import ServingSettings
from msquant.inference.vllm_mindspore import (
    VllmMindSporeEngine,
    available,
    engine_environment,
    quantization_method,
)

RECORD = """
import json, os, sys

def record(*event):
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps(event) + "\\n")
"""
VLLM_MINDSPORE = """
import os, sys
from stand_in_record import record
heavy = sorted({"torch", "transformers", "mindspore", "vllm"} & set(sys.modules))
record("import vllm_mindspore", os.environ.get("VLLM_MS_MODEL_BACKEND"), heavy)
"""
VLLM = """
import os
from types import SimpleNamespace
from stand_in_record import record
record("import vllm")

def SamplingParams(**options):
    record("SamplingParams", options)
    return options

class LLM:
    def __init__(self, **options):
        record("LLM", options)
        if os.environ.get("FAIL"):
            raise ValueError("Invalid quantization method.\\nlong trace")

    def generate(self, *arguments):
        record("generate", arguments)
        return [
            SimpleNamespace(
                prompt=prompt,
                outputs=[SimpleNamespace(text=f" text {i}", token_ids=[i, 2], finish_reason="stop")],
            )
            for i, prompt in enumerate(arguments[0])
        ]
"""
SCRIPT = """
import json, sys
from pathlib import Path
from msquant.errors import EngineError
from msquant.inference.engine import Sampling
from msquant.inference.vllm_mindspore import VllmMindSporeEngine

folder, nodes, sampling = Path(sys.argv[1]), sys.argv[2], Sampling(**json.loads(sys.argv[3]))
streamed = []
try:
    engine = VllmMindSporeEngine(folder, device_nodes=nodes)
    completions = engine.generate(["I am", "Today is"], sampling, lambda i, text: streamed.append([i, text]))
except EngineError as error:
    print(json.dumps({"error": str(error)}))
else:
    print(json.dumps({"texts": [c.text for c in completions], "ids": [c.token_ids for c in completions],
                      "reasons": [c.finish_reason for c in completions], "streamed": streamed,
                      "name": engine.name}))
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / "quantization_description.json").write_text("{}")
    return folder


def run(
    model: Path, tmp_path: Path, sampling: dict[str, Any] | None = None, **environment: str
) -> tuple[dict[str, Any], list[Any]]:
    """Run the engine in a process with the stand-in; returns its result and what the stand-in recorded."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "stand_in_record.py").write_text(RECORD)
    (packages / "vllm_mindspore.py").write_text(VLLM_MINDSPORE)
    (packages / "vllm.py").write_text(VLLM)
    (tmp_path / "davinci0").touch()
    record = tmp_path / "record.jsonl"
    clean = {k: v for k, v in os.environ.items() if k not in ("VLLM_MS_MODEL_BACKEND", "vLLM_MODEL_BACKEND")}
    root = str(Path(__file__).parents[2])
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            SCRIPT,
            str(model),
            str(tmp_path / "davinci[0-9]*"),
            json.dumps(sampling or {}),
        ],
        env=clean
        | {"PYTHONPATH": os.pathsep.join([str(packages), root]), "RECORD": str(record)}
        | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(process.stdout), [json.loads(line) for line in record.read_text().splitlines()]


def test_calls_are_those_of_the_guide(model: Path, tmp_path: Path) -> None:
    result, record = run(model, tmp_path)
    assert record == [
        # Nothing that would load another torch has been imported before.
        ["import vllm_mindspore", "Native", []],
        ["import vllm"],
        ["LLM", {"model": str(model), "quantization": "golden-stick"}],
        ["SamplingParams", {"temperature": 0.0, "top_p": 0.95, "max_tokens": 16}],
        ["generate", [["I am", "Today is"], {"temperature": 0.0, "top_p": 0.95, "max_tokens": 16}]],
    ]
    assert result == {
        "texts": [" text 0", " text 1"],
        "ids": [[0, 2], [1, 2]],
        "reasons": ["stop", "stop"],
        "streamed": [[0, " text 0"], [1, " text 1"]],
        "name": "vllm-mindspore",
    }


def test_seed_goes_along_when_it_matters(model: Path, tmp_path: Path) -> None:
    _, record = run(model, tmp_path, {"temperature": 0.7, "seed": 5, "max_tokens": 3})
    options = {"temperature": 0.7, "top_p": 0.95, "seed": 5, "max_tokens": 3}
    assert ["SamplingParams", options] in record


def test_stop_strings_go_along(model: Path, tmp_path: Path) -> None:
    _, record = run(model, tmp_path, {"stop": ["\n\n", "END"]})
    (options,) = [event[1] for event in record if event[0] == "SamplingParams"]
    assert options["stop"] == ["\n\n", "END"]


def test_floating_point_folder_names_no_quantization(model: Path, tmp_path: Path) -> None:
    (model / "quantization_description.json").unlink()
    _, record = run(model, tmp_path)
    assert ["LLM", {"model": str(model)}] in record


def test_backend_of_the_user_wins(model: Path, tmp_path: Path) -> None:
    _, record = run(model, tmp_path, VLLM_MS_MODEL_BACKEND="MindONE")
    assert record[0][1] == "MindONE"


def test_failure_inside_vllm(model: Path, tmp_path: Path) -> None:
    result, _ = run(model, tmp_path, FAIL="1")
    assert "ValueError: Invalid quantization method." in result["error"]
    assert str(model) in result["error"]
    assert "--engine embedded" in result["error"]


@pytest.mark.parametrize(
    ("architecture", "backend"),
    [("LlamaForCausalLM", "Native"), ("DeepseekV3ForCausalLM", "MindFormers"), ("OtherForCausalLM", None)],
)
def test_backend_by_architecture(tmp_path: Path, architecture: str, backend: str | None) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    environment = engine_environment(tmp_path, ServingSettings(), {})
    assert environment.pop("VLLM_MS_MODEL_BACKEND", None) == backend
    assert environment == {
        "HCCL_OP_EXPANSION_MODE": "AIV",
        "MS_ENABLE_LCCL": "off",
        "MS_ALLOC_CONF": "enable_vmm:true",
    }
    old = engine_environment(tmp_path, ServingSettings(), {"vLLM_MODEL_BACKEND": "MindFormers"})
    assert (old["vLLM_MODEL_BACKEND"], "VLLM_MS_MODEL_BACKEND" in old) == ("MindFormers", False)
    chosen = engine_environment(tmp_path, ServingSettings(model_backend="MindONE"), {"UNRELATED": "1"})
    assert (chosen["VLLM_MS_MODEL_BACKEND"], "UNRELATED" in chosen) == ("MindONE", False)


def test_environment_of_all_settings(model: Path) -> None:
    settings = ServingSettings(
        tensor_parallel_size=2,
        devices=(6, 7),
        hccl_buffsize=2048,
        ms_mempool_block_size=4,
        ms_enable_lccl=True,
        hccl_op_expansion_mode="HOST",
        ms_alloc_conf="enable_vmm:false",
    )
    assert engine_environment(model, settings, {"HCCL_BUFFSIZE": "512"}) == {
        "VLLM_MS_MODEL_BACKEND": "Native",
        "HCCL_OP_EXPANSION_MODE": "HOST",
        "MS_ENABLE_LCCL": "on",
        "MS_ALLOC_CONF": "enable_vmm:false",
        "ASCEND_RT_VISIBLE_DEVICES": "6,7",
        # What is set already stays as it is.
        "HCCL_BUFFSIZE": "512",
        "MS_MEMPOOL_BLOCK_SIZE": "4",
    }


def test_quantization_method(model: Path) -> None:
    assert quantization_method(model) == "golden-stick"
    (model / "quant_model_description.json").write_text("{}")
    with pytest.raises(EngineError, match="holds both"):
        quantization_method(model)
    (model / "quantization_description.json").unlink()
    assert quantization_method(model) == "ascend"


def test_unavailable_without_the_package(model: Path) -> None:
    assert "vllm_mindspore is not installed" in str(available())
    with pytest.raises(EngineError, match="vllm_mindspore is not installed") as caught:
        VllmMindSporeEngine(model)
    assert "--engine embedded" in str(caught.value.remedy)


def test_unavailable_without_an_npu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("vllm_mindspore", "vllm"):
        (tmp_path / f"{package}.py").write_text("raise AssertionError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    nodes = str(tmp_path / "davinci[0-9]*")
    assert available(nodes) == f"there is no Ascend NPU on this machine (no {nodes})"
    (tmp_path / "davinci_manager").touch()
    assert available(nodes) is not None
    (tmp_path / "davinci7").touch()
    assert available(nodes) is None
