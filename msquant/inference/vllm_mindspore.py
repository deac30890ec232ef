"""vLLM-MindSpore 0.5.1 on an Ascend NPU, with the calls of its offline inference guide.

Guide: https://www.mindspore.cn/vllm_mindspore/docs/en/r0.4.0/user_guide/supported_features/quantization/quantization.html
"""

import importlib.util
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from msquant.checkpoint.json_file import read_json
from msquant.errors import EngineError
from msquant.inference.ascend_host import DEVICE_NODES, device_nodes
from msquant.inference.engine import Completion, OnText, Sampling, check_prompts
from msquant.inference.serving import ServingSettings

NAME = "vllm-mindspore"
BACKEND_VARIABLE = "VLLM_MS_MODEL_BACKEND"
OLD_BACKEND_VARIABLE = "vLLM_MODEL_BACKEND"
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
# The backend that reads msquant's folders of an architecture; the package alone would prefer MindFormers.
_BACKENDS = {
    "LlamaForCausalLM": "Native",
    "Qwen2ForCausalLM": "Native",
    "Qwen3ForCausalLM": "Native",
    "DeepseekV3ForCausalLM": "MindFormers",
}
_DESCRIPTIONS = {
    "quantization_description.json": "golden-stick",
    "quant_model_description.json": "ascend",
}


def available(nodes: str = DEVICE_NODES) -> str | None:
    """Return why this engine cannot be used here, or None if it can; nothing is imported.

    Args:
        nodes: glob pattern of the NPUs' device nodes.
    """
    for package in ("vllm_mindspore", "vllm"):
        if importlib.util.find_spec(package) is None:
            return f"the Python package {package} is not installed"
    if not device_nodes(nodes):
        return f"there is no Ascend NPU on this machine (no {nodes})"
    return None


def quantization_method(folder: Path) -> str | None:
    """The value of `quantization=` for a folder: `golden-stick`, `ascend`, or None for floating point.

    vLLM-MindSpore does not find it out by itself; both methods look for one description file.

    Raises:
        EngineError: the folder holds both description files, and the package would take either.
    """
    found = [name for name in _DESCRIPTIONS if (folder / name).is_file()]
    if len(found) > 1:
        raise EngineError(
            f"holds both {found[0]} and {found[1]}", where=folder, remedy="remove the one that is not meant"
        )
    return _DESCRIPTIONS[found[0]] if found else None


def engine_environment(
    folder: Path, settings: ServingSettings, environment: Mapping[str, str]
) -> dict[str, str]:
    """The variables that must be set before `vllm_mindspore` is imported, and before Ray is started.

    Args:
        folder: the model folder.
        settings: the recipe's section.
        environment: what the process inherits. A variable that is set there keeps its value, and is named
            with it in the result, which is so complete for another node.

    Raises:
        CheckpointError: `config.json` is missing or damaged.
    """
    wanted = _backend(folder, settings, environment) | {
        "HCCL_OP_EXPANSION_MODE": settings.hccl_op_expansion_mode,
        "MS_ENABLE_LCCL": "on" if settings.ms_enable_lccl else "off",
        "MS_ALLOC_CONF": settings.ms_alloc_conf,
    }
    if settings.devices is not None or settings.world_size > 1:
        wanted["ASCEND_RT_VISIBLE_DEVICES"] = ",".join(map(str, settings.visible_devices()))
    if settings.hccl_buffsize is not None:
        wanted["HCCL_BUFFSIZE"] = str(settings.hccl_buffsize)
    if settings.ms_mempool_block_size is not None:
        wanted["MS_MEMPOOL_BLOCK_SIZE"] = str(settings.ms_mempool_block_size)
    if settings.nodes > 1:
        # The guides set them for Ray; without them each library takes whichever interface it finds first.
        interface = settings.network_interface
        wanted |= {
            name: interface or "" for name in INTERFACE_VARIABLES if interface or environment.get(name)
        }
    if settings.uses_ray:
        wanted["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"
    return {name: environment.get(name, value) for name, value in wanted.items()}


def _backend(folder: Path, settings: ServingSettings, environment: Mapping[str, str]) -> dict[str, str]:
    """The variable that chooses the model code, whichever of its two names the user has set."""
    for name in (BACKEND_VARIABLE, OLD_BACKEND_VARIABLE):
        if name in environment:
            return {name: environment[name]}
    architectures = read_json(folder / "config.json").get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    backend = settings.model_backend or _BACKENDS.get(str(first))
    return {BACKEND_VARIABLE: backend} if backend else {}


class VllmMindSporeEngine:
    """A model folder loaded into vLLM-MindSpore, in this process.

    vLLM runs the prompts together and hands texts over when all are finished, so `on_text` is called once a
    prompt. Nothing that imports torch or transformers may have run before: the package puts its own torch in
    their place when it is imported.

    Args:
        folder: the model folder.
        device_nodes: glob pattern of the NPUs' device nodes.

    Raises:
        EngineError: the package or an NPU is missing, or vLLM cannot load the folder.
        CheckpointError: `config.json` is missing or damaged.
    """

    name = NAME

    def __init__(self, folder: Path, device_nodes: str = DEVICE_NODES) -> None:
        if reason := available(device_nodes):
            raise EngineError(reason, where=NAME, remedy="use --engine embedded, which runs on this machine")
        quantization = quantization_method(folder)
        os.environ.update(engine_environment(folder, ServingSettings(), os.environ))
        try:
            import vllm_mindspore  # noqa: F401  # isort: skip  # must come before vllm
            from vllm import LLM, SamplingParams

            self._sampling_params = SamplingParams
            if quantization is None:
                self._llm: Any = LLM(model=str(folder))
            else:
                self._llm = LLM(model=str(folder), quantization=quantization)
        except Exception as error:
            raise _failure("cannot load the model", error, folder) from error

    def generate(
        self, prompts: Sequence[str], sampling: Sampling, on_text: OnText | None = None
    ) -> list[Completion]:
        """Continue every prompt; see `Engine.generate`."""
        check_prompts(prompts)
        options: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.temperature > 0:
            options["seed"] = sampling.seed
        if sampling.ignore_eos:
            options["ignore_eos"] = True
        if sampling.stop:
            options["stop"] = list(sampling.stop)
        start = time.perf_counter()
        try:
            params = self._sampling_params(**options, max_tokens=sampling.max_tokens)
            outputs = self._llm.generate(list(prompts), params)
        except Exception as error:
            raise _failure("cannot generate", error) from error
        seconds = time.perf_counter() - start
        completions = [_completion(output, seconds) for output in outputs]
        if on_text is not None:
            for i, completion in enumerate(completions):
                on_text(i, completion.text)
        return completions

    def close(self) -> None:
        """Free the model; see `Engine.close`."""
        del self._llm


def _completion(output: Any, seconds: float) -> Completion:
    best = output.outputs[0]
    return Completion(
        prompt=output.prompt,
        text=best.text,
        token_ids=tuple(best.token_ids),
        finish_reason="stop" if best.finish_reason == "stop" else "length",
        seconds=seconds,
    )


def _failure(what: str, error: Exception, folder: Path | None = None) -> EngineError:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return EngineError(
        f"vLLM-MindSpore {what}: {type(error).__name__}: {first_line}",
        where=folder,
        remedy=f"check its own log above and {BACKEND_VARIABLE}, or use --engine embedded",
    )
