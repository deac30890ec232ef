"""Which linear layers vllm-ascend runs in which scheme, and the description it reads.

Read in vllm-ascend (quantization/modelslim_config.py: `get_linear_quant_type`, `is_layer_skipped_ascend`;
methods/registry.py; attention/mla_v1.py: `process_weights_after_loading`) and msModelSlim (ascendv1.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from msquant.checkpoint.weights import Scheme
from msquant.formats.format import Finding
from msquant.formats.fused_layers import check_fused_schemes, experts_parent

QUANT_METHOD: Literal["ascend"] = "ascend"
"""What vllm-ascend's `quantization=` takes for this format."""

DESCRIPTION_NAME = "quant_model_description.json"

FLOAT = "FLOAT"

DESCRIBED: dict[Scheme, str] = {"float": FLOAT, "static": "W8A8", "dynamic": "W8A8_DYNAMIC"}
"""The word the description has for each scheme that vllm-ascend runs and msquant reads."""

# A description of a cache, or of attention, that is quantized too.
CACHE_ENTRIES = ("fa_quant_type", "kv_cache_type", "kv_quant_type", "indexer_quant_type")

_FLOAT_ONLY = {
    "lm_head": "the output head",
    "embed_tokens": "embeddings",
    "mlp.gate": "the router",
    "kv_b_proj": "kv_b_proj, which it folds into the attention,",
}


def check_schemes(linears: Mapping[str, Scheme]) -> Iterator[Finding]:
    """Check that vllm-ascend can run the layers of a model in the given schemes together.

    Args:
        linears: the scheme of each linear layer by module.
    """
    for module, scheme in linears.items():
        if scheme not in DESCRIBED:
            accepted = ", ".join(DESCRIBED)
            yield Finding(module, f"is {scheme}: in this format msquant writes {accepted} for vllm-ascend")
        elif scheme != "float":
            yield from _check_quantized(module, scheme)
    yield from check_fused_schemes(linears)


def _check_quantized(module: str, scheme: Scheme) -> Iterator[Finding]:
    for suffix, what in _FLOAT_ONLY.items():
        if module == suffix or module.endswith(f".{suffix}"):
            yield Finding(module, f"is {scheme}: vllm-ascend takes {what} in floating point only")
    if scheme == "static" and experts_parent(module):
        yield Finding(
            module,
            "is static: vllm-ascend runs routed experts in int8 with per-token activations (dynamic) only",
        )


def describe(names: Iterable[str], linears: Mapping[str, Scheme]) -> dict[str, Any]:
    """The content of `quant_model_description.json`.

    A bias is `FLOAT` even of a quantized layer, as msModelSlim has it. The output head is described even
    where it shares the embedding's weight and is not stored: vllm-ascend asks for it before it ties the two.

    Args:
        names: every tensor that is stored.
        linears: the scheme of each linear layer by module.
    """
    description: dict[str, Any] = {"lm_head.weight": FLOAT}
    for name in names:
        module, _, part = name.rpartition(".")
        description[name] = FLOAT if part == "bias" else DESCRIBED[linears.get(module, "float")]
    words = set(description.values())
    # The order of msModelSlim's QUANT_TYPE_PRIORITY.
    model_type = next(word for word in ("W8A8", "W8A8_DYNAMIC", FLOAT) if word in words)
    return {
        **dict(sorted(description.items())),
        "version": "1.0.0",
        "model_quant_type": model_type,
        "metadata": {},
        "group_size": 0,
    }
