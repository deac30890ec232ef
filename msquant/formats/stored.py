"""What is read alike in every format: a layer's parts, and its scheme and scales from the tensors alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import CheckpointError
from msquant.formats.folder_rules import Finding
from msquant.schemes import FLOAT, W8A8, W8A8_DYNAMIC, Scheme


@dataclass(frozen=True)
class StoredScales:
    """The scales of a layer; each None where it has none, or none that can be understood.

    Attributes:
        weight: of its rows, float64.
        input: of its input, float64; several where it has one a column.
        offset: the zero point of its input.
        cache: of the keys or values that it makes, float64.
    """

    weight: NDArray[np.float64] | None = None
    input: NDArray[np.float64] | None = None
    offset: int | None = None
    cache: NDArray[np.float64] | None = None


def stored_scheme(checkpoint: Checkpoint, module: str) -> Scheme:
    """The scheme of a layer: weights of a quantized one are int8, and its static input has a scale.

    The tensors of ascend's W8A16 are those of its W8A8_DYNAMIC; its description tells them apart.
    """
    weight = f"{module}.weight"
    if weight not in checkpoint or checkpoint.dtype(weight) != "I8":
        return FLOAT
    return W8A8 if f"{module}.input_scale" in checkpoint else W8A8_DYNAMIC


def stored_scales(checkpoint: Checkpoint, module: str, scheme: Scheme) -> StoredScales:
    """The scales of a layer in a scheme, damaged or not; its weight is not read."""
    cache = None
    if scheme.cache is not None:
        # Of channels, and of a latent state.
        cache = _numbers(checkpoint, f"{module}.kv_cache_scale")
        if cache is None:
            cache = _numbers(checkpoint, f"{module.rpartition('.')[0]}.fa_k.scale")
    if scheme.is_float:
        return StoredScales(cache=cache)
    weight = _numbers(checkpoint, f"{module}.weight_scale")
    if weight is None:
        weight = _numbers(checkpoint, f"{module}.scales")
    second = _numbers(checkpoint, f"{module}.weight_scale_second")
    if weight is not None and second is not None and len(second) % len(weight) == 0:
        # ascend's of groups are products with those of rows.
        weight = second * weight.repeat(len(second) // len(weight))
    if not scheme.is_static:
        return StoredScales(weight, cache=cache)
    scale = _numbers(checkpoint, f"{module}.input_scale")
    if weight is None and scale is not None and (scale > 0).all():
        deq_scale = _numbers(checkpoint, f"{module}.deq_scale")
        weight = None if deq_scale is None else deq_scale / scale.max()
    offset = None
    for part in ("input_offset", "input_zero_point"):
        values = _numbers(checkpoint, f"{module}.{part}")
        if values is not None and (values == values[0]).all() and float(values[0]).is_integer():
            offset = int(values[0])
    if weight is None:
        return StoredScales(cache=cache)
    return StoredScales(weight, scale, offset, cache)


def _numbers(checkpoint: Checkpoint, name: str) -> NDArray[np.float64] | None:
    if name not in checkpoint:
        return None
    values = checkpoint.raw(name).reshape(-1)
    if values.dtype in (np.int64, np.uint64):
        # float32 numbers by their bits, as NPUs take them.
        values = values.astype(np.uint32).view(np.float32)
    return values.astype(np.float64) if values.size else None


class FolderSource:
    """A folder's floating-point tensors, and the stored parts of its quantized layers.

    Attributes:
        checkpoint: its tensors.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def __contains__(self, name: str) -> bool:
        return name in self.checkpoint

    def tensor(self, name: str) -> NDArray[np.float32]:
        """Return a floating-point tensor as float32. Raises CheckpointError as `Checkpoint.tensor`."""
        return self.checkpoint.tensor(name)

    def rows(self, name: str, indices: NDArray[np.integer[Any]]) -> NDArray[np.float32]:
        """Return some rows of a floating-point tensor. Raises CheckpointError as `Checkpoint.tensor`."""
        return self.checkpoint.rows(name, indices)

    def parts(
        self, module: str, names: Iterable[str], findings: Sequence[Finding]
    ) -> dict[str, NDArray[Any]]:
        """The stored parts of a quantized layer by full name, with its bias if there is one.

        Args:
            module: the layer.
            names: of the parts.
            findings: what is wrong with them.

        Raises:
            CheckpointError: for the first of the findings, or a part's shard is damaged.
        """
        if findings:
            raise CheckpointError(
                findings[0].problem,
                where=f"{self.checkpoint.folder}, {findings[0].where}",
                remedy=f"see everything that is wrong with it: msquant inspect {self.checkpoint.folder}",
            )
        stored = [f"{module}.{name}" for name in names]
        if (bias := f"{module}.bias") in self.checkpoint:
            stored.append(bias)
        return {name: self.checkpoint.raw(name) for name in stored}
