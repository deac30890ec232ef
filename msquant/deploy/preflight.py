"""What vLLM-MindSpore's guides tell people to check by hand before they serve, checked on this node."""

import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.deploy.ascend_checks import Check, cann_check, driver_check, failed, npu_checks, package_checks
from msquant.deploy.preflight_cluster import cluster_checks
from msquant.errors import CheckpointError, EngineError
from msquant.inference.ascend_host import AscendHost, Npu, driver_version, installed_npus
from msquant.inference.serving_settings import ServingSettings
from msquant.inference.vllm_mindspore import (
    DEVICES_VARIABLE,
    OLD_BACKEND_VARIABLE,
    chosen_devices,
    engine_environment,
)

_REFUSED_VARIABLE = "MINDFORMERS_MODEL_CONFIG"
_MEGABYTE = 1024**2
_DOCKER_SHARED_MEMORY = 64 * _MEGABYTE
_SHARED_MEMORY = Path("/dev/shm")


def preflight(
    folder: Path,
    settings: ServingSettings,
    *,
    node: int = 0,
    address: str = "127.0.0.1",
    port: int = 8000,
    host: AscendHost | None = None,
) -> list[Check]:
    """Check that this machine can serve a folder, as one of the settings' nodes.

    Args:
        folder: the model folder, the same path on every node.
        settings: how it is to be served.
        node: which of the nodes this machine is.
        address: that the server will listen on.
        port: likewise.
        host: where things are; their usual places by default.
    """
    host = host or AscendHost()
    needed = frozenset({"ray"} if settings.uses_ray else ())
    npus = _npus(host)
    model, weights = model_check(folder)
    checks = [model, driver_check(driver_version(host.ascend)), *npu_checks(host), cann_check(host)]
    checks += package_checks(needed)
    if model.status == "ok":
        checks += environment_checks(folder, settings, host.environment)
    if npus:
        checks += device_checks(settings, npus, weights, host.environment)
    if settings.world_size > 1:
        checks += shared_memory_check()
    if node == 0:
        checks.append(port_check("server", address, port, "--port"))
        if settings.nodes > 1 and settings.data_parallel_size > 1 and not settings.uses_ray:
            rpc = settings.data_parallel_rpc_port
            checks.append(port_check("data parallelism", "", rpc, "serving.data_parallel_rpc_port"))
    if settings.nodes > 1:
        checks += cluster_checks(folder, settings, node, npus, host)
    return checks


def require_ready(checks: Sequence[Check]) -> None:
    """Refuse to start where a check has failed.

    Raises:
        EngineError: names the first, with its remedy; the others are its notes.
    """
    errors = failed(checks)
    if not errors:
        return
    first, *others = errors
    error = EngineError(f"{first.subject}: {first.detail}", where=first.section, remedy=first.remedy)
    for check in others:
        error.add_note(f"{check.section}: {check.subject}: {check.detail}; {check.remedy}")
    raise error


def model_check(folder: Path) -> tuple[Check, int]:
    """Whether the folder is whole, by its files' headers; and how many bytes its tensors have."""
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError as error:
        remedy = error.remedy or "copy the whole folder to this node, under the same path"
        return Check("model", str(folder), "error", str(error.what), remedy), 0
    weights = sum(checkpoint.nbytes(name) for name in checkpoint.names())
    detail = f"{len(checkpoint.shards)} files with {weights / 10**9:.1f} GB of weights"
    return Check("model", str(folder), "ok", detail), weights


def environment_checks(
    folder: Path, settings: ServingSettings, environment: Mapping[str, str]
) -> list[Check]:
    """Variables that 0.5.1 refuses, or that take the place of what the recipe says."""
    checks = []
    if environment.get(_REFUSED_VARIABLE):
        detail = "is set; vLLM-MindSpore 0.5.1 refuses it, though older guides ask for it"
        checks.append(
            Check(
                "environment", "MINDFORMERS_MODEL_CONFIG", "error", detail, "unset MINDFORMERS_MODEL_CONFIG"
            )
        )
    if OLD_BACKEND_VARIABLE in environment:
        remedy = f"unset {OLD_BACKEND_VARIABLE}: msquant sets VLLM_MS_MODEL_BACKEND by the architecture"
        checks.append(Check("environment", OLD_BACKEND_VARIABLE, "warning", "is the old name", remedy))
    for name, value in engine_environment(folder, settings, {}).items():
        found = environment.get(name)
        if found is not None and found != value:
            detail = f"is {found!r}, which wins over the recipe's {value!r}"
            checks.append(Check("environment", name, "note", detail, f"unset {name} for the recipe's"))
    return checks or [Check("environment", "variables", "ok", "none stands against the recipe")]


def device_checks(
    settings: ServingSettings, npus: Sequence[Npu], weights: int, environment: Mapping[str, str]
) -> list[Check]:
    """Whether the chosen NPUs are here and free, and the weights fit.

    Args:
        settings: which NPUs, and which part of their memory.
        npus: those of this machine.
        weights: bytes of all tensors.
        environment: of the engine; its choice of NPUs wins.
    """
    try:
        wanted = chosen_devices(settings, environment)
    except EngineError as error:
        return [Check("devices", str(error.where), "error", error.what, error.remedy)]
    if len(wanted) < settings.npus_per_node:
        detail = f"{len(wanted)} are visible to the engine, {settings.npus_per_node} are needed on each node"
        return [Check("devices", DEVICES_VARIABLE, "error", detail, f"name more in {DEVICES_VARIABLE}")]
    missing = [str(index) for index in wanted if index >= len(npus)]
    if missing:
        detail = f"{', '.join(missing)} of {len(wanted)} wanted are not among the {len(npus)} here"
        remedy = "use more nodes, or lower serving.tensor_parallel_size or data_parallel_size"
        return [Check("devices", "number", "error", detail, remedy)]
    checks = [Check("devices", "number", "ok", f"{len(wanted)} of {len(npus)} here")]
    part = settings.gpu_memory_utilization
    chosen = [npus[index] for index in wanted]
    for npu in chosen:
        free = npu.total_mb - npu.used_mb
        if free < part * npu.total_mb:
            detail = f"{free} of {npu.total_mb} MB are free, {part:.0%} are wanted"
            remedy = "end what uses it (npu-smi info lists it), or lower serving.gpu_memory_utilization"
            checks.append(Check("devices", f"NPU {npu.index}", "error", detail, remedy))
    room = int(part * sum(npu.total_mb for npu in chosen)) * _MEGABYTE * settings.nodes
    detail = f"{weights / 10**9:.1f} GB of weights for {room / 10**9:.1f} GB on {settings.world_size} NPUs"
    if weights >= room:
        remedy = "use more NPUs: raise serving.tensor_parallel_size and serving.nodes"
        checks.append(Check("devices", "memory", "error", detail, remedy))
    else:
        checks.append(Check("devices", "memory", "ok", detail))
    return checks


def shared_memory_check(folder: Path = _SHARED_MEMORY) -> list[Check]:
    """Whether /dev/shm, which the engine's processes talk through, is more than Docker gives by default."""
    try:
        stat = os.statvfs(folder)
    except OSError:
        return []
    size = stat.f_frsize * stat.f_blocks
    detail = f"{size / 10**9:.1f} GB in {folder}"
    if size <= _DOCKER_SHARED_MEMORY:
        remedy = "start the container with --shm-size=250g, as the guide does"
        return [Check("machine", "shared memory", "warning", detail, remedy)]
    return [Check("machine", "shared memory", "ok", detail)]


def port_check(subject: str, address: str, port: int, option: str) -> Check:
    """Whether a port can be listened on.

    Args:
        subject: what wants it.
        address: the interface's address; empty for all.
        port: its number.
        option: where another one can be chosen.
    """
    try:
        with socket.create_server((address, port)):
            pass
    except OSError as error:
        detail = f"{address or '*'}:{port} cannot be used: {error.strerror or error}"
        return Check("ports", subject, "error", detail, f"choose another with {option}, or end who has it")
    return Check("ports", subject, "ok", f"{address or '*'}:{port} is free")


def _npus(host: AscendHost) -> list[Npu]:
    try:
        return installed_npus(host.npu_smi)
    except EngineError:
        return []
