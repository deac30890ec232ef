"""vLLM on the CPU: a model folder in a worker process, in vLLM's own Python environment."""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from msquant.checkpoint.cache import cache_folder
from msquant.errors import EngineError, ModelError
from msquant.inference.engine import Completion, FinishReason, OnText, Sampling, check_prompts
from msquant.inference.environments import SITE, VLLM_CPU, require_ready
from msquant.inference.vllm_site import msquant_vllm_workarounds as workarounds
from msquant.inference.worker_process import WorkerProcess

NAME = "vllm"
WORKER = SITE / "msquant_vllm_worker.py"
DTYPES = ("auto", "float32", "bfloat16", "float16")
LOAD_SECONDS = 1800.0
_TITLE = "vLLM"
_LOGS_KEPT = 10
_NOT_FOR_VLLM = {
    "quantization_description.json": "golden-stick",
    "quant_model_description.json": "ascend",
}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")


def require_servable(folder: Path) -> None:
    """Refuse a folder that vLLM cannot read, before anything is started.

    Raises:
        EngineError: it is quantized in a format of another engine.
        ModelError: it holds no tokenizer.
    """
    for name, quantization in _NOT_FOR_VLLM.items():
        if (folder / name).is_file():
            raise EngineError(
                f"is in the {quantization} format ({name}), which vLLM cannot read",
                where=folder,
                remedy=f"msquant export {folder} --format compressed-tensors",
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


class VllmEngine:
    """A model folder loaded into vLLM, as `msquant engine install vllm-cpu` has installed it.

    Args:
        folder: a floating-point or compressed-tensors folder.
        dtype: of activations, one of `DTYPES`; `auto` follows the config, and takes bfloat16 for float32.
        load_seconds: time to load the model in; the imports alone take 15 s on a busy machine.

    Raises:
        EngineError: vLLM is not installed, cannot read this folder, or failed; names its log.
        ModelError: the folder holds no tokenizer.
    """

    name = NAME

    def __init__(self, folder: Path, dtype: str = "auto", load_seconds: float = LOAD_SECONDS) -> None:
        if dtype not in DTYPES:
            raise EngineError(
                f"dtype {dtype!r} is unknown", where="--dtype", remedy=f"use one of: {', '.join(DTYPES)}"
            )
        require_servable(folder)
        python = require_ready(VLLM_CPU).python
        env = {**os.environ, **child_environment(workarounds.worker_environment())}
        self._worker = WorkerProcess(_TITLE, [str(python), str(WORKER)], env, _new_log())
        request = {"op": "load", "model": str(folder.resolve()), "dtype": dtype}
        (loaded,) = self._worker.ask("loaded", "loading the model", request, timeout=load_seconds)
        self.version: str = loaded["vllm"]
        self.dtype: str = loaded["dtype"]
        self.max_model_len: int = loaded["max_model_len"]

    @property
    def log(self) -> Path:
        """What vLLM wrote: its version, the kernels it chose, its errors."""
        return self._worker.log

    @property
    def pid(self) -> int:
        """Of the worker."""
        return self._worker.pid

    def generate(
        self, prompts: Sequence[str], sampling: Sampling, on_text: OnText | None = None
    ) -> list[Completion]:
        """Continue every prompt, all together; see `Engine.generate`."""
        check_prompts(prompts)
        start = time.perf_counter()
        texts: list[list[str]] = [[] for _ in prompts]
        tokens: list[list[int]] = [[] for _ in prompts]
        reasons: list[FinishReason] = ["length"] * len(prompts)
        request = {"op": "generate", "prompts": list(prompts), "sampling": _sampling_params(sampling)}
        with closing(self._worker.ask("done", "generating", request, cancel=True)) as answers:
            for answer in answers:
                if answer["event"] != "delta":
                    continue
                index = answer["index"]
                texts[index].append(answer["text"])
                tokens[index] += answer["token_ids"]
                if answer["finish_reason"] == "stop":
                    reasons[index] = "stop"
                if on_text is not None and answer["text"]:
                    on_text(index, answer["text"])
        seconds = time.perf_counter() - start
        return [
            Completion(prompt, "".join(texts[i]), tuple(tokens[i]), reasons[i], seconds)
            for i, prompt in enumerate(prompts)
        ]

    def close(self) -> None:
        """End the worker."""
        self._worker.close()


def _sampling_params(sampling: Sampling) -> dict[str, Any]:
    """The arguments of vLLM's `SamplingParams`."""
    params: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "ignore_eos": sampling.ignore_eos,
        "stop": list(sampling.stop),
    }
    if sampling.temperature > 0:
        params["seed"] = sampling.seed
    return params


def _new_log() -> Path:
    """A log file for a new worker; only the newest ones are kept."""
    folder = cache_folder() / "logs"
    with suppress(OSError):
        older = sorted(folder.glob("vllm-*.log"), key=lambda path: path.stat().st_mtime)
        for path in older[: 1 - _LOGS_KEPT]:
            path.unlink()
    return folder / f"vllm-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
