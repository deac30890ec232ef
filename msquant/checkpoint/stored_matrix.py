"""The matrix of one linear layer as it lies in a source: a tensor of its own, or a part of a fused one."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.float_rows import FloatRows
from msquant.checkpoint.mxfp4 import decode, scales_of
from msquant.checkpoint.shard import DTYPES
from msquant.errors import CheckpointError

# Of a fused tensor whose outputs lie side by side, so many are turned into rows at a time.
_OUTPUTS = 64
_CHECKED_BYTES = 64 << 20


@dataclass(frozen=True)
class StoredMatrix:
    """A weight `[N, K]`, N output and K input channels, and where it lies.

    Attributes:
        tensor: the name of the tensor that holds it.
        shape: `(N, K)`.
        expert: its place along the first dimension of a tensor `[E, ...]`; None for a matrix of its own.
        first: the place of its first output channel among those of the expert.
        step: from one of its output channels to the next.
        transposed: whether the expert is stored `[K, outputs]` and not `[outputs, K]`.
        packed: whether the tensor holds MXFP4's codes, and another one beside it the scales.
    """

    tensor: str
    shape: tuple[int, int]
    expert: int | None = None
    first: int = 0
    step: int = 1
    transposed: bool = False
    packed: bool = False

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors that it is read from, but for the scales of FP8 blocks."""
        return (self.tensor, scales_of(self.tensor)) if self.packed else (self.tensor,)

    def blocks(self, source: Checkpoint, max_bytes: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Read it by blocks of output channels, in order.

        Args:
            source: holds the tensor.
            max_bytes: of a block in float32; a single row may be larger. One transposed expert, or one in
                MXFP4, is in memory as it is stored.

        Returns:
            Pairs of a block's first row and its rows, float32 `[n, K]`, which the next block may overwrite.
            NaN and infinity may be among them: `require_finite` says where.

        Raises:
            CheckpointError: as `Checkpoint.tensor`, when the block is read.
        """
        if self.packed:
            yield from self._decoded(source, max_bytes)
            return
        if not self.transposed:
            yield from self._stream(source, max_bytes)
            return
        for start, turned in self._turned(source):
            with np.errstate(over="ignore"):
                block = turned.astype(np.float32)
            yield start, block

    def bfloat16_codes(
        self, source: Checkpoint, max_bytes: int
    ) -> Iterator[tuple[int, NDArray[np.uint16]]] | None:
        """As `blocks`, the codes of bfloat16 as they are stored, at most `max_bytes` of them in a block.

        Returns:
            None for a weight in another dtype.
        """
        if source.dtype(self.tensor) != "BF16":
            return None
        stored = self._turned(source) if self.transposed else self._stored(source, max_bytes)
        return ((start, block.view(np.uint16)) for start, block in stored)

    def require_finite(self, source: Checkpoint) -> None:
        """Raise CheckpointError, with where they are, if the tensor holds NaN or infinity."""
        if self.packed:
            for start, block in self.blocks(source, _CHECKED_BYTES):
                bad = np.argwhere(~np.isfinite(block))
                if len(bad):
                    row, column = bad[0].tolist()
                    place = f"expert {self.expert}, output {start + row}, input {column}"
                    raise CheckpointError(
                        f"{scales_of(self.tensor)} holds NaN, or more than float32 holds, at {place}",
                        where=source.shard_path(self.tensor),
                        remedy="download this shard again; if the published file holds it too, it cannot be "
                        "used",
                    )
            return
        for _ in source.row_blocks(self.tensor, _CHECKED_BYTES):
            pass

    def bias(self, source: Checkpoint, name: str) -> NDArray[np.float32]:
        """Its bias, float32 `[N]`, from a tensor `[N]`, or `[E, outputs]` beside a fused one.

        Raises:
            CheckpointError: as `Checkpoint.tensor`.
        """
        if self.expert is None:
            return source.tensor(name)
        whole = source.rows(name, np.array([self.expert]))[0]
        return np.ascontiguousarray(whole[self._outputs])

    @property
    def _outputs(self) -> slice:
        return slice(self.first, self.first + (self.shape[0] - 1) * self.step + 1, self.step)

    def _stream(self, source: Checkpoint, max_bytes: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        rows = self._float_rows(source)
        return rows.stream(*self._range(source), max_bytes, self.step)

    def _stored(self, source: Checkpoint, max_bytes: int) -> Iterator[tuple[int, NDArray[Any]]]:
        rows = self._float_rows(source)
        return rows.stored(*self._range(source), max_bytes, self.step)

    def _float_rows(self, source: Checkpoint) -> FloatRows:
        if self.expert is None:
            return source.float_rows(self.tensor)
        return FloatRows(source.shards[source.weight_map[self.tensor]], self.tensor, flat=True)

    def _range(self, source: Checkpoint) -> tuple[int, int]:
        """Its first row, and the one behind its last, among all rows of the tensor."""
        begin = (self.expert or 0) * source.shape(self.tensor)[1] + self.first
        return begin, begin + (self.shape[0] - 1) * self.step + 1

    def _turned(self, source: Checkpoint) -> Iterator[tuple[int, NDArray[Any]]]:
        """The rows of a transposed expert, in the dtype that it is stored in."""
        outputs = self._expert(source, self.tensor)[:, self._outputs]
        for start in range(0, self.shape[0], _OUTPUTS):
            yield start, np.ascontiguousarray(outputs[:, start : start + _OUTPUTS].T)

    def _decoded(self, source: Checkpoint, max_bytes: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        codes, scales = (self._expert(source, tensor)[self._outputs] for tensor in self.tensors)
        step = max(1, max_bytes // (4 * self.shape[1]))
        for start in range(0, self.shape[0], step):
            yield start, decode(codes[start : start + step], scales[start : start + step])

    def _expert(self, source: Checkpoint, tensor: str) -> NDArray[Any]:
        """The expert's part of a tensor, as it is stored."""
        shard = source.shards[source.weight_map[tensor]]
        entry = shard.entries[tensor]
        stored: NDArray[Any] = np.empty(entry.shape[1:], DTYPES[entry.dtype])
        with shard.reading(tensor) as read:
            read((self.expert or 0) * stored.nbytes, stored)
        return stored
