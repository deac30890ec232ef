"""The commands that serve a folder with vLLM-MindSpore, on one node or several, as its guides have them.

Guides: "Parallel Inference (DeepSeek R1)" (TP16 with Ray; DP4 TP4 EP4) and "Parallel Inference Methods", at
https://www.mindspore.cn/vllm_mindspore/docs/en/master/index.html
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msquant.errors import EngineError
from msquant.inference.launch import Launch
from msquant.inference.serving_settings import ServingSettings
from msquant.inference.vllm_mindspore import (
    engine_environment,
    model_dtype,
    quantization_method,
    require_servable,
)

PROGRAM = "vllm-mindspore"


def server_command(
    folder: Path,
    settings: ServingSettings,
    host: str,
    port: int,
    *,
    node: int = 0,
    environment: Mapping[str, str] | None = None,
) -> Launch:
    """What serves a folder on one node, once its Ray cluster is up where it needs one.

    Args:
        folder: the model folder, the same path on every node.
        settings: the recipe's section.
        host: address that the server listens on.
        port: its port.
        node: which of the nodes; only with `launcher: mp` do others than the first run a command.
        environment: what the process inherits, this process's own by default; variables that it sets win.

    Raises:
        EngineError: the node is none of the settings', has nothing to run, or the first node's address is
            missing; the folder is of another engine's format, or holds two descriptions.
        CheckpointError: `config.json` is missing or damaged.
    """
    _check_node(settings, node)
    if node and settings.uses_ray:
        raise EngineError(
            f"node {node} runs no server: Ray starts its processes",
            where="--node",
            remedy=f"run there: {_ray_start(settings, node).shell()}",
        )
    require_servable(folder)
    # Clients call the model by its folder's name, not by a path of this machine.
    argv = [program(), "serve", str(folder), "--served-model-name", folder.resolve().name]
    if node:
        argv.append("--headless")
    else:
        argv += ["--host", host, "--port", str(port)]
    arguments: dict[str, Any] = {}
    if (quantization := quantization_method(folder)) is not None:
        arguments["quantization"] = quantization
    # No --enforce-eager, ever: static layers would be quantized with another reciprocal than was calibrated.
    arguments |= model_dtype(folder) | settings.engine_arguments() | _data_parallel(settings, node)
    env = engine_environment(folder, settings, os.environ if environment is None else environment)
    return Launch((*argv, *_options(arguments)), env, _place(settings, node))


def cluster_commands(
    folder: Path,
    settings: ServingSettings,
    host: str,
    port: int,
    *,
    environment: Mapping[str, str] | None = None,
) -> list[Launch]:
    """Every command that serving takes, in order, each with the node it is for. Raises as `server_command`.

    The variables must be set before Ray is started, or its processes do not see them.
    """
    if not settings.uses_ray or settings.nodes == 1:
        return [
            server_command(folder, settings, host, port, node=node, environment=environment)
            for node in range(settings.nodes)
        ]
    serve = server_command(folder, settings, host, port, environment=environment)
    starts = [_ray_start(settings, node, serve.env) for node in range(settings.nodes)]
    return [*starts, Launch(("ray", "status"), place=_place(settings, 0)), serve]


def program() -> str:
    """The engine's console script: its name where the shell finds it, else beside this Python."""
    beside = Path(sys.executable).parent / PROGRAM
    return PROGRAM if shutil.which(PROGRAM) or not beside.is_file() else str(beside)


def _ray_start(settings: ServingSettings, node: int, env: Mapping[str, str] | None = None) -> Launch:
    port = settings.ray_port
    role = [f"--address={_head(settings)}:{port}"] if node else ["--head", f"--port={port}"]
    return Launch(("ray", "start", *role), env or {}, _place(settings, node))


def _data_parallel(settings: ServingSettings, node: int) -> dict[str, Any]:
    if settings.data_parallel_size == 1:
        return {}
    local = settings.data_parallel_size // settings.nodes
    arguments: dict[str, Any] = {"data_parallel_size": settings.data_parallel_size}
    if settings.nodes > 1:
        arguments["data_parallel_size_local"] = local
    if settings.uses_ray:
        return arguments | {"data_parallel_backend": "ray"}
    if settings.nodes == 1:
        return arguments
    return arguments | {
        "data_parallel_start_rank": node * local,
        "data_parallel_address": _head(settings),
        "data_parallel_rpc_port": settings.data_parallel_rpc_port,
    }


def _options(arguments: Mapping[str, Any]) -> list[str]:
    """vLLM's keyword arguments as options of its command line."""
    options: list[str] = []
    for name, value in arguments.items():
        options.append("--" + name.replace("_", "-"))
        if value is not True:
            options.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return options


def _head(settings: ServingSettings) -> str:
    if settings.head_address is None:
        raise EngineError(
            f"serving over {settings.nodes} nodes needs the address of the first",
            where="serving.head_address",
            remedy="give its IP address with --head-address, or in the recipe",
        )
    return settings.head_address


def _place(settings: ServingSettings, node: int) -> str:
    if settings.nodes == 1:
        return ""
    return f"node {node}" + (", the head" if node == 0 else "")


def _check_node(settings: ServingSettings, node: int) -> None:
    if not 0 <= node < settings.nodes:
        raise EngineError(
            f"there is no node {node}, serving.nodes is {settings.nodes}",
            where="--node",
            remedy=f"give one from 0, the head, to {settings.nodes - 1}",
        )
