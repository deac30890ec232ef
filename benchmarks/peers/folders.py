"""Folders of the compressed-tensors and ascend formats, read by no code of msquant's."""

import json
from pathlib import Path
from typing import Any

from benchmarks.accuracy import Captured


def read_folder(folder: Path) -> Captured:
    """What a folder holds: its int8 linears, and all its floating-point tensors.

    Raises:
        SystemExit: it is of no format that is known here.
    """
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    captured = Captured()
    quantized = [name.removesuffix(".weight") for name, t in tensors.items() if _is_int8_weight(name, t)]
    read = _ascend if _is_ascend(folder) else _compressed_tensors
    for module in quantized:
        captured.linear(module, read(tensors, module))
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if tensor.is_floating_point() and (module not in quantized or part == "bias"):
            captured.tensor(name, tensor.float().numpy())
    return captured


def _is_int8_weight(name: str, tensor: Any) -> bool:
    return name.endswith(".weight") and not tensor.is_floating_point()


def _is_ascend(folder: Path) -> bool:
    if any(folder.glob("quant_model_description*.json")):
        return True
    config = json.loads((folder / "config.json").read_text())
    if "quantization_config" not in config:
        raise SystemExit(f"{folder}: neither a description nor a quantization_config is here")
    return False


def _compressed_tensors(tensors: dict[str, Any], module: str) -> Any:
    scale, offset = (tensors.get(f"{module}.input_{part}") for part in ("scale", "zero_point"))
    offset = 0 if offset is None else int(offset)
    return _linear(tensors, module, tensors[f"{module}.weight_scale"], scale, offset)


def _ascend(tensors: dict[str, Any], module: str) -> Any:
    """Static layers store `deq_scale = input_scale * weight_scale`; `quant_bias` holds the bias as well."""
    scale, deq_scale = (tensors.get(f"{module}.{part}") for part in ("input_scale", "deq_scale"))
    if scale is None or deq_scale is None:
        return _linear(tensors, module, tensors[f"{module}.weight_scale"], None, 0)
    if not deq_scale.is_floating_point():
        # The bits of float32 in int64.
        deq_scale = deq_scale.int().view(dtype=_float32())
    offset = int(tensors[f"{module}.input_offset"].float().flatten()[0])
    return _linear(tensors, module, deq_scale.float() / scale.float().flatten()[0], scale, offset)


def _linear(tensors: dict[str, Any], module: str, weight_scale: Any, scale: Any, offset: int) -> Any:
    import numpy as np

    from msquant.checkpoint.weights import QuantizedLinear
    from msquant.schemes import W8A8, W8A8_DYNAMIC

    static = scale is not None
    return QuantizedLinear(
        tensors[f"{module}.weight"].numpy(),
        weight_scale.float().numpy().reshape(-1),
        W8A8 if static else W8A8_DYNAMIC,
        input_scale=scale.float().numpy().reshape(-1)[:1] if static else None,
        input_offset=np.array([offset], np.int32) if static else None,
    )


def _float32() -> Any:
    import torch

    return torch.float32
