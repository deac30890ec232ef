"""The checks before serving, each on a machine that has, or lacks, what it looks for.

The NPUs, their tools and CANN are stand-ins: see ascend_host.py beside this. Folders, ports, variables and
interfaces are real.
"""

import os
import socket
from pathlib import Path

import pytest

from msquant.deploy.ascend_checks import Check
from msquant.deploy.preflight import (
    device_checks,
    environment_checks,
    model_check,
    port_check,
    preflight,
    require_ready,
    shared_memory_check,
)
from msquant.errors import EngineError
from msquant.inference.ascend_host import AscendHost, parse_npu_smi
from msquant.inference.serving_settings import ServingSettings
from tests.fixtures.tiny_model import write_tiny_llama
from tests.inference.ascend_host import a2_table, write_ascend, write_hccn_tool, write_nodes, write_tool

GIGABYTE = 10**9


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("preflight") / "model")


def host(tmp_path: Path, table: str | None = None, **environment: str) -> AscendHost:
    """A healthy node of two NPUs, but for what the arguments change."""
    return AscendHost(
        {"ASCEND_OPP_PATH": "/opp"} | environment,
        write_ascend(tmp_path / "Ascend"),
        write_nodes(tmp_path / "dev", 2),
        str(write_tool(tmp_path / "npu-smi", table or a2_table(2))),
        str(write_hccn_tool(tmp_path / "hccn_tool")),
    )


def by_subject(checks: list[Check], section: str) -> dict[str, Check]:
    return {check.subject: check for check in checks if check.section == section}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_one_healthy_node(model: Path, tmp_path: Path) -> None:
    settings = ServingSettings(tensor_parallel_size=2)
    checks = preflight(model, settings, port=free_port(), host=host(tmp_path))
    # This machine has no vLLM-MindSpore, which the packages' checks say; all else is as it should be.
    rest = [check for check in checks if check.section != "ascend" and check.subject != "shared memory"]
    assert [(check.section, check.status) for check in rest] == [
        ("model", "ok"),
        ("environment", "ok"),
        ("devices", "ok"),
        ("devices", "ok"),
        ("ports", "ok"),
    ]
    assert by_subject(checks, "ascend")["vllm-mindspore"].status == "error"
    with pytest.raises(EngineError, match="vllm-mindspore: is not installed") as caught:
        require_ready(checks)
    assert caught.value.remedy
    assert any("vllm: is not installed" in note for note in caught.value.__notes__)
    require_ready(rest)


def test_a_folder_that_is_not_whole(model: Path, tmp_path: Path) -> None:
    check, weights = model_check(model)
    assert (check.status, weights > 0) == ("ok", True)
    missing, weights = model_check(tmp_path / "none")
    assert (missing.status, missing.detail, weights) == ("error", "there is no such folder", 0)
    assert missing.remedy


def test_npus_that_are_not_there(model: Path, tmp_path: Path) -> None:
    npus = parse_npu_smi(a2_table(2))
    checks = device_checks(ServingSettings(tensor_parallel_size=4), npus, 0, {})
    assert [check.status for check in checks] == ["error"]
    assert "2, 3 of 4 wanted are not among the 2 here" in checks[0].detail
    assert device_checks(ServingSettings(devices=(1,)), npus, 0, {})[0].status == "ok"


def test_the_choice_of_the_environment_wins() -> None:
    npus, settings = parse_npu_smi(a2_table(8)), ServingSettings(tensor_parallel_size=2)
    variable = "ASCEND_RT_VISIBLE_DEVICES"
    assert device_checks(settings, npus, 0, {variable: "6,7"})[0].status == "ok"
    for value, complaint in (("6,9", "9 of 2 wanted"), ("6", "1 are visible"), ("all", "no list of numbers")):
        [check] = device_checks(settings, npus, 0, {variable: value})
        assert (check.status, complaint in check.detail) == ("error", True)


def test_npus_that_are_in_use() -> None:
    npus = parse_npu_smi(a2_table(2, used_mb=40000))
    found = by_subject(device_checks(ServingSettings(tensor_parallel_size=2), npus, 0, {}), "devices")
    assert found["NPU 1"].status == "error"
    assert "25536 of 65536 MB are free, 90% are wanted" in found["NPU 1"].detail
    settings = ServingSettings(tensor_parallel_size=2, gpu_memory_utilization=0.3)
    assert "NPU 1" not in by_subject(device_checks(settings, npus, 0, {}), "devices")


def test_a_model_that_does_not_fit() -> None:
    npus = parse_npu_smi(a2_table(8))
    one, two = (
        ServingSettings(tensor_parallel_size=8),
        ServingSettings(tensor_parallel_size=16, nodes=2, launcher="ray"),
    )
    weights = 688 * GIGABYTE
    assert by_subject(device_checks(one, npus, weights, {}), "devices")["memory"].status == "error"
    fits = by_subject(device_checks(two, npus, weights, {}), "devices")["memory"]
    assert (fits.status, fits.detail) == ("ok", "688.0 GB of weights for 989.6 GB on 16 NPUs")


def test_variables_that_stand_against_the_recipe(model: Path) -> None:
    environment = {
        "MINDFORMERS_MODEL_CONFIG": "/old.yaml",
        "vLLM_MODEL_BACKEND": "MindFormers",
        "HCCL_OP_EXPANSION_MODE": "HOST",
        "MS_ALLOC_CONF": "enable_vmm:true",
    }
    found = by_subject(environment_checks(model, ServingSettings(), environment), "environment")
    assert {name: check.status for name, check in found.items()} == {
        "MINDFORMERS_MODEL_CONFIG": "error",
        "vLLM_MODEL_BACKEND": "warning",
        "HCCL_OP_EXPANSION_MODE": "note",
    }
    assert all(check.remedy and check.remedy.startswith("unset ") for check in found.values())


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check = port_check("server", "127.0.0.1", port, "--port")
    assert check.status == "error"
    assert "--port" in str(check.remedy)
    assert port_check("server", "127.0.0.1", port, "--port").status == "ok"
    assert port_check("server", "192.0.2.77", port, "--port").status == "error"


def test_shared_memory(tmp_path: Path) -> None:
    [check] = shared_memory_check(tmp_path)
    assert check.status == ("ok" if os.statvfs(tmp_path).f_blocks * 512 > 64 * 1024**2 else "warning")
    assert shared_memory_check(tmp_path / "none") == []


def test_hybrid_parallel_over_two_nodes(model: Path, tmp_path: Path) -> None:
    """On the head: the interface with its address, the chips' network, two ports; no comparison of nodes."""
    settings = ServingSettings(
        data_parallel_size=4,
        nodes=2,
        head_address="127.0.0.1",
        network_interface="lo",
        data_parallel_rpc_port=free_port(),
    )
    checks = preflight(model, settings, port=free_port(), host=host(tmp_path))
    assert {
        (c.section, c.subject): c.status for c in checks if c.section in ("network", "ports", "cluster")
    } == {
        ("ports", "server"): "ok",
        ("ports", "data parallelism"): "ok",
        ("network", "interface"): "ok",
        ("network", "NPU 0"): "ok",
        ("network", "NPU 1"): "ok",
        ("cluster", "nodes"): "note",
    }


def test_the_other_node_looks_for_the_head_not_for_ports(model: Path, tmp_path: Path) -> None:
    settings = ServingSettings(
        data_parallel_size=4,
        nodes=2,
        head_address="127.0.0.1",
        network_interface="lo",
        data_parallel_rpc_port=free_port(),
    )
    checks = preflight(model, settings, node=1, host=host(tmp_path))
    assert by_subject(checks, "ports") == {}
    # The head's server is not up yet, and may not be.
    assert by_subject(checks, "network")["head"].status == "note"
