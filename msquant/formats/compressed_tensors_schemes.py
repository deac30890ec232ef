"""Which linear layers vLLM runs in which scheme of compressed-tensors.

Read in vllm 0.11.0 and 0.32.0: compressed_tensors.py (`_is_static_tensor_w8a8`, `_is_dynamic_token_w8a8`,
`get_quant_method`), compressed_tensors_moe (`CompressedTensorsW8A8Int8MoEMethod`), and the weight that latent
attention takes apart (v1/attention/backends/mla/common.py, quant_utils.py: `get_and_maybe_dequant_weights`).
"""

from collections.abc import Iterator, Mapping

from msquant.formats.format import Finding
from msquant.formats.scheme_rules import FLOAT_ONLY, check_linear_schemes
from msquant.schemes import FLOAT, W8A8, W8A8_DYNAMIC, Scheme

DESCRIBED: dict[Scheme, str] = {FLOAT: "FLOAT", W8A8: "W8A8", W8A8_DYNAMIC: "W8A8_DYNAMIC"}
"""The schemes that vLLM runs and msquant writes, in the words of `msquant inspect`."""


def check_schemes(linears: Mapping[str, Scheme]) -> Iterator[Finding]:
    """Check that vLLM can run the layers of a model in the given schemes together.

    Args:
        linears: the scheme of each linear layer by module.
    """
    yield from check_linear_schemes(linears, "vLLM", DESCRIBED, FLOAT_ONLY)
    for module, scheme in linears.items():
        if scheme.is_static and module.endswith(".kv_b_proj"):
            yield Finding(
                module,
                "is W8A8: vLLM recovers the weight of kv_b_proj by multiplying it with ones, which static "
                "activations cut off; it accepts W8A8_DYNAMIC and FLOAT",
            )
