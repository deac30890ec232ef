"""What the tensors themselves must be for vLLM-MindSpore's golden-stick layers: dtypes, shapes and values."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from msquant.checkpoint.reader import Checkpoint
from msquant.errors import CheckpointError
from msquant.formats.golden_stick_layout import QUANTIZED_PARTS, W8A8, quantized_bias

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Projections that the engine runs as one layer."""

_DTYPE_CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_FLOAT_CODES = set(_DTYPE_CODES.values())


@dataclass(frozen=True)
class Finding:
    """One broken rule.

    Attributes:
        where: the tensor, layer or file.
        problem: what is wrong with it.
    """

    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}"


def fused_groups(modules: Iterable[str]) -> Iterator[list[str]]:
    """Of the given layers, those that run as one: q, k and v of one attention, gate and up of one MLP."""
    present = set(modules)
    for parent in sorted({module.rpartition(".")[0] for module in present}):
        for group in FUSED:
            members = [f"{parent}.{name}" for name in group if f"{parent}.{name}" in present]
            if len(members) > 1:
                yield members


def check_tensors(
    checkpoint: Checkpoint, description: dict[str, str], dtype: str | None
) -> Iterator[Finding]:
    """Check every stored tensor, reading one layer at a time.

    Args:
        checkpoint: the opened folder.
        description: `W8A8` or `FLOAT` by tensor name.
        dtype: the model's, from config.json; None if that does not say.
    """
    quantized = {name.rpartition(".")[0] for name, value in description.items() if value == W8A8}
    for name in checkpoint.names():
        if name.rpartition(".")[0] not in quantized:
            yield from _check_float(checkpoint, name)
    for module in sorted(quantized):
        yield from check_layout(checkpoint, module, dtype) or _check_values(checkpoint, module)
    for group in fused_groups(name.rpartition(".")[0] for name in checkpoint.names()):
        yield from _check_fused(checkpoint, group)


def _check_float(checkpoint: Checkpoint, name: str) -> Iterator[Finding]:
    if checkpoint.dtype(name) not in _FLOAT_CODES:
        yield Finding(name, f"stored as {checkpoint.dtype(name)}, but described as FLOAT")
        return
    try:
        checkpoint.tensor(name)
    except CheckpointError as error:
        yield Finding(name, error.what.removeprefix(f"{name} "))


def check_layout(checkpoint: Checkpoint, module: str, dtype: str | None = None) -> list[Finding]:
    """Check the names, dtypes and shapes of a W8A8 layer's tensors, from the headers alone.

    Args:
        checkpoint: the opened folder.
        module: the layer, for example `model.layers.0.mlp.up_proj`.
        dtype: the model's; None accepts any floating-point dtype where the model's belongs.
    """
    missing = [f"{module}.{part}" for part in QUANTIZED_PARTS if f"{module}.{part}" not in checkpoint]
    if missing:
        return [Finding(name, "missing from a W8A8 layer") for name in missing]
    weight_shape = checkpoint.shape(f"{module}.weight")
    if len(weight_shape) != 2:
        return [Finding(f"{module}.weight", f"has shape {list(weight_shape)}, a matrix [N, K] is expected")]
    code = _DTYPE_CODES.get(dtype or "")
    expected: dict[str, tuple[str | None, tuple[int, ...]]] = {
        "weight": ("I8", weight_shape),
        "deq_scale": ("F32", weight_shape[:1]),
        "quant_bias": ("I32", weight_shape[:1]),
        "input_scale": (code, weight_shape[1:]),
        "input_offset": ("I8", weight_shape[1:]),
    }
    if f"{module}.bias" in checkpoint:
        expected["bias"] = (code, weight_shape[:1])
    return [
        finding
        for part, (dtype_code, shape) in expected.items()
        for finding in _check_part(checkpoint, f"{module}.{part}", dtype_code, shape)
    ]


def _check_part(
    checkpoint: Checkpoint, name: str, dtype: str | None, shape: tuple[int, ...]
) -> Iterator[Finding]:
    found = checkpoint.dtype(name)
    if name.endswith(".deq_scale") and found == "I64":
        yield Finding(name, "stored as I64, golden-stick's form of float32 bits; F32 is expected")
    elif found not in ({dtype} if dtype else _FLOAT_CODES):
        yield Finding(name, f"stored as {found}, {dtype or 'a floating-point dtype'} is expected")
    if checkpoint.shape(name) != shape:
        yield Finding(name, f"has shape {list(checkpoint.shape(name))}, {list(shape)} is expected")


def _check_values(checkpoint: Checkpoint, module: str) -> Iterator[Finding]:
    for part in ("deq_scale", "input_scale"):
        scales = checkpoint.raw(f"{module}.{part}").astype(np.float32)
        if not (np.isfinite(scales) & (scales > 0)).all():
            yield Finding(f"{module}.{part}", "holds a scale that is not positive and finite")
    if f"{module}.bias" in checkpoint:
        yield from _check_float(checkpoint, f"{module}.bias")
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
