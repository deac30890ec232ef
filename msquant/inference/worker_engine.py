"""vLLM in a worker process: what its engines share, whichever package and Python the worker has."""

import os
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

from msquant.checkpoint.cache import cache_folder
from msquant.errors import EngineError
from msquant.inference.engine import Completion, FinishReason, OnText, Sampling, check_prompts
from msquant.inference.launch import Launch
from msquant.inference.worker_process import AnswerError, WorkerProcess

LOAD_SECONDS = 1800.0
_LOGS_KEPT = 10
# What vLLM raises for a prompt that the model cannot take.
_INVALID = "VLLMValidationError"
_SEEDS = 2**63


class WorkerEngine:
    """A model that a worker process has loaded; see `vllm_site/msquant_vllm_worker.py` for what they say.

    Args:
        title: what messages call it.
        launch: how the worker is started; the first of its requests loads the model.
        load_seconds: time to load the model in; the imports alone take 15 s on a busy machine.
        check: the command that says what is wrong with its installation.

    Attributes:
        loaded: the worker's answer to that request.

    Raises:
        EngineError: the worker cannot be started, or cannot load the model; names its log.
    """

    def __init__(self, title: str, launch: Launch, load_seconds: float, check: str) -> None:
        self._title = title
        self._worker = WorkerProcess(title, launch.argv, launch.environment(), _new_log(), check)
        (self.loaded,) = self._worker.ask(
            "loaded", "loading the model", launch.requests[0], timeout=load_seconds
        )

    @property
    def log(self) -> Path:
        """What the worker wrote: versions, the kernels it chose, its errors."""
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
        request = {"op": "generate", "prompts": list(prompts), "sampling": sampling_params(sampling)}
        try:
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
        except AnswerError as error:
            if error.kind != _INVALID:
                raise
            raise EngineError(
                f"{self._title}: {error.message}", where="--prompt", remedy="change the prompt"
            ) from error
        seconds = time.perf_counter() - start
        return [
            Completion(prompt, "".join(texts[i]), tuple(tokens[i]), reasons[i], seconds)
            for i, prompt in enumerate(prompts)
        ]

    def close(self) -> None:
        """End the worker."""
        self._worker.close()


def sampling_params(sampling: Sampling) -> dict[str, Any]:
    """The arguments of vLLM's `SamplingParams`."""
    params: dict[str, Any] = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "ignore_eos": sampling.ignore_eos,
        "stop": list(sampling.stop),
    }
    if sampling.temperature > 0:
        params["seed"] = sampling.seed % _SEEDS
    return params


def _new_log() -> Path:
    """A log file for a new worker; only the newest ones are kept."""
    folder = cache_folder() / "logs"
    with suppress(OSError):
        older = sorted(folder.glob("vllm-*.log"), key=lambda path: path.stat().st_mtime)
        for path in older[: 1 - _LOGS_KEPT]:
            path.unlink()
    return folder / f"vllm-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
