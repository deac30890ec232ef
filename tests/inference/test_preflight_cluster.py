"""What must hold between nodes. The answers of Ray's nodes are those of a real cluster, with NPUs put in."""

import copy
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from msquant.deploy.ascend_checks import Check
from msquant.deploy.preflight_cluster import (
    ask_cluster,
    chip_network_check,
    head_check,
    interface_check,
    ray_checks,
)
from msquant.inference.ascend_host import AscendHost, Npu
from msquant.inference.serving_settings import ServingSettings
from tests.inference.ascend_host import write_hccn_tool, write_tool

TP16 = ServingSettings(
    tensor_parallel_size=16,
    nodes=2,
    launcher="ray",
    head_address="127.0.0.1",
    network_interface="lo",
)
WANTED = {"MS_ENABLE_LCCL": "off", "ASCEND_RT_VISIBLE_DEVICES": "0,1"}
NODE = {
    "address": "192.5.5.5",
    "npus": 8,
    "free_npus": 8,
    "host": "node-a",
    "python": "3.11.7",
    "packages": {"vllm": "0.11.0", "ray": "2.48.0"},
    "variables": {"MS_ENABLE_LCCL": "off"},
    "cann": "8.3.0.1.200",
    "interfaces": ["lo", "eth0"],
    "model": "e77b3b",
}


def cluster(**other: Any) -> dict[str, Any]:
    """Two nodes; the second differs in what is given."""
    return {"nodes": [copy.deepcopy(NODE), copy.deepcopy(NODE) | {"host": "node-b"} | other]}


def problems(answer: dict[str, Any], settings: ServingSettings = TP16) -> dict[str, str]:
    return {
        c.subject: c.detail for c in ray_checks(answer, settings, WANTED) if c.status == "error" and c.remedy
    }


def test_a_whole_cluster() -> None:
    checks = ray_checks(cluster(), TP16, WANTED)
    assert {check.subject: check.status for check in checks} == dict.fromkeys(
        ["Ray", "Python", "CANN", "packages", "model", "variables"], "ok"
    )
    assert checks[0].detail == "2 nodes with 16 NPUs, 16 of them free"


@pytest.mark.parametrize(
    ("other", "subject", "detail"),
    [
        ({"free_npus": 7}, "Ray", "15 of them free; 16 are wanted"),
        ({"host": "node-a"}, "host names", "node-a, node-a are not unique"),
        ({"python": "3.10.2"}, "Python", "3.11.7 on node-a, 3.10.2 on node-b"),
        ({"cann": None}, "CANN", "8.3.0.1.200 on node-a, not installed on node-b"),
        (
            {"packages": {"vllm": None, "ray": "2.48.0"}},
            "vllm",
            "0.11.0 on node-a, not installed on node-b",
        ),
        ({"variables": {}}, "variables", "Ray was started with MS_ENABLE_LCCL=None on node-b"),
        ({"model": None}, "model", "is not on node-b"),
        ({"model": "other"}, "model", "its files are not the same"),
        ({"interfaces": ["eth0"]}, "interface", "lo is not on node-b"),
    ],
)
def test_a_node_that_differs(other: dict[str, Any], subject: str, detail: str) -> None:
    found = problems(cluster(**other))
    assert set(found) == {subject}
    assert detail in found[subject]


def test_a_node_that_has_not_joined() -> None:
    found = problems({"nodes": [NODE]})
    assert "1 nodes with 8 NPUs, 8 of them free; 2 nodes are wanted" in found["Ray"]
    [check] = [c for c in ray_checks({"nodes": [NODE]}, TP16, WANTED) if c.subject == "Ray"]
    assert check.remedy == "on the others: ray start --address=127.0.0.1:6379"


def test_no_cluster_at_all(tmp_path: Path) -> None:
    """Asked for real, of a Python with Ray that runs nowhere, one without Ray and one that is not there."""
    answer = ask_cluster(tmp_path, WANTED, AscendHost(python=sys.executable))
    assert "Could not find any running Ray instance" in answer["error"]
    assert "no cluster" in problems(answer)["Ray"]
    bare = AscendHost(python=str(Path(sys.base_prefix) / "bin/python3"))
    assert "ModuleNotFoundError: No module named 'ray'" in ask_cluster(tmp_path, WANTED, bare)["error"]
    assert "error" in ask_cluster(tmp_path, WANTED, AscendHost(python=str(tmp_path / "none")))
    silent = write_tool(tmp_path / "python", "")
    assert "error" in ask_cluster(tmp_path, WANTED, AscendHost(python=str(silent)))


def interface(settings: ServingSettings, node: int = 0, **environment: str) -> Check:
    return interface_check(settings, node, environment)


def test_the_interface() -> None:
    assert interface(TP16).status == "ok"
    assert "127.0.0.1" in interface(TP16).detail
    gone = interface(TP16.changed({"network_interface": "enp189s0f0"}))
    assert (gone.status, gone.detail) == ("error", "there is no enp189s0f0")
    assert "lo" in str(gone.remedy)
    other = interface(TP16.changed({"head_address": "192.5.5.5"}))
    assert "not 192.5.5.5" in other.detail
    # Another node need not have the head's address.
    assert interface(TP16.changed({"head_address": "192.5.5.5"}), node=1).status == "ok"


def test_interfaces_of_the_environment() -> None:
    names = ("GLOO_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
    unnamed = ServingSettings(data_parallel_size=2, nodes=2, head_address="127.0.0.1")
    assert interface(unnamed).status == "warning"
    assert interface(unnamed, **dict.fromkeys(names, "lo")).status == "ok"
    assert "name different ones" in interface(TP16, TP_SOCKET_IFNAME="eth9").detail


def test_an_interface_that_is_down() -> None:
    down = [name for name, stats in psutil.net_if_stats().items() if not stats.isup and len(name) < 16]
    if not down:
        pytest.skip("every interface of this machine is up")
    check = interface(TP16.changed({"network_interface": down[0], "head_address": None}), node=1)
    assert (check.status, check.remedy) == ("error", f"ip link set {down[0]} up")


def test_the_head_from_another_node() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        settings = TP16.changed({"ray_port": server.getsockname()[1]})
        assert head_check(settings).status == "ok"
    closed = head_check(settings)
    assert (closed.status, "ray start --head" in str(closed.remedy)) == ("error", True)
    unknown = ServingSettings(data_parallel_size=2, nodes=2)
    assert head_check(unknown).status == "error"


@pytest.mark.parametrize(
    ("link", "health", "status"),
    [("UP", "Success", "ok"), ("DOWN", "Success", "error"), ("UP", "Fault", "error")],
)
def test_a_chip_s_network(tmp_path: Path, link: str, health: str, status: str) -> None:
    tool = write_hccn_tool(tmp_path / "hccn_tool", link, health)
    check = chip_network_check(Npu(0, 5, "910B3", "OK", 0, 65536), AscendHost(hccn_tool=str(tool)))
    assert check.status == status
    assert check.status == "ok" or "hccn_tool -i 5" in str(check.remedy)


def test_no_tool_for_the_chips_network(tmp_path: Path) -> None:
    npu = Npu(0, 0, "910B3", "OK", 0, 65536)
    check = chip_network_check(npu, AscendHost(hccn_tool=str(tmp_path / "none")))
    assert (check.status, "is not installed" in check.detail) == ("error", True)


@pytest.mark.slow
def test_a_real_cluster_of_ray(tmp_path: Path) -> None:
    """Two nodes on this machine with eight made-up NPUs each; MSQUANT_RAY is a running cluster's Python.

    Start: `MS_ENABLE_LCCL=off ray start --head --resources='{"NPU": 8}'`; the same with --address.
    """
    python = os.environ.get("MSQUANT_RAY")
    if python is None:
        pytest.skip("MSQUANT_RAY names no Python of a running Ray cluster of two nodes")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    answer = ask_cluster(tmp_path, WANTED, AscendHost(python=python))
    assert [node["npus"] for node in answer["nodes"]] == [8, 8]
    assert answer["nodes"][0].keys() == NODE.keys()
    # Both are this machine, so only their names are wrong.
    assert set(problems(answer)) == {"host names"}
    [check] = [c for c in ray_checks(answer, TP16, {"MS_ENABLE_LCCL": "on"}) if c.subject == "variables"]
    assert "Ray was started with MS_ENABLE_LCCL=off on" in check.detail
