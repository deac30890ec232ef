"""Which linear layers vllm-ascend runs in which scheme, and the description it reads.

Read in vllm-ascend (quantization/modelslim_config.py: `get_linear_quant_type`, `is_layer_skipped_ascend`;
methods/registry.py; attention/mla_v1.py: `process_weights_after_loading`) and msModelSlim (ascendv1.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from msquant import schemes
from msquant.formats.format import Finding
from msquant.formats.scheme_rules import FLOAT_ONLY, check_linear_schemes
from msquant.schemes import Scheme

QUANT_METHOD: Literal["ascend"] = "ascend"
"""What vllm-ascend's `quantization=` takes for this format."""

DESCRIPTION_NAME = "quant_model_description.json"

FLOAT = "FLOAT"

DESCRIBED: dict[Scheme, str] = {
    schemes.FLOAT: FLOAT,
    schemes.W8A8: "W8A8",
    schemes.W8A8_DYNAMIC: "W8A8_DYNAMIC",
    schemes.W8A16: "W8A16",
}
"""The word the description has for each scheme that vllm-ascend runs and msquant reads."""

# A description of a cache, or of attention, that is quantized too.
CACHE_ENTRIES = ("fa_quant_type", "kv_cache_type", "kv_quant_type", "indexer_quant_type")

_FLOAT_ONLY = {**FLOAT_ONLY, "kv_b_proj": "kv_b_proj, which it folds into the attention,"}


def check_schemes(linears: Mapping[str, Scheme]) -> Iterator[Finding]:
    """Check that vllm-ascend can run the layers of a model in the given schemes together.

    Args:
        linears: the scheme of each linear layer by module.
    """
    yield from check_linear_schemes(linears, "vllm-ascend", DESCRIBED, _FLOAT_ONLY)


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
        description[name] = FLOAT if part == "bias" else DESCRIBED[linears.get(module, schemes.FLOAT)]
    words = set(description.values())
    # The order of msModelSlim's QUANT_TYPE_PRIORITY.
    model_type = next(word for word in ("W8A8", "W8A8_DYNAMIC", "W8A16", FLOAT) if word in words)
    return {
        **dict(sorted(description.items())),
        "version": "1.0.0",
        "model_quant_type": model_type,
        "metadata": {},
        "group_size": 0,
    }
