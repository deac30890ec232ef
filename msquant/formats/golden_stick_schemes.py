"""Which backend of vLLM-MindSpore a folder is for, and which linear layers that can run in which scheme.

Read in vllm_mindspore 0.5.1 (`GoldenStickConfig`, `_validate_quantization_consistency`) for the native
backend, and in mindformers 1.7.0 (parallel_core/inference/quantization/golden_stick/config.py,
`get_quant_method`; transformer/multi_latent_attention.py; transformer/moe/experts.py) for MindFormers.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from msquant import schemes
from msquant.errors import CheckpointError
from msquant.formats.format import Finding
from msquant.formats.fused_layers import check_fused_schemes, experts_parent
from msquant.formats.scheme_rules import FLOAT_ONLY, float_only
from msquant.schemes import Scheme

W8A8 = "W8A8"
W8A8_DYNAMIC = "W8A8_DYNAMIC"
W8A16 = "W8A16"
FLOAT = "FLOAT"

DESCRIBED: dict[Scheme, str] = {
    schemes.FLOAT: FLOAT,
    schemes.W8A8: W8A8,
    schemes.W8A8_DYNAMIC: W8A8_DYNAMIC,
    schemes.W8A16: W8A16,
}
"""The word `quantization_description.json` has for each scheme."""

Variant = Literal["native", "mindformers"]
"""The backend of vLLM-MindSpore that a folder is for."""

VARIANTS: tuple[Variant, ...] = ("native", "mindformers")

ACCEPTED: dict[Variant, tuple[str, ...]] = {
    "native": (W8A8, FLOAT),
    "mindformers": (W8A8, W8A8_DYNAMIC, FLOAT),
}
"""Descriptions of a tensor that each backend runs and msquant reads."""

_MINDFORMERS_MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "qwen3_moe")

# MindFormers takes its weight apart as well (`MLASelfAttention.process_weights_after_loading`).
_FLOAT_ONLY = {**FLOAT_ONLY, "kv_b_proj": "kv_b_proj, which it folds into the attention"}

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


def variant_of(config: Mapping[str, Any]) -> Variant:
    """The backend a model is served with: MindFormers for DeepSeek and Qwen3-MoE, else the native one."""
    return "mindformers" if config.get("model_type") in _MINDFORMERS_MODEL_TYPES else "native"


def folder_variant(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> Variant:
    """The variant that a folder's manifest records, or that of its architecture if it records none.

    Args:
        config: the content of `config.json`.
        manifest: the content of `msquant.json`; empty if there is none.

    Raises:
        CheckpointError: the manifest records an unknown one.
    """
    recorded = manifest.get("variant")
    if recorded is None:
        return variant_of(config)
    for variant in VARIANTS:
        if recorded == variant:
            return variant
    raise CheckpointError(
        f"variant is {recorded!r}, one of {', '.join(VARIANTS)} is expected", where="msquant.json"
    )


def check_schemes(
    schemes: Mapping[str, str], variant: Variant, config: Mapping[str, Any]
) -> Iterator[Finding]:
    """Check that the backend can run the layers of a model in the given schemes together.

    Args:
        schemes: `W8A8`, `W8A8_DYNAMIC` or `FLOAT` by module; only what has a weight counts.
        variant: the backend.
        config: the content of `config.json`.
    """
    for module, value in schemes.items():
        if value not in ACCEPTED[variant]:
            known = " and ".join(ACCEPTED[variant])
            yield Finding(module, f"described as {value!r}: the {variant} backend knows only {known}")
        elif value != FLOAT and (what := float_only(module, _FLOAT_ONLY)):
            yield Finding(module, f"described as {value}: the engine never quantizes {what}")
    if variant == "mindformers":
        yield from _check_experts(schemes, config)
    yield from check_fused_schemes(schemes, "described as")


def _check_experts(schemes: Mapping[str, str], config: Mapping[str, Any]) -> Iterator[Finding]:
    """Experts are one grouped product in int8; multi-token-prediction layers are never quantized."""
    layers = config.get("num_hidden_layers")
    experts: dict[str, str] = {}
    for module, value in schemes.items():
        layer = _LAYER.match(module)
        if layer and type(layers) is int and int(layer[1]) >= layers:
            if value != FLOAT:
                yield Finding(
                    module,
                    f"described as {value}: the engine builds multi-token-prediction layers unquantized",
                )
        elif parent := experts_parent(module):
            experts.setdefault(parent, value)
    if any(value != FLOAT for value in schemes.values()):
        for parent, value in experts.items():
            if value != W8A8_DYNAMIC:
                yield Finding(
                    parent,
                    f"described as {value}: the engine runs the experts of a quantized model as "
                    f"{W8A8_DYNAMIC} only",
                )
