"""The commands of vLLM-MindSpore's guides, word for word, and the folder's own part in them.

The guides' `--trust-remote-code` is left out: no code of a model folder is run. Their `--addition-config`
is written out as `--additional-config`, and `--quantization`, which 0.5.1 does not find out by itself, is
put in. So is `--served-model-name`.
"""

import json
import shlex
import sys
from pathlib import Path

import pytest

from msquant.deploy.vllm_mindspore_server import cluster_commands, program, server_command
from msquant.errors import CheckpointError, EngineError
from msquant.inference.serving_settings import ServingSettings
from msquant.inference.vllm_mindspore import worker_launch
from msquant.recipe.recipe import find_recipe

GUIDE_VARIABLES = {
    "MS_ENABLE_LCCL": "off",
    "HCCL_OP_EXPANSION_MODE": "AIV",
    "MS_ALLOC_CONF": "enable_vmm:true",
    "ASCEND_RT_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
    "VLLM_MS_MODEL_BACKEND": "MindFormers",
}
RAY_VARIABLES = {
    "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python",
    "GLOO_SOCKET_IFNAME": "enp189s0f0",
    "HCCL_SOCKET_IFNAME": "enp189s0f0",
    "TP_SOCKET_IFNAME": "enp189s0f0",
}
SIZES = (
    "--max-num-seqs 256 --max-model-len 32768 --max-num-batched-tokens 4096 --block-size 128 "
    "--gpu-memory-utilization 0.9"
)
SITE = {"head_address": "192.10.10.10", "network_interface": "enp189s0f0"}


@pytest.fixture
def r1(tmp_path: Path) -> Path:
    """A folder that looks like DeepSeek-R1's; no weights are read to make a command."""
    folder = tmp_path / "DeepSeek R1"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["DeepseekV3ForCausalLM"]}))
    (folder / "quantization_description.json").write_text("{}")
    return folder


def words(command: str, folder: Path) -> tuple[str, ...]:
    named = ("--served-model-name", folder.name)
    words = [{"MODEL": (str(folder),), "NAMED": named}.get(word, (word,)) for word in shlex.split(command)]
    return tuple(part for parts in words for part in parts)


def test_tp16_over_two_nodes_with_ray(r1: Path) -> None:
    settings = find_recipe("deepseek-r1").serving.changed(SITE)
    head, worker, status, serve = cluster_commands(r1, settings, "0.0.0.0", 8000, environment={})
    assert head.argv == ("ray", "start", "--head", "--port=6379")
    assert worker.argv == ("ray", "start", "--address=192.10.10.10:6379")
    assert status.argv == ("ray", "status")
    assert serve.argv == words(
        "vllm-mindspore serve MODEL NAMED --host 0.0.0.0 --port 8000 --quantization golden-stick "
        f"{SIZES} --tensor-parallel-size 16 --distributed-executor-backend ray",
        r1,
    )
    # Set before the cluster is started, on both nodes, and for the server.
    assert head.env == worker.env == serve.env == GUIDE_VARIABLES | RAY_VARIABLES
    assert [launch.place for launch in (head, worker, status, serve)] == [
        "node 0, the head",
        "node 1",
        "node 0, the head",
        "node 0, the head",
    ]


def test_dp4_tp4_ep4_over_two_nodes(r1: Path) -> None:
    settings = find_recipe("deepseek-r1-dp4-tp4-ep4").serving.changed(SITE)
    head, worker = cluster_commands(r1, settings, "0.0.0.0", 8000, environment={})
    parallel = (
        "--tensor-parallel-size 4 --enable-expert-parallel --additional-config '{\"expert_parallel\": 4}' "
        "--data-parallel-size 4 --data-parallel-size-local 2 --data-parallel-start-rank {rank} "
        "--data-parallel-address 192.10.10.10 --data-parallel-rpc-port 12370"
    )
    assert head.argv == words(
        "vllm-mindspore serve MODEL NAMED --host 0.0.0.0 --port 8000 --quantization golden-stick "
        f"{SIZES} {parallel.replace('{rank}', '0')}",
        r1,
    )
    assert worker.argv == words(
        f"vllm-mindspore serve MODEL NAMED --headless --quantization golden-stick {SIZES} "
        f"{parallel.replace('{rank}', '2')}",
        r1,
    )
    interfaces = {name: value for name, value in RAY_VARIABLES.items() if name.endswith("IFNAME")}
    assert head.env == worker.env == GUIDE_VARIABLES | interfaces
    assert server_command(r1, settings, "0.0.0.0", 8000, node=1, environment={}) == worker


def test_dp4_tp4_ep4_with_ray_runs_one_server(r1: Path) -> None:
    settings = find_recipe("deepseek-r1-dp4-tp4-ep4").serving.changed(SITE | {"launcher": "ray"})
    *starts, serve = cluster_commands(r1, settings, "0.0.0.0", 8000, environment={})
    assert [launch.argv[0] for launch in starts] == ["ray", "ray", "ray"]
    assert shlex.join(serve.argv).endswith(
        "--data-parallel-size 4 --data-parallel-size-local 2 --data-parallel-backend ray"
    )
    with pytest.raises(EngineError, match="node 1 runs no server") as caught:
        server_command(r1, settings, "0.0.0.0", 8000, node=1, environment={})
    assert "ray start --address=192.10.10.10:6379" in str(caught.value)


def test_one_npu_needs_little(r1: Path) -> None:
    (r1 / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
    (r1 / "quantization_description.json").unlink()
    [launch] = cluster_commands(r1, ServingSettings(), "127.0.0.1", 8001, environment={})
    assert launch.argv == words(
        "vllm-mindspore serve MODEL NAMED --host 127.0.0.1 --port 8001 --block-size 128 "
        "--gpu-memory-utilization 0.9",
        r1,
    )
    assert (launch.env["VLLM_MS_MODEL_BACKEND"], launch.place) == ("Native", "")
    assert "ASCEND_RT_VISIBLE_DEVICES" not in launch.env


def test_data_parallel_on_one_node(r1: Path) -> None:
    settings = ServingSettings(data_parallel_size=2, tensor_parallel_size=2)
    [launch] = cluster_commands(r1, settings, "127.0.0.1", 8000, environment={})
    assert shlex.join(launch.argv).endswith("--tensor-parallel-size 2 --data-parallel-size 2")
    assert launch.env["ASCEND_RT_VISIBLE_DEVICES"] == "0,1,2,3"


def test_variables_that_are_set_win_and_reach_every_node(r1: Path) -> None:
    settings = find_recipe("deepseek-r1").serving.changed({"head_address": "192.10.10.10"})
    inherited = {"HCCL_SOCKET_IFNAME": "eth7", "MS_ALLOC_CONF": "enable_vmm:false", "HOME": "/root"}
    commands = cluster_commands(r1, settings, "0.0.0.0", 8000, environment=inherited)
    for launch in (commands[0], commands[1], commands[3]):
        assert launch.env["HCCL_SOCKET_IFNAME"] == "eth7"
        assert launch.env["MS_ALLOC_CONF"] == "enable_vmm:false"
        assert not {"HOME", "GLOO_SOCKET_IFNAME"} & set(launch.env)


@pytest.mark.parametrize("name", ["deepseek-r1", "deepseek-r1-dp4-tp4-ep4"])
def test_the_head_s_address_is_needed(r1: Path, name: str) -> None:
    settings = find_recipe(name).serving
    with pytest.raises(EngineError, match="needs the address of the first") as caught:
        cluster_commands(r1, settings, "0.0.0.0", 8000, environment={})
    assert "--head-address" in str(caught.value)


@pytest.mark.parametrize("node", [-1, 2])
def test_a_node_that_is_not_there(r1: Path, node: int) -> None:
    settings = find_recipe("deepseek-r1-dp4-tp4-ep4").serving.changed(SITE)
    with pytest.raises(EngineError, match=f"there is no node {node}") as caught:
        server_command(r1, settings, "0.0.0.0", 8000, node=node, environment={})
    assert "from 0, the head, to 1" in str(caught.value)


def test_bad_folders(r1: Path) -> None:
    (r1 / "quant_model_description.json").write_text("{}")
    with pytest.raises(EngineError, match="holds both"):
        server_command(r1, ServingSettings(), "127.0.0.1", 8000, environment={})
    (r1 / "quant_model_description.json").unlink()
    (r1 / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        server_command(r1, ServingSettings(), "127.0.0.1", 8000, environment={})


@pytest.mark.parametrize(
    ("method", "command"), [("compressed-tensors", "msquant export"), ("fp8", "msquant quantize")]
)
def test_a_folder_of_another_engine(r1: Path, method: str, command: str) -> None:
    (r1 / "quantization_description.json").unlink()
    (r1 / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    for start in (
        lambda: server_command(r1, ServingSettings(), "127.0.0.1", 8000, environment={}),
        lambda: worker_launch(r1, ServingSettings(), {}),
    ):
        with pytest.raises(EngineError, match=f"is in the format {method}") as caught:
            start()
        assert command in str(caught.value)


def test_program_beside_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that is not activated is not in PATH, and the shell would not find its scripts."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert program() == "vllm-mindspore"
    script = tmp_path / "vllm-mindspore"
    script.touch(mode=0o755)
    assert program() == str(script)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert program() == "vllm-mindspore"
