"""Serving a folder with another engine's own server: the commands, and the section behind them."""

from dataclasses import dataclass
from pathlib import Path

from msquant.inference import vllm_cpu, vllm_mindspore, vllm_mindspore_server, vllm_server
from msquant.inference.launch import Launch
from msquant.inference.preflight import preflight, require_ready
from msquant.inference.serving import ServingSettings
from msquant.serving import require_served, serving_settings

KEY_VARIABLE = "VLLM_API_KEY"
"""vLLM's own variable for the key that clients must send."""


@dataclass(frozen=True)
class Node:
    """This machine's part in a server that may span several.

    Attributes:
        index: 0 for the head.
        recipe: whose serving section counts, in place of the folder's own.
        head_address: of the first machine, in place of the section's.
        network_interface: that the machines reach each other by, in place of the section's.
    """

    index: int = 0
    recipe: str | None = None
    head_address: str | None = None
    network_interface: str | None = None


def commands(folder: Path, engine: str, host: str, port: int, dtype: str, node: Node) -> list[Launch]:
    """What is executed, on every machine in turn; the last is the command of this one.

    Args:
        folder: the model folder.
        engine: `vllm` or `vllm-mindspore`.
        host: address that the server listens on.
        port: its port.
        dtype: of vLLM's activations; for `vllm` alone.
        node: of `vllm-mindspore`.

    Raises:
        EngineError: the engine is not installed, or cannot serve this folder; the section does not fit.
        CheckpointError, ModelError, RecipeError: see `serving_settings` and the engines' `server_command`.
    """
    if engine == vllm_cpu.NAME:
        require_served(folder, engine, ServingSettings())
        return [vllm_server.server_command(folder, host, port, dtype=dtype)]
    settings = _settings(folder, node)
    require_served(folder, engine, settings)
    here = vllm_mindspore_server.server_command(folder, settings, host, port, node=node.index)
    every = vllm_mindspore_server.cluster_commands(folder, settings, host, port)
    return [*(launch for launch in every if launch != here), here]


def require_machine(folder: Path, engine: str, host: str, port: int, node: Node) -> None:
    """Check what can be checked of this machine before another engine's server is started.

    Raises:
        EngineError: something that the server needs is missing or wrong.
    """
    if engine == vllm_mindspore.NAME:
        settings = _settings(folder, node)
        require_ready(preflight(folder, settings, node=node.index, address=host, port=port))


def _settings(folder: Path, node: Node) -> ServingSettings:
    site = {"head_address": node.head_address, "network_interface": node.network_interface}
    return serving_settings(folder, node.recipe, site)
