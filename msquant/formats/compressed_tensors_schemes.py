"""Which linear layers vLLM runs in which scheme of compressed-tensors.

Read in vllm 0.11.0 and 0.32.0: compressed_tensors.py (`_is_static_tensor_w8a8`, `_is_dynamic_token_w8a8`,
`get_quant_method`), compressed_tensors_moe (`CompressedTensorsW8A8Int8MoEMethod`), and the weight that latent
attention takes apart (v1/attention/backends/mla/common.py, quant_utils.py: `get_and_maybe_dequant_weights`).
"""

from collections.abc import Iterator, Mapping

from msquant.checkpoint.weights import Scheme
from msquant.formats.format import Finding
from msquant.formats.fused_layers import check_fused_schemes, experts_parent

DESCRIBED: dict[Scheme, str] = {"float": "FLOAT", "static": "W8A8", "dynamic": "W8A8_DYNAMIC"}
"""The schemes that vLLM runs and msquant writes, in the words of `msquant inspect`."""

# Never a quantized layer of vLLM 0.11: tables, and the router, which is built without a quantization method.
_FLOAT_ONLY = {"lm_head": "the output head", "embed_tokens": "embeddings", "mlp.gate": "the router"}


def check_schemes(linears: Mapping[str, Scheme]) -> Iterator[Finding]:
    """Check that vLLM can run the layers of a model in the given schemes together.

    Args:
        linears: the scheme of each linear layer by module.
    """
    for module, scheme in linears.items():
        if scheme not in DESCRIBED:
            accepted = ", ".join(DESCRIBED)
            yield Finding(module, f"is {scheme}: in this format vLLM accepts {accepted}")
        elif scheme != "float":
            yield from _check_quantized(module, scheme)
    yield from check_fused_schemes(linears)


def _check_quantized(module: str, scheme: Scheme) -> Iterator[Finding]:
    for suffix, what in _FLOAT_ONLY.items():
        if module == suffix or module.endswith(f".{suffix}"):
            yield Finding(module, f"is {scheme}: vLLM takes {what} in floating point only")
    if scheme == "static" and experts_parent(module):
        yield Finding(
            module,
            "is static: vLLM runs routed experts in int8 with per-token activations (dynamic) only",
        )
    if scheme == "static" and module.endswith(".kv_b_proj"):
        yield Finding(
            module,
            "is static: vLLM recovers the weight of kv_b_proj by multiplying it with ones, which static "
            "activations cut off; it accepts dynamic and float",
        )
