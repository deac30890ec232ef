"""The vLLM-MindSpore engine against a stand-in of the package.

The package runs on an Ascend NPU only, so what is tested here is the real worker process: the order of its
imports, its environment and the exact arguments that reach the package. The stand-in takes the place of the
missing NPU and of nothing else; no text it returns says anything about the real engine.
"""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from msquant.deploy.vllm_mindspore_server import server_command
from msquant.errors import EngineError
from msquant.inference.engine_protocol import Sampling
from msquant.inference.serving_settings import ServingSettings
from msquant.inference.vllm_mindspore import (
    VllmMindSporeEngine,
    available,
    engine_environment,
    quantization_method,
    worker_launch,
)
from msquant.recipe.recipe import find_recipe

VLLM_MINDSPORE = """
import json, os, sys

def record(*event):
    with open(os.environ["RECORD"], "a") as file:
        file.write(json.dumps(event) + "\\n")

heavy = sorted({"torch", "transformers", "mindspore", "vllm"} & set(sys.modules))
names = ("VLLM_MS_MODEL_BACKEND", "MS_ALLOC_CONF", "ASCEND_RT_VISIBLE_DEVICES")
record("import vllm_mindspore", {name: os.environ[name] for name in names if name in os.environ}, heavy)
print("printed by the import of vllm_mindspore")
"""
VLLM = """
import os, signal
from types import SimpleNamespace
from vllm_mindspore import record
from vllm.sampling_params import RequestOutputKind
record("import vllm")

__version__ = "0.11.0"

def SamplingParams(output_kind, **options):
    assert output_kind is RequestOutputKind.DELTA
    record("SamplingParams", options)
    return options["max_tokens"]

class LLM:
    def __init__(self, **options):
        record("LLM", options)
        if os.environ.get("TROUBLE") == "load":
            raise ValueError("Invalid quantization method.\\nlong trace")
        self.llm_engine = Engine()

class Engine:
    model_config = SimpleNamespace(dtype="torch.bfloat16", max_model_len=2048)
    running = {}

    def add_request(self, name, prompt, params):
        record("add_request", prompt)
        self.running[name] = [0, params]

    def abort_request(self, names):
        for name in names:
            del self.running[name]

    def step(self):
        if os.environ.get("TROUBLE") == "generate":
            os.kill(os.getpid(), signal.SIGKILL)
        outputs = []
        for name, request in list(self.running.items()):
            count, request[0] = request[0], request[0] + 1
            reason = "length" if request[0] == request[1] else None
            part = SimpleNamespace(text=f" w{count}", token_ids=[count], finish_reason=reason)
            outputs.append(SimpleNamespace(request_id=name, outputs=[part], finished=reason is not None))
            if reason:
                del self.running[name]
        return outputs
"""
SAMPLING_PARAMS = """
import enum

class RequestOutputKind(enum.Enum):
    DELTA = 1
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    (folder / "quantization_description.json").write_text("{}")
    return folder


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine with the stand-in and a device node, and none of the variables."""
    packages = tmp_path / "packages"
    (packages / "vllm").mkdir(parents=True)
    (packages / "vllm_mindspore.py").write_text(VLLM_MINDSPORE)
    (packages / "vllm/__init__.py").write_text(VLLM)
    (packages / "vllm/sampling_params.py").write_text(SAMPLING_PARAMS)
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("PYTHONPATH", str(packages))
    monkeypatch.setenv("RECORD", str(tmp_path / "record.jsonl"))
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "cache"))
    for name in ("VLLM_MS_MODEL_BACKEND", "vLLM_MODEL_BACKEND", "ASCEND_RT_VISIBLE_DEVICES", "MS_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "davinci0").touch()
    return str(tmp_path / "davinci[0-9]*")


def recorded(tmp_path: Path) -> list[Any]:
    return [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]


def test_calls_and_texts(model: Path, nodes: str, tmp_path: Path) -> None:
    streamed: list[tuple[int, str]] = []
    with closing(VllmMindSporeEngine(model, device_nodes=nodes)) as engine:
        completions = engine.generate(
            ["I am", "Today is"], Sampling(max_tokens=2), lambda i, text: streamed.append((i, text))
        )
    options = {"block_size": 128, "gpu_memory_utilization": 0.9, "quantization": "golden-stick"}
    sampling = {"max_tokens": 2, "temperature": 0.0, "top_p": 0.95, "ignore_eos": False, "stop": []}
    assert recorded(tmp_path) == [
        # Nothing that would load another torch has been imported before.
        [
            "import vllm_mindspore",
            {"VLLM_MS_MODEL_BACKEND": "Native", "MS_ALLOC_CONF": "enable_vmm:true"},
            [],
        ],
        ["import vllm"],
        ["LLM", {"model": str(model)} | options],
        ["SamplingParams", sampling],
        ["add_request", "I am"],
        ["SamplingParams", sampling],
        ["add_request", "Today is"],
    ]
    assert streamed == [(0, " w0"), (1, " w0"), (0, " w1"), (1, " w1")]
    assert [completion.text for completion in completions] == [" w0 w1", " w0 w1"]
    assert [completion.token_ids for completion in completions] == [(0, 1), (0, 1)]
    assert (engine.name, engine.loaded["dtype"]) == ("vllm-mindspore", "bfloat16")
    # What the package prints does not mix with the answers.
    assert "printed by the import of vllm_mindspore" in engine.log.read_text()


def test_settings_of_the_recipe_reach_the_engine(model: Path, nodes: str, tmp_path: Path) -> None:
    settings = find_recipe("deepseek-r1").serving
    with closing(VllmMindSporeEngine(model, settings, nodes)):
        pass
    imported, _, loaded = recorded(tmp_path)
    assert imported[1]["ASCEND_RT_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
    assert loaded[1] == {"model": str(model), "quantization": "golden-stick"} | settings.engine_arguments()
    assert loaded[1]["distributed_executor_backend"] == "ray"


def test_what_is_started_is_what_a_dry_run_shows(model: Path) -> None:
    launch = worker_launch(model, ServingSettings(max_model_len=2048), {"HCCL_BUFFSIZE": "512", "A": "1"})
    assert launch.env == {
        "VLLM_MS_MODEL_BACKEND": "Native",
        "HCCL_OP_EXPANSION_MODE": "AIV",
        "MS_ENABLE_LCCL": "off",
        "MS_ALLOC_CONF": "enable_vmm:true",
    }
    assert launch.argv[-1].endswith("msquant_vllm_mindspore_worker.py")
    assert launch.requests[0]["options"]["max_model_len"] == 2048


def test_seed_goes_along_when_it_matters(model: Path, nodes: str, tmp_path: Path) -> None:
    with closing(VllmMindSporeEngine(model, device_nodes=nodes)) as engine:
        engine.generate(["x"], Sampling(max_tokens=3, temperature=0.7, seed=5, stop=("END",)))
    assert [
        "SamplingParams",
        {"max_tokens": 3, "temperature": 0.7, "top_p": 0.95, "ignore_eos": False, "stop": ["END"], "seed": 5},
    ] in recorded(tmp_path)


def test_floating_point_folder_names_no_quantization(model: Path) -> None:
    (model / "quantization_description.json").unlink()
    assert "quantization" not in worker_launch(model, ServingSettings(), {}).requests[0]["options"]


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_the_dtype_is_the_model_s_own(model: Path, key: str) -> None:
    """The engine's own choice rounds `input_scale` of a float16 folder to bfloat16."""
    config = {"architectures": ["LlamaForCausalLM"], key: "float16"}
    (model / "config.json").write_text(json.dumps(config))
    options = worker_launch(model, ServingSettings(), {}).requests[0]["options"]
    assert options["dtype"] == "float16"
    assert "enforce_eager" not in options
    argv = server_command(model, ServingSettings(), "127.0.0.1", 8000, environment={}).argv
    assert argv[argv.index("--dtype") + 1] == "float16"
    assert "--enforce-eager" not in argv
    # Nothing that the engine would refuse.
    (model / "config.json").write_text(json.dumps({**config, key: "float32"}))
    assert "dtype" not in worker_launch(model, ServingSettings(), {}).requests[0]["options"]


def test_data_parallelism_is_for_the_server(model: Path) -> None:
    with pytest.raises(EngineError, match="prompts are run on one copy") as caught:
        worker_launch(model, find_recipe("deepseek-r1-dp4-tp4-ep4").serving, {})
    assert "--recipe deepseek-r1" in str(caught.value)


def test_failure_inside_vllm(model: Path, nodes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TROUBLE", "load")
    with pytest.raises(EngineError, match="loading the model: ValueError: Invalid quantization") as caught:
        VllmMindSporeEngine(model, device_nodes=nodes)
    assert "long trace" in Path(str(caught.value.where)).read_text()


def test_an_engine_that_dies_while_generating(
    model: Path, nodes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TROUBLE", "generate")
    engine = VllmMindSporeEngine(model, device_nodes=nodes)
    with pytest.raises(EngineError, match="was ended by SIGKILL while generating"):
        engine.generate(["x"], Sampling())


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
