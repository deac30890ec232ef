"""What the tensors themselves must be for vLLM-MindSpore's golden-stick layers: dtypes, shapes and values."""

from collections.abc import Iterator, Mapping

import numpy as np

from msquant.checkpoint.reader import Checkpoint
from msquant.errors import CheckpointError
from msquant.formats.dtypes import DTYPE_CODES
from msquant.formats.format import Finding
from msquant.formats.golden_stick_layout import DYNAMIC_PARTS, QUANTIZED_PARTS, quantized_bias
from msquant.formats.golden_stick_schemes import FLOAT, W8A8_DYNAMIC, Variant, fused_groups

_FLOAT_CODES = set(DTYPE_CODES.values())

# Bytes of a floating-point tensor that are looked at in one piece: embeddings are never in memory whole.
_PIECE_BYTES = 2**26


def check_tensors(
    checkpoint: Checkpoint, description: Mapping[str, str], dtype: str | None, variant: Variant = "native"
) -> Iterator[Finding]:
    """Check every stored tensor, reading one layer at a time.

    Args:
        checkpoint: the opened folder.
        description: `W8A8`, `W8A8_DYNAMIC` or `FLOAT` by tensor name.
        dtype: the model's, from config.json; None if that does not say.
        variant: the backend the folder is for.
    """
    quantized = {name.rpartition(".")[0]: value for name, value in description.items() if value != FLOAT}
    for name in checkpoint.names():
        if name.rpartition(".")[0] not in quantized:
            yield from _check_float(checkpoint, name)
    for module, value in sorted(quantized.items()):
        yield from check_layout(checkpoint, module, dtype, value) or _check_values(checkpoint, module, value)
    for group in fused_groups((name.rpartition(".")[0] for name in checkpoint.names()), variant):
        yield from _check_fused(checkpoint, group)


def _check_float(checkpoint: Checkpoint, name: str) -> Iterator[Finding]:
    if checkpoint.dtype(name) not in _FLOAT_CODES:
        yield Finding(name, f"stored as {checkpoint.dtype(name)}, but described as FLOAT")
        return
    try:
        for _ in checkpoint.row_blocks(name, _PIECE_BYTES):
            pass
    except CheckpointError as error:
        yield Finding(name, error.what.removeprefix(f"{name} "))


def check_layout(
    checkpoint: Checkpoint, module: str, dtype: str | None = None, scheme: str = "W8A8"
) -> list[Finding]:
    """Check the names, dtypes and shapes of a quantized layer's tensors, from the headers alone.

    Args:
        checkpoint: the opened folder.
        module: the layer, for example `model.layers.0.mlp.up_proj`.
        dtype: the model's; None accepts any floating-point dtype where the model's belongs.
        scheme: `W8A8` or `W8A8_DYNAMIC`.
    """
    dynamic = scheme == W8A8_DYNAMIC
    parts = DYNAMIC_PARTS if dynamic else QUANTIZED_PARTS
    missing = [f"{module}.{part}" for part in parts if f"{module}.{part}" not in checkpoint]
    if missing:
        return [Finding(name, f"missing from a {scheme} layer") for name in missing]
    weight_shape = checkpoint.shape(f"{module}.weight")
    if len(weight_shape) != 2:
        return [Finding(f"{module}.weight", f"has shape {list(weight_shape)}, a matrix [N, K] is expected")]
    code = DTYPE_CODES.get(dtype or "")
    rows, columns = weight_shape[:1], weight_shape[1:]
    expected: dict[str, tuple[set[str], tuple[int, ...]]] = {"weight": ({"I8"}, weight_shape)}
    model_codes = {code} if code else _FLOAT_CODES
    if dynamic:
        # The engine casts the scales, and squeezes [N, 1].
        scale_shape = checkpoint.shape(f"{module}.weight_scale")
        scale_shape = scale_shape if scale_shape == (*rows, 1) else rows
        expected["weight_scale"] = ({"F32", *model_codes}, scale_shape)
        expected["weight_offset"] = ({"F32", *model_codes}, scale_shape)
    else:
        expected["deq_scale"] = ({"F32"}, rows)
        expected["quant_bias"] = ({"I32"}, rows)
        expected["input_scale"] = (model_codes, columns)
        expected["input_offset"] = ({"I8"}, columns)
    if f"{module}.bias" in checkpoint:
        expected["bias"] = (model_codes, rows)
    return [
        finding
        for part, (codes, shape) in expected.items()
        for finding in _check_part(checkpoint, f"{module}.{part}", codes, shape)
    ]


def _check_part(
    checkpoint: Checkpoint, name: str, codes: set[str], shape: tuple[int, ...]
) -> Iterator[Finding]:
    found = checkpoint.dtype(name)
    if name.endswith(".deq_scale") and found == "I64":
        yield Finding(name, "stored as I64, golden-stick's form of float32 bits; F32 is expected")
    elif found not in codes:
        wanted = "a floating-point dtype" if codes == _FLOAT_CODES else " or ".join(sorted(codes))
        yield Finding(name, f"stored as {found}, {wanted} is expected")
    if checkpoint.shape(name) != shape:
        yield Finding(name, f"has shape {list(checkpoint.shape(name))}, {list(shape)} is expected")


def _check_values(checkpoint: Checkpoint, module: str, scheme: str) -> Iterator[Finding]:
    dynamic = scheme == W8A8_DYNAMIC
    for part in ("weight_scale",) if dynamic else ("deq_scale", "input_scale"):
        scales = checkpoint.raw(f"{module}.{part}").astype(np.float32)
        if not (np.isfinite(scales) & (scales > 0)).all():
            yield Finding(f"{module}.{part}", "holds a scale that is not positive and finite")
    if f"{module}.bias" in checkpoint:
        yield from _check_float(checkpoint, f"{module}.bias")
    if dynamic:
        if checkpoint.raw(f"{module}.weight_offset").any():
            yield Finding(
                f"{module}.weight_offset", "is not zero everywhere: the engine takes weights as symmetric"
            )
        return
    weight, offset = checkpoint.raw(f"{module}.weight"), checkpoint.raw(f"{module}.input_offset")
    expected = quantized_bias(module, weight, offset)
    wrong = np.count_nonzero(expected != checkpoint.raw(f"{module}.quant_bias"))
    if wrong:
        yield Finding(
            f"{module}.quant_bias",
            f"differs from -sum(input_offset * weight) in {wrong} of {len(weight)} rows",
        )


def _check_fused(checkpoint: Checkpoint, group: list[str]) -> Iterator[Finding]:
    first = group[0]
    for other in group[1:]:
        # The fused layer has one input_scale and one input_offset: those of the projection loaded last.
        for part in ("input_scale", "input_offset"):
            names = f"{first}.{part}", f"{other}.{part}"
            if all(name in checkpoint for name in names):
                mine, theirs = (checkpoint.raw(name).astype(np.float32) for name in names)
                if not np.array_equal(mine, theirs):
                    yield Finding(names[1], f"differs from {names[0]}: they run as one layer")
        if (f"{first}.bias" in checkpoint) != (f"{other}.bias" in checkpoint):
            yield Finding(
                f"{other}.bias", f"{other} and {first} run as one layer, but one of them has no bias"
            )
