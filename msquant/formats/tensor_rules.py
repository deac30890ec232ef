"""Rules for stored tensors that formats have in common: dtypes, shapes and values."""

from collections.abc import Iterable, Iterator

import numpy as np

from msquant.checkpoint.reader import Checkpoint
from msquant.errors import CheckpointError
from msquant.formats.dtypes import DTYPE_CODES
from msquant.formats.format import Finding
from msquant.formats.scales import all_positive

Shape = tuple[int, ...]
Parts = dict[str, tuple[frozenset[str], tuple[Shape, ...]]]
"""The accepted dtypes and shapes of a layer's tensors, by the last part of their names."""

FLOAT_CODES = frozenset(DTYPE_CODES.values())
"""The safetensors dtypes of floating-point tensors."""

# Bytes of a floating-point tensor that are looked at in one piece: embeddings are never in memory whole.
_PIECE_BYTES = 2**26


def check_float(checkpoint: Checkpoint, name: str) -> Iterator[Finding]:
    """Check that a tensor is stored in floating point and holds neither NaN nor infinity."""
    if checkpoint.dtype(name) not in FLOAT_CODES:
        yield Finding(name, f"stored as {checkpoint.dtype(name)}, but described as FLOAT")
        return
    try:
        for _ in checkpoint.row_blocks(name, _PIECE_BYTES):
            pass
    except CheckpointError as error:
        yield Finding(name, error.what.removeprefix(f"{name} "))


def check_parts(checkpoint: Checkpoint, module: str, parts: Parts) -> list[Finding]:
    """Check the dtypes and shapes of a quantized layer's tensors, from the headers alone.

    Args:
        checkpoint: the opened folder.
        module: the layer, for example `model.layers.0.mlp.up_proj`.
        parts: what they must be; all are there.
    """
    found = []
    for part, (codes, shapes) in parts.items():
        name = f"{module}.{part}"
        if (stored := checkpoint.dtype(name)) not in codes:
            wanted = "a floating-point dtype" if codes == FLOAT_CODES else " or ".join(sorted(codes))
            bits = ", the form of float32 bits" if part == "deq_scale" and stored == "I64" else ""
            found.append(Finding(name, f"stored as {stored}{bits}, {wanted} is expected"))
        if checkpoint.shape(name) not in shapes:
            wanted = " or ".join(str(list(shape)) for shape in shapes)
            found.append(Finding(name, f"has shape {list(checkpoint.shape(name))}, {wanted} is expected"))
    return found


def layer_shape(checkpoint: Checkpoint, module: str, parts: Iterable[str]) -> tuple[int, int] | list[Finding]:
    """The shape `(N, K)` of a quantized layer, or what keeps it from having one.

    Args:
        checkpoint: the opened folder.
        module: the layer.
        parts: the tensors that it consists of.
    """
    missing = [f"{module}.{part}" for part in parts if f"{module}.{part}" not in checkpoint]
    if missing:
        return [Finding(name, "missing from a quantized layer") for name in missing]
    shape = checkpoint.shape(f"{module}.weight")
    if len(shape) != 2:
        return [Finding(f"{module}.weight", f"has shape {list(shape)}, a matrix [N, K] is expected")]
    return shape[0], shape[1]


def check_positive(checkpoint: Checkpoint, name: str) -> Iterator[Finding]:
    """Check that a tensor of scales in floating point is positive and finite."""
    if not all_positive(checkpoint.raw(name).astype(np.float32)):
        yield Finding(name, "holds a scale that is not positive and finite")
