"""How the int8 weights of a folder are spread over their 256 levels, by kind of projection."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.shard import Shard
from msquant.formats.summary import ModuleSummary

LEVELS = np.arange(-128, 128)
SAMPLED_WEIGHTS = 2 * 10**9
"""How many weights are read of a larger folder: far more than a curve needs, in a minute or less."""

_INT8 = "I8"
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Histogram:
    """The weights of all modules of one kind.

    Attributes:
        kind: for example `mlp.experts.*.up_proj`.
        modules: how many there are.
        weights: how many they have.
        counts: of the weights that were read, at each of the levels -128 to 127.
    """

    kind: str
    modules: int
    weights: int
    counts: tuple[int, ...]

    @property
    def read(self) -> int:
        """How many weights were read."""
        return sum(self.counts)

    @property
    def zeros(self) -> float:
        """The part of them that is 0."""
        return self.counts[128] / max(1, self.read)

    @property
    def edges(self) -> float:
        """The part of them at the ends of the range: -128, -127 and 127."""
        return (self.counts[0] + self.counts[1] + self.counts[255]) / max(1, self.read)

    @property
    def bits(self) -> float:
        """Their entropy: of the 8 bits, how many carry information."""
        shares = np.asarray(self.counts, np.float64) / max(1, self.read)
        used = shares[shares > 0]
        return float(-(used * np.log2(used)).sum()) + 0.0


def histograms(
    folder: Path,
    modules: Iterable[ModuleSummary],
    *,
    most: int = SAMPLED_WEIGHTS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Histogram]:
    """Count the int8 weights of a folder.

    Where there are more than `most`, evenly spaced rows of every matrix are read. Memory does not grow with
    the folder.

    Args:
        folder: a checkpoint in any format that stores int8 as int8.
        modules: of its summary; those of other dtypes are passed over.
        most: how many weights to read, give or take a row of each matrix.
        progress: called with the bytes that are read and those to read in all.

    Raises:
        CheckpointError: a shard is damaged or was changed.
    """
    checkpoint = Checkpoint.open(folder)
    quantized = [
        module
        for module in modules
        if module.dtype == _INT8 and len(module.shape) == 2 and f"{module.name}.weight" in checkpoint
    ]
    step = max(1, math.ceil(sum(math.prod(module.shape) for module in quantized) / most))
    total = sum(len(_rows(module, step)) * module.shape[1] for module in quantized)
    counts: dict[str, NDArray[np.int64]] = {module.kind: np.zeros(256, np.int64) for module in quantized}
    matrices: dict[str, list[int]] = defaultdict(list)
    done = 0
    for module in sorted(quantized, key=lambda module: _place(checkpoint, module)):
        name = f"{module.name}.weight"
        shard = checkpoint.shards[checkpoint.weight_map[name]]
        rows = _rows(module, step)
        counts[module.kind] += _count(shard, name, module.shape, rows)
        matrices[module.kind].append(math.prod(module.shape))
        done += len(rows) * module.shape[1]
        progress(done, total)
    return [
        # As bytes, 128 to 255 are the negative levels.
        Histogram(kind, len(matrices[kind]), sum(matrices[kind]), tuple(map(int, np.roll(found, 128))))
        for kind, found in counts.items()
    ]


def _place(checkpoint: Checkpoint, module: ModuleSummary) -> tuple[str, int]:
    """In the order in which they lie on the disk."""
    name = f"{module.name}.weight"
    shard = checkpoint.weight_map[name]
    return shard, checkpoint.shards[shard].entries[name].offset


def _rows(module: ModuleSummary, step: int) -> range:
    """The rows to read: all, or every step-th with the first in the middle of the first step."""
    rows = module.shape[0]
    return range(min(step // 2, max(0, rows - 1)), rows, step)


def _count(shard: Shard, name: str, shape: tuple[int, ...], rows: range) -> NDArray[np.int64]:
    columns = shape[1]
    found = np.zeros(256, np.int64)
    if not rows or not columns:
        return found
    whole = rows.step == 1
    at_once = max(1, _BLOCK_BYTES // columns) if whole else 1
    with shard.reading(name) as read:
        for first in rows[::at_once]:
            block = np.empty((min(at_once, rows.stop - first) if whole else 1) * columns, np.uint8)
            read(first * columns, block)
            found += np.bincount(block, minlength=256)
    return found
