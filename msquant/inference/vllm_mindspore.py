"""vLLM-MindSpore 0.5.1 on an Ascend NPU: what a folder needs, and prompts in a worker process.

Guide: https://www.mindspore.cn/vllm_mindspore/docs/en/r0.4.0/user_guide/supported_features/quantization/quantization.html
"""

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from msquant.checkpoint.json_file import read_json
from msquant.errors import EngineError
from msquant.formats.registry import format_names, marked_formats
from msquant.inference.ascend_host import DEVICE_NODES, device_nodes
from msquant.inference.environments import SITE
from msquant.inference.launch import Launch
from msquant.inference.serving_settings import ServingSettings
from msquant.inference.worker_engine import LOAD_SECONDS, WorkerEngine

NAME = "vllm-mindspore"
WORKER = SITE / "msquant_vllm_mindspore_worker.py"
BACKEND_VARIABLE = "VLLM_MS_MODEL_BACKEND"
OLD_BACKEND_VARIABLE = "vLLM_MODEL_BACKEND"
DEVICES_VARIABLE = "ASCEND_RT_VISIBLE_DEVICES"
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME", "TP_SOCKET_IFNAME")
# The backend that reads msquant's folders of an architecture; the package alone would prefer MindFormers.
_BACKENDS = {
    "LlamaForCausalLM": "Native",
    "Qwen2ForCausalLM": "Native",
    "Qwen3ForCausalLM": "Native",
    "DeepseekV3ForCausalLM": "MindFormers",
}
_DTYPES = ("bfloat16", "float16")


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
    marked = marked_formats()
    found = [name for name in marked if (folder / name).is_file()]
    if len(found) > 1:
        raise EngineError(
            f"holds both {found[0]} and {found[1]}", where=folder, remedy="remove the one that is not meant"
        )
    return marked[found[0]].name if found else None


def model_dtype(folder: Path) -> dict[str, str]:
    """The argument `dtype` for a folder: the one that `config.json` names.

    The engine's own choice for a float16 model would be bfloat16 in places: `input_scale` would be rounded
    again, and `deq_scale`, which was computed from it, would not.

    Returns:
        Empty where the file names none, or one that the engine does not take.

    Raises:
        CheckpointError: `config.json` is missing or damaged.
    """
    config = read_json(folder / "config.json")
    dtype = config.get("dtype") or config.get("torch_dtype")
    return {"dtype": dtype} if dtype in _DTYPES else {}


def require_servable(folder: Path) -> None:
    """Refuse a folder that is quantized in a format of another engine, before anything is started.

    Raises:
        EngineError: it is; names the format.
        CheckpointError: `config.json` is missing or damaged.
    """
    section = read_json(folder / "config.json").get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    if method is not None and method not in [form.name for form in marked_formats().values()]:
        raise EngineError(
            f"is in the format {method}, which vLLM-MindSpore cannot read",
            where=folder,
            remedy=f"msquant export {folder} --format golden-stick"
            if method in format_names()
            else f"quantize it: msquant quantize {folder}",
        )


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
        wanted[DEVICES_VARIABLE] = ",".join(map(str, settings.visible_devices()))
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


def chosen_devices(settings: ServingSettings, environment: Mapping[str, str]) -> tuple[int, ...]:
    """The NPUs of a node that will be used: those of `ASCEND_RT_VISIBLE_DEVICES`, else the settings' own.

    Raises:
        EngineError: the variable is no list of numbers.
    """
    named = environment.get(DEVICES_VARIABLE)
    if named is None:
        return settings.visible_devices()
    try:
        return tuple(int(number) for number in named.split(","))
    except ValueError:
        raise EngineError(
            f"is {named!r}, which is no list of numbers",
            where=DEVICES_VARIABLE,
            remedy=f"set it to {','.join(map(str, settings.visible_devices()))}, or unset it",
        ) from None


def _backend(folder: Path, settings: ServingSettings, environment: Mapping[str, str]) -> dict[str, str]:
    """The variable that chooses the model code, whichever of its two names the user has set."""
    for name in (BACKEND_VARIABLE, OLD_BACKEND_VARIABLE):
        if name in environment:
            return {name: environment[name]}
    architectures = read_json(folder / "config.json").get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    backend = settings.model_backend or _BACKENDS.get(str(first))
    return {BACKEND_VARIABLE: backend} if backend else {}


def worker_launch(
    folder: Path, settings: ServingSettings, environment: Mapping[str, str] | None = None
) -> Launch:
    """How the worker for a folder is started; on the first of several nodes.

    Args:
        folder: the model folder.
        settings: the recipe's section.
        environment: what the process inherits, this process's own by default.

    Raises:
        EngineError: the section asks for data parallelism; the folder is of another engine's format, or holds
            two descriptions.
        CheckpointError: `config.json` is missing or damaged.
    """
    if settings.data_parallel_size > 1:
        raise EngineError(
            f"data_parallel_size is {settings.data_parallel_size}, and prompts are run on one copy",
            where="serving.data_parallel_size",
            remedy="serve it (msquant serve), or name a recipe of one copy, such as --recipe deepseek-r1",
        )
    require_servable(folder)
    options = settings.engine_arguments()
    if (quantization := quantization_method(folder)) is not None:
        options["quantization"] = quantization
    options |= model_dtype(folder)
    env = engine_environment(folder, settings, os.environ if environment is None else environment)
    request = {"op": "load", "model": str(folder.resolve()), "options": options}
    return Launch((sys.executable, str(WORKER)), env, requests=(request,))


class VllmMindSporeEngine(WorkerEngine):
    """A model folder loaded into vLLM-MindSpore, in a process of its own.

    The package puts its own torch in the place of what imports torch or transformers, so it must be the first
    import of a process.

    Args:
        folder: the model folder.
        settings: how it is loaded; a section without any value by default.
        device_nodes: glob pattern of the NPUs' device nodes.
        load_seconds: time to load the model in.

    Raises:
        EngineError: the package or an NPU is missing, or vLLM cannot load the folder; names its log.
        CheckpointError: `config.json` is missing or damaged.
    """

    name = NAME

    def __init__(
        self,
        folder: Path,
        settings: ServingSettings | None = None,
        device_nodes: str = DEVICE_NODES,
        load_seconds: float = LOAD_SECONDS,
    ) -> None:
        if reason := available(device_nodes):
            raise EngineError(reason, where=NAME, remedy="use --engine embedded, which runs on this machine")
        launch = worker_launch(folder, settings or ServingSettings())
        super().__init__("vLLM-MindSpore", launch, load_seconds, "msquant doctor")
