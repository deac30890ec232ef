"""What the tensors themselves must be for vLLM-MindSpore's golden-stick layers: dtypes, shapes and values."""

from collections.abc import Iterator, Mapping

import numpy as np

from msquant.checkpoint.reader import Checkpoint
from msquant.formats.dtypes import DTYPE_CODES
from msquant.formats.format import Finding
from msquant.formats.fused_layers import check_fused_inputs
from msquant.formats.golden_stick_layout import DYNAMIC_PARTS, QUANTIZED_PARTS, quantized_bias
from msquant.formats.golden_stick_schemes import FLOAT, W8A8_DYNAMIC
from msquant.formats.tensor_rules import (
    FLOAT_CODES,
    Parts,
    check_float,
    check_parts,
    check_positive,
    layer_shape,
)

_INT8, _FLOAT32 = frozenset({"I8"}), frozenset({"F32"})


def check_tensors(
    checkpoint: Checkpoint, description: Mapping[str, str], dtype: str | None
) -> Iterator[Finding]:
    """Check every stored tensor, reading one layer at a time.

    Args:
        checkpoint: the opened folder.
        description: `W8A8`, `W8A8_DYNAMIC` or `FLOAT` by tensor name.
        dtype: the model's, from config.json; None if that does not say.
    """
    quantized = {name.rpartition(".")[0]: value for name, value in description.items() if value != FLOAT}
    for name in checkpoint.names():
        if name.rpartition(".")[0] not in quantized:
            yield from check_float(checkpoint, name)
    for module, value in sorted(quantized.items()):
        yield from check_layout(checkpoint, module, dtype, value) or _check_values(checkpoint, module, value)
    # A fused layer has one input_scale and one input_offset: those of the projection loaded last.
    yield from check_fused_inputs(checkpoint, ("input_scale", "input_offset"))


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
    shape = layer_shape(checkpoint, module, DYNAMIC_PARTS if dynamic else QUANTIZED_PARTS)
    if isinstance(shape, list):
        return shape
    rows, columns = shape[:1], shape[1:]
    model_codes = frozenset({DTYPE_CODES[dtype]}) if dtype in DTYPE_CODES else FLOAT_CODES
    expected: Parts = {"weight": (_INT8, (shape,))}
    if dynamic:
        # The engine casts the scales, and squeezes [N, 1].
        for part in ("weight_scale", "weight_offset"):
            expected[part] = (_FLOAT32 | model_codes, (rows, (*rows, 1)))
    else:
        expected["deq_scale"] = (_FLOAT32, (rows,))
        expected["quant_bias"] = (frozenset({"I32"}), (rows,))
        expected["input_scale"] = (model_codes, (columns,))
        expected["input_offset"] = (_INT8, (columns,))
    if f"{module}.bias" in checkpoint:
        expected["bias"] = (model_codes, (rows,))
    return check_parts(checkpoint, module, expected)


def _check_values(checkpoint: Checkpoint, module: str, scheme: str) -> Iterator[Finding]:
    dynamic = scheme == W8A8_DYNAMIC
    for part in ("weight_scale",) if dynamic else ("deq_scale", "input_scale"):
        yield from check_positive(checkpoint, f"{module}.{part}")
    if f"{module}.bias" in checkpoint:
        yield from check_float(checkpoint, f"{module}.bias")
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
