"""The engines that run and serve a folder, by name: what each takes, loads, starts, and asks of a machine."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import WeightSource
from msquant.errors import EngineError, choices
from msquant.flows.folder_checks import require_memory
from msquant.flows.serving_checks import parallelism, require_served, serving_settings
from msquant.formats.servers import Parallelism
from msquant.inference import vllm_cpu, vllm_mindspore
from msquant.inference.engine_protocol import Engine
from msquant.inference.environments import VLLM_CPU
from msquant.inference.launch import Launch
from msquant.inference.serving_settings import ServingSettings
from msquant.models.device import require_device

if TYPE_CHECKING:
    from msquant.inference.embedded import EmbeddedEngine

AUTO = "auto"
"""vLLM-MindSpore where it and an NPU are there, else the embedded engine."""

KEY_VARIABLE = "VLLM_API_KEY"
"""vLLM's own variable for the key that clients must send."""


@dataclass(frozen=True)
class Node:
    """This machine's part in a server that may span several.

    Attributes:
        index: 0 for the head.
        head_address: of the first machine, in place of the section's.
        network_interface: that the machines reach each other by, in place of the section's.
    """

    index: int = 0
    head_address: str | None = None
    network_interface: str | None = None


@dataclass(frozen=True)
class EngineOptions:
    """What a user says of how a folder is run; each engine takes some of it.

    Attributes:
        device: where the embedded engine computes, `cpu` or `ascend`.
        dtype: of activations, `auto`, `float32`, `bfloat16` or `float16`.
        recipe: whose serving section counts, in place of the folder's own.
        node: for an engine that spans several machines.
    """

    device: str = "cpu"
    dtype: str = "auto"
    recipe: str | None = None
    node: Node = Node()


class EngineKind(ABC):
    """One engine: how it is called, and how it comes up with a folder.

    Attributes:
        name: what `--engine` takes.
        takes: the fields of `EngineOptions`, beside `device` and `node`, that have an effect on it.
        in_process: whether it is msquant's own, which `msquant serve` puts behind a server of its own.
    """

    name: ClassVar[str]
    takes: ClassVar[frozenset[str]] = frozenset()
    in_process: ClassVar[bool] = False

    def require_served(self, folder: Path, options: EngineOptions) -> None:
        """Refuse a folder that it would refuse or run wrongly, before anything starts.

        Raises:
            EngineError: names what stands against it, and what to do.
        """
        return None

    @abstractmethod
    def load(self, folder: Path, options: EngineOptions) -> Engine:
        """Load a folder. Raises MsquantError where that cannot be."""

    def launch(self, folder: Path, options: EngineOptions) -> Launch | None:
        """The process that `load` starts; None for an engine in this process."""
        return None

    def serve_commands(self, folder: Path, options: EngineOptions, host: str, port: int) -> list[Launch]:
        """What its own server is started with, on every machine in turn; the last is for this one.

        Empty for an engine without one.

        Raises:
            EngineError: the engine is not installed, or cannot serve this folder; the section does not fit.
        """
        return []

    def require_machine(self, folder: Path, options: EngineOptions, host: str, port: int) -> None:
        """Check what can be checked of this machine before its server is started. Raises EngineError."""
        return None


class Embedded(EngineKind):
    """msquant's own engine, in this process."""

    name = "embedded"
    in_process = True

    def load(self, folder: Path, options: EngineOptions) -> Engine:
        """As `load_embedded`."""
        return load_embedded(folder, options.device)


class VllmOnCpu(EngineKind):
    """vLLM on this machine's processor, in an environment of its own."""

    name = vllm_cpu.NAME
    takes = frozenset({"dtype"})

    def require_served(self, folder: Path, options: EngineOptions) -> None:
        """By the version that msquant installs."""
        require_served(folder, "vllm", Parallelism(), version=VLLM_CPU.version)

    def load(self, folder: Path, options: EngineOptions) -> Engine:
        """In a worker process."""
        return vllm_cpu.VllmEngine(folder, options.dtype)

    def launch(self, folder: Path, options: EngineOptions) -> Launch | None:
        """The worker."""
        return vllm_cpu.worker_launch(folder, options.dtype)

    def serve_commands(self, folder: Path, options: EngineOptions, host: str, port: int) -> list[Launch]:
        """vLLM's own server."""
        from msquant.deploy.vllm_server import server_command

        return [server_command(folder, host, port, dtype=options.dtype)]


class VllmMindSpore(EngineKind):
    """vLLM-MindSpore on Ascend NPUs, on one machine or several."""

    name = vllm_mindspore.NAME
    takes = frozenset({"recipe"})

    def require_served(self, folder: Path, options: EngineOptions) -> None:
        """By the version that is installed here, in the backend that the environment names."""
        settings = self.settings(folder, options)
        environment = vllm_mindspore.engine_environment(folder, settings, os.environ)
        variables = (vllm_mindspore.BACKEND_VARIABLE, vllm_mindspore.OLD_BACKEND_VARIABLE)
        backends = {environment[one].lower() for one in variables if one in environment}
        try:
            installed = version(self.name)
        except PackageNotFoundError:
            installed = None
        require_served(folder, "vllm-mindspore", parallelism(settings), version=installed, backends=backends)

    def load(self, folder: Path, options: EngineOptions) -> Engine:
        """In a worker process."""
        return vllm_mindspore.VllmMindSporeEngine(folder, self.settings(folder, options))

    def launch(self, folder: Path, options: EngineOptions) -> Launch | None:
        """The worker."""
        return vllm_mindspore.worker_launch(folder, self.settings(folder, options))

    def serve_commands(self, folder: Path, options: EngineOptions, host: str, port: int) -> list[Launch]:
        """Ray where it is needed, and the server of each machine."""
        from msquant.deploy import vllm_mindspore_server as server

        settings = self.settings(folder, options)
        here = server.server_command(folder, settings, host, port, node=options.node.index)
        every = server.cluster_commands(folder, settings, host, port)
        return [*(launch for launch in every if launch != here), here]

    def require_machine(self, folder: Path, options: EngineOptions, host: str, port: int) -> None:
        """As `preflight`."""
        from msquant.deploy.preflight import preflight, require_ready

        settings = self.settings(folder, options)
        require_ready(preflight(folder, settings, node=options.node.index, address=host, port=port))

    @staticmethod
    def settings(folder: Path, options: EngineOptions) -> ServingSettings:
        """The serving section that counts."""
        node = options.node
        site = {"head_address": node.head_address, "network_interface": node.network_interface}
        return serving_settings(folder, options.recipe, site)


_REGISTERED: dict[str, EngineKind] = {}


def register(kind: EngineKind) -> EngineKind:
    """Make an engine known by its name."""
    _REGISTERED[kind.name] = kind
    return kind


for _shipped in (Embedded(), VllmOnCpu(), VllmMindSpore()):
    register(_shipped)


def engine_names() -> tuple[str, ...]:
    """What `--engine` takes, `auto` first."""
    return (AUTO, *_REGISTERED)


def find_engine(name: str = AUTO) -> EngineKind:
    """The engine of that name.

    Raises:
        EngineError: there is none.
    """
    if name == AUTO:
        name = Embedded.name if vllm_mindspore.available() else VllmMindSpore.name
    if name not in _REGISTERED:
        raise EngineError(
            f"engine {name!r} is unknown", where="--engine", remedy=choices(name, engine_names())
        )
    return _REGISTERED[name]


def check_options(kind: EngineKind, options: EngineOptions) -> None:
    """Refuse options of another engine, which would have no effect, and a device that is not there.

    Raises:
        EngineError: names the option.
    """
    if kind.in_process:
        require_device(options.device)
    for field in ("dtype", "recipe"):
        value = getattr(options, field)
        if value != getattr(EngineOptions, field) and field not in kind.takes:
            owners = _owners(field)
            raise EngineError(
                f"{value} is for the engine {' or '.join(owners)}, this is {kind.name}",
                where=f"--{field}",
                remedy=f"leave it out, or add --engine {owners[0]}",
            )


def _owners(field: str) -> Sequence[str]:
    return [kind.name for kind in _REGISTERED.values() if field in kind.takes]


def load_embedded(folder: Path, device: str = "cpu") -> "EmbeddedEngine":
    """Load a model folder into the embedded engine; see `generate` for the errors."""
    from msquant.families import find_family, model_types

    model_type = read_json(folder / "config.json").get("model_type")
    if find_family(model_type) is None:
        raise _only_vllm(f"cannot run model_type {model_type!r} (it runs {', '.join(model_types())})", folder)

    from msquant.checkpoint.tokenizer import load_tokenizer
    from msquant.inference.embedded import EmbeddedEngine
    from msquant.models.config_json import read_config

    config = read_config(folder)
    if device == "cpu":
        require_memory(folder, config)
    return EmbeddedEngine(config, open_weights(folder), load_tokenizer(folder), device)


def open_weights(folder: Path) -> WeightSource:
    """Open a folder's weights, in any of our formats or in floating point.

    Raises:
        CheckpointError: the folder is incomplete or damaged.
    """
    from msquant.checkpoint.checkpoint_reader import Checkpoint
    from msquant.formats.registry import folder_format

    form = folder_format(folder)
    return form.open(folder) if form else Checkpoint.open(folder)


def open_prefill(folder: Path) -> WeightSource | None:
    """A folder's weights as its server reads prompts with them; None where it does not differ.

    Raises:
        CheckpointError: as `open_weights`.
    """
    from msquant.formats.registry import folder_format

    form = folder_format(folder)
    return form.open_prefill(folder) if form else None


def _only_vllm(what: str, folder: Path) -> EngineError:
    reason = vllm_mindspore.available()
    here = f", but not here: {reason}" if reason else ": use --engine vllm-mindspore"
    return EngineError(
        f"the embedded engine {what}",
        where=folder,
        remedy=f"vLLM-MindSpore on an Ascend NPU can run this folder{here}",
    )
