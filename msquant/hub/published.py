"""The published `config.json` of the models that msquant has a recipe for: known without any weights."""

from collections.abc import Sequence
from functools import cache
from math import ceil, prod
from pathlib import Path
from typing import Any

import msquant
from msquant.checkpoint.json_file import read_json
from msquant.families import expected_shapes, extra_shapes

HUB_IDS = {
    "deepseek-r1": "deepseek-ai/DeepSeek-R1",
    "deepseek-r1-0528": "deepseek-ai/DeepSeek-R1-0528",
    "deepseek-r1-distill-llama-70b": "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
    "deepseek-r1-distill-llama-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
    "deepseek-r1-distill-qwen-1.5b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
    "deepseek-r1-distill-qwen-14b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
    "deepseek-r1-distill-qwen-32b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
    "deepseek-r1-distill-qwen-7b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
    "deepseek-v2-lite": "deepseek-ai/DeepSeek-V2-Lite",
    "deepseek-v3": "deepseek-ai/DeepSeek-V3",
    "deepseek-v3-0324": "deepseek-ai/DeepSeek-V3-0324",
    "deepseek-v3.1": "deepseek-ai/DeepSeek-V3.1",
    "deepseek-v3.1-terminus": "deepseek-ai/DeepSeek-V3.1-Terminus",
    "deepseek-v3.2": "deepseek-ai/DeepSeek-V3.2",
    "deepseek-v3.2-exp": "deepseek-ai/DeepSeek-V3.2-Exp",
    "glm-4-32b-0414": "zai-org/GLM-4-32B-0414",
    "glm-4-9b-0414": "zai-org/GLM-4-9B-0414",
    "glm-4.5": "zai-org/GLM-4.5",
    "glm-4.5-air": "zai-org/GLM-4.5-Air",
    "glm-4.6": "zai-org/GLM-4.6",
    "glm-4.7": "zai-org/GLM-4.7",
    "glm-5": "zai-org/GLM-5",
    "kimi-k2-instruct": "moonshotai/Kimi-K2-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
    "minimax-m2": "MiniMaxAI/MiniMax-M2",
    "mistral-7b-instruct-v0.3": "mistralai/Mistral-7B-Instruct-v0.3",
    "qwen2-7b": "Qwen/Qwen2-7B",
    "qwen2-vl-7b-instruct": "Qwen/Qwen2-VL-7B-Instruct",
    "qwen2.5-0.5b-instruct": "Qwen/Qwen2.5-0.5B-Instruct",
    "qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-14b": "Qwen/Qwen3-14B",
    "qwen3-235b-a22b": "Qwen/Qwen3-235B-A22B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "qwen3-30b-a3b-instruct-2507": "Qwen/Qwen3-30B-A3B-Instruct-2507",
    "qwen3-32b": "Qwen/Qwen3-32B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-coder-30b-a3b-instruct": "Qwen/Qwen3-Coder-30B-A3B-Instruct",
    "qwen3-next-80b-a3b-instruct": "Qwen/Qwen3-Next-80B-A3B-Instruct",
    "qwen3-vl-8b-instruct": "Qwen/Qwen3-VL-8B-Instruct",
    "qwq-32b": "Qwen/QwQ-32B",
}
"""Of each published model: its name here, which is its recipe's, and where its makers publish it."""

_BF16_BYTES, _F32_BYTES = 2, 4
_FP8_LINEARS = ("_proj.weight", "_proj_with_mqa.weight", "indexer.wq_b.weight", "indexer.wk.weight")
_BF16_LINEARS = ("eh_proj.weight", "weights_proj.weight")


def published_name(model: str) -> str | None:
    """The name here of a model that is given by that name or by its hub id, in any case; None if unknown."""
    wanted = model.lower()
    return next((name for name, hub_id in HUB_IDS.items() if wanted in (name, hub_id.lower())), None)


def published_config(model: str) -> dict[str, Any] | None:
    """The published `config.json` of a model, given by name (`deepseek-r1`) or hub id; None if unknown.

    Raises:
        CheckpointError: the file is missing from the installation.
    """
    name = published_name(model)
    return None if name is None else read_json(configs_folder() / "models" / f"{name}.json")


def published_kind(model: str) -> str | None:
    """The `model_type` in the published `config.json` of a model; None for one that is not published here."""
    config = published_config(model)
    return None if config is None else str(config.get("model_type"))


def published_bytes(model: str) -> int | None:
    """About how many bytes the published weights have, computed from the shapes; None if unknown."""
    config = published_config(model)
    expected = None if config is None else expected_shapes(config)
    if config is None or expected is None:
        return None
    shapes = expected | extra_shapes(config)
    block = config.get("quantization_config", {}).get("weight_block_size")
    return sum(stored_bytes(name, shape, block) for name, shape in shapes.items())


@cache
def configs_folder() -> Path:
    """Where the recipes lie, and the published configs in `models/` below them."""
    package = Path(msquant.__file__).parent
    # In the wheel the folder lies in the package, in a checkout beside it.
    return next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())


def is_published_in_fp8(name: str) -> bool:
    """Whether a tensor of a model that is published in FP8 is."""
    return name.endswith(_FP8_LINEARS) and not name.endswith(_BF16_LINEARS)


def stored_bytes(name: str, shape: tuple[int, ...], block: Sequence[int] | None) -> int:
    """About how many bytes a tensor has as it is published.

    Args:
        name: its full name.
        shape: its shape.
        block: rows and columns of a block of FP8 weights; None for a model in bfloat16.
    """
    if block and is_published_in_fp8(name):
        scales = prod(ceil(size / step) for size, step in zip(shape, block, strict=True))
        return prod(shape) + _F32_BYTES * scales
    return _BF16_BYTES * prod(shape)
