"""What must hold between nodes: the network under them, and their being the same."""

import json
import os
import socket
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from msquant.deploy.ascend_checks import PACKAGES, Check
from msquant.deploy.ray_probe import SECONDS as _PROBE_SECONDS
from msquant.errors import CheckpointError, EngineError
from msquant.inference.ascend_host import AscendHost, Npu, network_state
from msquant.inference.serving_settings import ServingSettings
from msquant.inference.vllm_mindspore import (
    DEVICES_VARIABLE,
    INTERFACE_VARIABLES,
    chosen_devices,
    engine_environment,
)

_PROBE = Path(__file__).with_name("ray_probe.py")
_CONNECT_SECONDS = 3.0


def cluster_checks(
    folder: Path, settings: ServingSettings, node: int, npus: Sequence[Npu], host: AscendHost
) -> list[Check]:
    """Everything that concerns several nodes, seen from one of them.

    Args:
        folder: the model folder.
        settings: how it is to be served.
        node: which of the nodes this machine is.
        npus: those of this machine.
        host: where things are.
    """
    checks = [interface_check(settings, node, host.environment)]
    if node:
        checks.append(head_check(settings))
    with suppress(EngineError):
        used = chosen_devices(settings, host.environment)
        checks += [chip_network_check(npus[i], host) for i in used if i < len(npus)]
    if settings.uses_ray:
        variables: dict[str, str] = {}
        # A folder without config.json, which decides one of them, is an error of its own.
        with suppress(CheckpointError):
            variables = engine_environment(folder, settings, host.environment)
        checks += ray_checks(ask_cluster(folder, variables, host), settings, variables)
    else:
        detail = "not compared with those of the other nodes: nothing connects them before the start"
        remedy = "run the same check on each; versions and the model's folder must be the same"
        checks.append(Check("cluster", "nodes", "note", detail, remedy))
    return checks


def interface_check(settings: ServingSettings, node: int, environment: Mapping[str, str]) -> Check:
    """Whether the interface that the nodes shall use is here, is up and, on the head, has its address."""
    import psutil

    names = {environment.get(name, settings.network_interface) for name in INTERFACE_VARIABLES}
    here = psutil.net_if_addrs()
    if names == {None}:
        detail = f"none is named for {settings.nodes} nodes; each library would choose its own"
        remedy = f"give serving.network_interface, one of {', '.join(sorted(here))}"
        return Check("network", "interface", "error" if settings.uses_ray else "warning", detail, remedy)
    if len(names) > 1:
        detail = f"{', '.join(INTERFACE_VARIABLES)} name different ones"
        return Check("network", "interface", "error", detail, "set all of them to the same")
    name = str(names.pop())
    if name not in here:
        remedy = f"give serving.network_interface, one of {', '.join(sorted(here))}"
        return Check("network", "interface", "error", f"there is no {name}", remedy)
    addresses = [entry.address for entry in here[name] if entry.family in (socket.AF_INET, socket.AF_INET6)]
    if not psutil.net_if_stats()[name].isup:
        return Check("network", "interface", "error", f"{name} is down", f"ip link set {name} up")
    if node == 0 and settings.head_address and _ip(settings.head_address) not in addresses:
        detail = f"{name} has {', '.join(addresses) or 'no address'}, not {settings.head_address}"
        remedy = "give the head's address on this interface as serving.head_address"
        return Check("network", "interface", "error", detail, remedy)
    return Check("network", "interface", "ok", f"{name} has {', '.join(addresses)}")


def head_check(settings: ServingSettings) -> Check:
    """Whether the head can be reached from this node; its server is started first."""
    port = settings.ray_port if settings.uses_ray else settings.data_parallel_rpc_port
    head = settings.head_address
    if head is None:
        remedy = "give its IP address as serving.head_address"
        return Check("network", "head", "error", "its address is not known", remedy)
    try:
        with socket.create_connection((head, port), _CONNECT_SECONDS):
            return Check("network", "head", "ok", f"{head}:{port} answers")
    except OSError as error:
        detail = f"{head}:{port} does not answer: {error.strerror or error}"
        if settings.uses_ray:
            remedy = f"start Ray on the head first (ray start --head --port={port}), and open its firewall"
            return Check("network", "head", "error", detail, remedy)
        remedy = "it answers once the head's server runs; if it does already, open its firewall"
        return Check("network", "head", "note", detail, remedy)


def chip_network_check(npu: Npu, host: AscendHost) -> Check:
    """Whether a chip's own network port is linked and reaches its peer."""
    subject = f"NPU {npu.index}"
    try:
        state = network_state(npu.physical, host.hccn_tool)
    except EngineError as error:
        return Check("network", subject, "error", f"{error.where} {error.what}", error.remedy)
    link, health = state.get("link status", "unknown"), state.get("net health status", "unknown")
    detail = f"link {link}, health {health}"
    if link.upper() == "UP" and health.lower() == "success":
        return Check("network", subject, "ok", detail)
    remedy = f"check cable, switch and addresses: hccn_tool -i {npu.physical} -ip -g; cat /etc/hccn.conf"
    return Check("network", subject, "error", detail, remedy)


def ask_cluster(folder: Path, variables: Iterable[str], host: AscendHost) -> dict[str, Any]:
    """What every node of the running Ray cluster has, as `ray_probe.py` answers it, or `error`."""
    request = {
        "address": "auto",
        "folder": str(folder.resolve()),
        "packages": [*PACKAGES],
        "variables": [*variables],
    }
    try:
        done = subprocess.run(
            [host.python, str(_PROBE), json.dumps(request)],
            env={**os.environ, **host.environment},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=2 * _PROBE_SECONDS,
        )
        return dict(json.loads(done.stdout))
    except subprocess.TimeoutExpired:
        return {"error": f"no answer in {2 * _PROBE_SECONDS:.0f} s"}
    except (OSError, ValueError) as error:
        return {"error": f"{error}"}


def ray_checks(
    answer: Mapping[str, Any], settings: ServingSettings, variables: Mapping[str, str]
) -> list[Check]:
    """Whether the cluster is whole: nodes, NPUs, names, and the same versions and model everywhere.

    Args:
        answer: of `ask_cluster`.
        settings: how many nodes and NPUs there must be.
        variables: that Ray must have been started with.
    """
    if "error" in answer:
        remedy = "start it with the commands of: msquant serve --dry-run"
        return [Check("cluster", "Ray", "error", f"no cluster: {answer['error']}", remedy)]
    nodes = answer["nodes"]
    npus = sum(node["npus"] for node in nodes)
    detail = f"{len(nodes)} nodes with {npus} NPUs, {sum(node['free_npus'] for node in nodes)} of them free"
    checks = [Check("cluster", "Ray", "ok", detail)]
    if len(nodes) < settings.nodes:
        remedy = f"on the others: ray start --address={settings.head_address}:{settings.ray_port}"
        checks = [Check("cluster", "Ray", "error", f"{detail}; {settings.nodes} nodes are wanted", remedy)]
    elif sum(node["free_npus"] for node in nodes) < settings.world_size:
        remedy = "see: ray status; end what uses them, or set ASCEND_RT_VISIBLE_DEVICES before ray start"
        checks = [Check("cluster", "Ray", "error", f"{detail}; {settings.world_size} are wanted", remedy)]
    names = [node["host"] for node in nodes]
    if len(set(names)) < len(names):
        remedy = "give each its own: hostname NAME; then restart Ray"
        checks.append(Check("cluster", "host names", "error", f"{', '.join(names)} are not unique", remedy))
    checks += [_same(nodes, "Python", "python"), _same(nodes, "CANN", "cann"), *_same_packages(nodes)]
    checks += [_same_model(nodes), _variables(nodes, variables)]
    if settings.network_interface is not None:
        without = [node["host"] for node in nodes if settings.network_interface not in node["interfaces"]]
        if without:
            detail = f"{settings.network_interface} is not on {', '.join(without)}"
            remedy = "set the three *_SOCKET_IFNAME variables there before ray start"
            checks.append(Check("cluster", "interface", "error", detail, remedy))
    return checks


def _same(nodes: Sequence[Mapping[str, Any]], subject: str, key: str) -> Check:
    values = {node["host"]: node[key] for node in nodes}
    if len(set(values.values())) == 1:
        return Check("cluster", subject, "ok", f"{next(iter(values.values()))} on every node")
    return Check("cluster", subject, "error", _differing(values), "make the nodes the same, then restart Ray")


def _same_packages(nodes: Sequence[Mapping[str, Any]]) -> list[Check]:
    checks = []
    for name in nodes[0]["packages"] if nodes else ():
        values = {node["host"]: node["packages"][name] for node in nodes}
        if len(set(values.values())) > 1:
            remedy = "install the same on every node, then restart Ray"
            checks.append(Check("cluster", name, "error", _differing(values), remedy))
    return checks or [Check("cluster", "packages", "ok", "the same on every node")]


def _same_model(nodes: Sequence[Mapping[str, Any]]) -> Check:
    without = [node["host"] for node in nodes if node["model"] is None]
    remedy = "copy the folder to every node, under the same path"
    if without:
        return Check("cluster", "model", "error", f"is not on {', '.join(without)}", remedy)
    if len({node["model"] for node in nodes}) > 1:
        return Check("cluster", "model", "error", "its files are not the same on every node", remedy)
    return Check("cluster", "model", "ok", "the same files on every node")


def _variables(nodes: Sequence[Mapping[str, Any]], wanted: Mapping[str, str]) -> Check:
    """Ray's processes have what was set when it was started; later changes do not reach them."""
    # Ray chooses the NPUs of each of its processes itself.
    wrong = [
        f"{name}={node['variables'].get(name)} on {node['host']}"
        for node in nodes
        for name, value in wanted.items()
        if name != DEVICES_VARIABLE and node["variables"].get(name) != value
    ]
    if wrong:
        remedy = "on every node: ray stop; then the lines of: msquant serve --dry-run"
        return Check("cluster", "variables", "error", f"Ray was started with {', '.join(wrong)}", remedy)
    return Check("cluster", "variables", "ok", "Ray was started with the recipe's on every node")


def _differing(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{value or 'not installed'} on {host}" for host, value in values.items())


def _ip(address: str) -> str:
    try:
        return socket.gethostbyname(address)
    except OSError:
        return address
