"""Folders of the compressed-tensors, ascend and AutoGPTQ formats, read by no code of msquant's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.accuracy import Captured


def read_folder(folder: Path) -> Captured:
    """What a folder holds: its linears with quantized inputs, and all else as floating-point tensors.

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
    for unpack in (_pack_quantized, _auto_gptq):
        for name, weight in unpack(tensors, folder):
            captured.tensor(name, weight)
            quantized.append(name.removesuffix(".weight"))
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if tensor.is_floating_point() and (module not in quantized or part == "bias"):
            captured.tensor(name, tensor.float().numpy())
    return captured


def _pack_quantized(tensors: dict[str, Any], folder: Path) -> Iterator[tuple[str, Any]]:
    """compressed-tensors' int4 weights alone: eight in an int32 along the columns, each plus 8."""
    for name in [name for name in tensors if name.endswith(".weight_packed")]:
        module = name.removesuffix(".weight_packed")
        rows, columns = tensors[f"{module}.weight_shape"].tolist()
        values = _nibbles(tensors[name])[:, :columns].float() - 8
        scale = tensors[f"{module}.weight_scale"].float()
        zero_point = tensors.get(f"{module}.weight_zero_point")
        offset = 0
        if zero_point is not None:
            # Zero points are packed along the rows.
            offset = (_nibbles(zero_point.T.contiguous())[:, :rows].T.float() - 8)[:, :, None]
        grouped = values.reshape(rows, scale.shape[1], -1)
        yield f"{module}.weight", ((grouped - offset) * scale[:, :, None]).reshape(rows, columns).numpy()


def _auto_gptq(tensors: dict[str, Any], folder: Path) -> Iterator[tuple[str, Any]]:
    """AutoGPTQ's int4 weights alone: eight in an int32 along the columns of the transposed weight."""
    names = [name for name in tensors if name.endswith(".qweight")]
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {}) if names else {}
    # Its first version stores a zero point less 1.
    less = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    for name in names:
        module = name.removesuffix(".qweight")
        values = _nibbles(tensors[name].T.contiguous()).float()
        scale = tensors[f"{module}.scales"].float().T
        zero_point = _nibbles(tensors[f"{module}.qzeros"])[:, : len(values)].float().T + less
        columns = values.shape[1]
        groups = tensors.get(f"{module}.g_idx")
        group = groups.long() if groups is not None else _places(columns, scale.shape[1])
        yield f"{module}.weight", ((values - zero_point[:, group]) * scale[:, group]).numpy()


def _nibbles(packed: Any) -> Any:
    """The eight values in 0..15 of every int32 of the last axis, the lowest bits first."""
    import torch

    return ((packed[..., None] >> torch.arange(0, 32, 4)) & 15).flatten(-2)


def _places(columns: int, groups: int) -> Any:
    import torch

    return torch.arange(columns) // (columns // groups)


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
    bits = 4 if tensors[f"{module}.weight"].abs().amax() <= 8 else 8
    return _linear(tensors[f"{module}.weight"], tensors[f"{module}.weight_scale"], scale, offset, bits)


def _ascend(tensors: dict[str, Any], module: str) -> Any:
    """Static layers store `deq_scale = input_scale * weight_scale`; `quant_bias` holds the bias as well.

    Int4 weights have two neighbouring rows in a byte, the even one in its low half, and a `scale_bias`.
    """
    weight = tensors[f"{module}.weight"]
    if f"{module}.scale_bias" in tensors:
        halves = [(weight << 4) >> 4, weight >> 4]
        rows = _stack(halves).reshape(-1, weight.shape[1])
        return _linear(rows, tensors[f"{module}.weight_scale"], None, 0, 4)
    scale, deq_scale = (tensors.get(f"{module}.{part}") for part in ("input_scale", "deq_scale"))
    if scale is None or deq_scale is None:
        return _linear(weight, tensors[f"{module}.weight_scale"], None, 0, 8)
    if not deq_scale.is_floating_point():
        # The bits of float32 in int64.
        deq_scale = deq_scale.int().view(dtype=_float32())
    offset = int(tensors[f"{module}.input_offset"].float().flatten()[0])
    return _linear(weight, deq_scale.float() / scale.float().flatten()[0], scale, offset, 8)


def _stack(halves: list[Any]) -> Any:
    import torch

    return torch.stack(halves, dim=1)


def _linear(weight: Any, weight_scale: Any, scale: Any, offset: int, bits: int) -> Any:
    import numpy as np

    from msquant.checkpoint.weights import QuantizedLinear
    from msquant.schemes import W4A8_DYNAMIC, W8A8, W8A8_DYNAMIC

    static = scale is not None
    return QuantizedLinear(
        weight.numpy(),
        weight_scale.float().numpy().reshape(-1),
        W8A8 if static else {4: W4A8_DYNAMIC, 8: W8A8_DYNAMIC}[bits],
        input_scale=scale.float().numpy().reshape(-1)[:1] if static else None,
        input_offset=np.array([offset], np.int32) if static else None,
    )


def _float32() -> Any:
    import torch

    return torch.float32
