"""How the integer weights of a folder are spread over their levels, by kind of projection."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.shard import Shard
from msquant.errors import CheckpointError
from msquant.formats.registry import folder_format
from msquant.formats.summary import ModuleSummary
from msquant.schemes import Quant, parse_scheme

SAMPLED_WEIGHTS = 2 * 10**9
"""How many weights are read of a larger folder: far more than a curve needs, in a minute or less."""

_BYTES, _WORDS = "I8", "I32"
"""What integers are stored in: one each byte, or as many as fit into 32 bits, the first in the lowest."""
_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True)
class Histogram:
    """The weights of all modules of one kind that are integers of one width.

    Attributes:
        kind: for example `mlp.experts.*.up_proj`.
        bits: of an integer.
        modules: how many there are.
        weights: how many they have.
        counts: of the weights that were read, at each of the `2^bits` levels from `-2^(bits - 1)` on.
    """

    kind: str
    bits: int
    modules: int
    weights: int
    counts: tuple[int, ...]

    @property
    def read(self) -> int:
        """How many weights were read."""
        return sum(self.counts)

    @property
    def levels(self) -> range:
        """The integers that a weight can be."""
        return range(-len(self.counts) // 2, len(self.counts) // 2)

    @property
    def zeros(self) -> float:
        """The part of them that is 0."""
        return self.counts[len(self.counts) // 2] / max(1, self.read)

    @property
    def edges(self) -> float:
        """The part of them at the ends of the range: for int8 at -128, -127 and 127."""
        return (self.counts[0] + self.counts[1] + self.counts[-1]) / max(1, self.read)

    @property
    def entropy(self) -> float:
        """Of their bits, how many carry information."""
        shares = np.asarray(self.counts, np.float64) / max(1, self.read)
        used = shares[shares > 0]
        return float(-(used * np.log2(used)).sum()) + 0.0


@dataclass(frozen=True)
class _Matrix:
    """A matrix of integers `[N, K]` as it is stored."""

    module: ModuleSummary
    tensor: str
    bits: int

    @property
    def weights(self) -> int:
        return math.prod(self.module.shape)

    @property
    def row_bytes(self) -> int:
        columns = self.module.shape[1]
        return columns if self.module.dtype == _BYTES else 4 * -(-columns * self.bits // 32)

    def rows(self, step: int) -> range:
        """The rows to read: all, or every step-th with the first in the middle of the first step."""
        rows = self.module.shape[0]
        return range(min(step // 2, max(0, rows - 1)), rows, step)

    def count(self, block: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Count the levels in whole rows, from the least one on."""
        half = 1 << (self.bits - 1)
        if self.module.dtype == _BYTES:
            # As bytes, 128 to 255 are the negative levels.
            counts = np.roll(np.bincount(block, minlength=256), 128)
            return counts[128 - half : 128 + half]
        shifts = np.arange(0, 8, self.bits, dtype=np.uint8)
        rows = block.reshape(-1, self.row_bytes, 1) >> shifts & np.uint8(2 * half - 1)
        values = rows.reshape(len(rows), -1)[:, : self.module.shape[1]]
        return np.bincount(values.reshape(-1), minlength=2 * half)


def histograms(
    folder: Path,
    modules: Iterable[ModuleSummary],
    *,
    most: int = SAMPLED_WEIGHTS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Histogram]:
    """Count the integer weights of a folder at each of their levels.

    Where there are more than `most`, evenly spaced rows of every matrix are read. Memory does not grow with
    the folder.

    Args:
        folder: a checkpoint in any format.
        modules: of its summary; those in floating point are passed over.
        most: how many weights to read, give or take a row of each matrix.
        progress: called with the bytes that are read and those to read in all.

    Raises:
        CheckpointError: a shard is damaged or was changed.
    """
    checkpoint = Checkpoint.open(folder)
    matrices = list(_matrices(folder, checkpoint, modules))
    step = max(1, math.ceil(sum(matrix.weights for matrix in matrices) / most))
    total = sum(len(matrix.rows(step)) * matrix.row_bytes for matrix in matrices)
    counts: dict[tuple[str, int], NDArray[np.int64]] = {
        (matrix.module.kind, matrix.bits): np.zeros(1 << matrix.bits, np.int64) for matrix in matrices
    }
    found: dict[tuple[str, int], list[int]] = defaultdict(list)
    done = 0
    for matrix in sorted(matrices, key=lambda matrix: _place(checkpoint, matrix.tensor)):
        key = matrix.module.kind, matrix.bits
        shard = checkpoint.shards[checkpoint.weight_map[matrix.tensor]]
        counts[key] += _count(shard, matrix, matrix.rows(step))
        found[key].append(matrix.weights)
        done += len(matrix.rows(step)) * matrix.row_bytes
        progress(done, total)
    return [
        Histogram(*key, len(found[key]), sum(found[key]), tuple(map(int, levels)))
        for key, levels in counts.items()
    ]


def _matrices(folder: Path, checkpoint: Checkpoint, modules: Iterable[ModuleSummary]) -> Iterator[_Matrix]:
    form = folder_format(folder)
    for module in modules:
        quant = parse_scheme(module.scheme).weights
        if form is None or quant is None or len(module.shape) != 2 or not _is_counted(module, quant):
            continue
        try:
            stored = form.stored(checkpoint, f"{module.name}.weight")
        except CheckpointError:
            # What is wrong with it is among the findings on the folder.
            continue
        if stored is not None:
            yield _Matrix(module, stored.name, quant.bits)


def _is_counted(module: ModuleSummary, quant: Quant) -> bool:
    return module.dtype == _BYTES or (module.dtype == _WORDS and 8 % quant.bits == 0)


def _place(checkpoint: Checkpoint, tensor: str) -> tuple[str, int]:
    """In the order in which they lie on the disk."""
    shard = checkpoint.weight_map[tensor]
    return shard, checkpoint.shards[shard].entries[tensor].offset


def _count(shard: Shard, matrix: _Matrix, rows: range) -> NDArray[np.int64]:
    found, size = np.zeros(1 << matrix.bits, np.int64), matrix.row_bytes
    if not rows or not size:
        return found
    whole = rows.step == 1
    at_once = max(1, _BLOCK_BYTES // size) if whole else 1
    with shard.reading(matrix.tensor) as read:
        for first in rows[::at_once]:
            block = np.empty((min(at_once, rows.stop - first) if whole else 1) * size, np.uint8)
            read(first * size, block)
            found += matrix.count(block)
    return found
