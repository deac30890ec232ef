"""vLLM on the CPU: a model folder in a worker process, in vLLM's own Python environment."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from msquant.errors import EngineError, ModelError, choices
from msquant.formats.registry import marked_formats
from msquant.inference.environments import SITE, VLLM_CPU, require_ready
from msquant.inference.launch import Launch
from msquant.inference.vllm_site import msquant_vllm_workarounds as workarounds
from msquant.inference.worker_engine import LOAD_SECONDS, WorkerEngine

NAME = "vllm"
WORKER = SITE / "msquant_vllm_worker.py"
DTYPES = ("auto", "float32", "bfloat16", "float16")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def require_servable(folder: Path) -> None:
    """Refuse a folder that vLLM cannot read, before anything is started.

    Raises:
        EngineError: it is quantized in a format of another engine.
        ModelError: it holds no tokenizer.
    """
    for name, form in marked_formats().items():
        if form.server != NAME and (folder / name).is_file():
            raise EngineError(
                f"is in the {form.name} format ({name}), which vLLM cannot read",
                where=folder,
                remedy=f"msquant export {shlex.quote(str(folder))} --format compressed-tensors",
            )
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        raise ModelError(
            "the folder holds no tokenizer.json",
            where=folder,
            remedy="copy tokenizer.json and tokenizer_config.json from the original model into the folder",
        )


def child_environment(
    settings: Mapping[str, str], inherited: Mapping[str, str] | None = None
) -> dict[str, str]:
    """What to set on top of an inherited environment: what the user has not set, and msquant's modules.

    Args:
        settings: variables of the workarounds.
        inherited: this process's environment by default.
    """
    inherited = os.environ if inherited is None else inherited
    return {
        **{name: value for name, value in settings.items() if name not in inherited},
        # In place of an inherited one, which is meant for another Python.
        "PYTHONPATH": str(SITE),
    }


def worker_launch(folder: Path, dtype: str = "auto") -> Launch:
    """How the worker for a folder is started.

    Args:
        folder: a floating-point or compressed-tensors folder.
        dtype: of activations, one of `DTYPES`; `auto` follows the config, and takes bfloat16 for float32.

    Raises:
        EngineError: vLLM is not installed, or cannot read this folder.
        ModelError: the folder holds no tokenizer.
    """
    if dtype not in DTYPES:
        raise EngineError(f"dtype {dtype!r} is unknown", where="--dtype", remedy=choices(dtype, DTYPES))
    require_servable(folder)
    python = require_ready(VLLM_CPU).python
    env = child_environment(workarounds.worker_environment())
    request = {"op": "load", "model": str(folder.resolve()), "dtype": dtype}
    return Launch((str(python), str(WORKER)), env, requests=(request,))


class VllmEngine(WorkerEngine):
    """A model folder loaded into vLLM, as `msquant engine install vllm-cpu` has installed it.

    Args:
        folder: a floating-point or compressed-tensors folder.
        dtype: of activations, as of `worker_launch`.
        load_seconds: time to load the model in.

    Raises:
        EngineError: vLLM is not installed, cannot read this folder, or failed; names its log.
        ModelError: the folder holds no tokenizer.
    """

    name = NAME

    def __init__(self, folder: Path, dtype: str = "auto", load_seconds: float = LOAD_SECONDS) -> None:
        super().__init__("vLLM", worker_launch(folder, dtype), load_seconds, "msquant engine check")
        self.version: str = self.loaded["vllm"]
        self.dtype: str = self.loaded["dtype"]
        self.max_model_len: int = self.loaded["max_model_len"]
