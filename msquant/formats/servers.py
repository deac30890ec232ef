"""The servers that are known, and what of a quantized folder decides whether they serve it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from msquant.schemes import Scheme

ServerName = Literal["vllm-mindspore", "vllm-ascend", "vllm"]
"""The servers by name, whatever their version and backend."""

SERVER_NAMES: tuple[ServerName, ...] = get_args(ServerName)


@dataclass(frozen=True)
class Server:
    """One version of a server, with one of its backends.

    Attributes:
        name: of the server.
        version: of its package.
        backend: whose model code runs, where it has several.
        backend_version: of that backend's package, where it has one of its own.
        model_types: those that anything is known of here; empty for all.
    """

    name: ServerName
    version: str
    backend: str = ""
    backend_version: str = ""
    model_types: tuple[str, ...] = ()

    def __str__(self) -> str:
        backend = f"{self.backend} {self.backend_version}".strip()
        return f"{self.name} {self.version}" + (f" ({backend})" if backend else "")


SERVERS = (
    Server("vllm-mindspore", "0.5.1", "Native"),
    Server("vllm-mindspore", "0.5.1", "MindFormers", "1.7.0"),
    Server("vllm-mindspore", "0.5.1", "MindFormers", "1.8.0"),
    Server("vllm-mindspore", "0.5.1", "MindFormers", "1.9.0"),
    Server("vllm-mindspore", "0.6.0rc1", "Native", model_types=("deepseek_v3",)),
    Server("vllm-ascend", "0.23.0"),
    Server("vllm-ascend", "0.26.0rc1"),
    Server("vllm-ascend", "main"),
    Server("vllm", "0.11.0"),
    Server("vllm", "0.32.0"),
)


@dataclass(frozen=True)
class Parallelism:
    """How a server splits a model.

    Attributes:
        tensor: NPUs that share each matrix.
        data: copies of the attention.
        expert: NPUs that share the experts out whole; None where each expert is split.
    """

    tensor: int = 1
    data: int = 1
    expert: int | None = None


@dataclass(frozen=True)
class ServedModel:
    """What servers decide by, of a folder that is there or is to be written.

    Attributes:
        format: the name of the one it is in.
        variant: the backend it is made for, where the format has several.
        config: the content of its `config.json`.
        linears: the scheme of each linear layer, by module.
    """

    format: str
    variant: str
    config: Mapping[str, Any]
    linears: Mapping[str, Scheme]

    @property
    def model_type(self) -> str:
        """As `config.json` has it."""
        return str(self.config.get("model_type"))
