"""A stored tensor as rows of float32, read and converted a chunk at a time."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.fp8 import FP8, BlockScale, dequantize
from msquant.checkpoint.shard import DTYPES, Shard
from msquant.errors import CheckpointError

# The exponents alone are what DeepSeek-V3.1 and later keep scales of FP8 blocks in (`scale_fmt: ue8m0`).
FLOAT_DTYPES = frozenset({"F16", "BF16", "F32", "F64", "F8_E8M0", FP8})
"""What is read as floating point."""

# A chunk and its float32 values stay in a core's cache.
_CHUNK_BYTES = 1 << 20
_THREADS = 2


def check_dtype(name: str, dtype: str, where: Path) -> None:
    """Check that a tensor is stored in a dtype that `FloatRows` reads; `where` is its file.

    Raises:
        CheckpointError: it is not.
    """
    if dtype not in FLOAT_DTYPES:
        raise CheckpointError(
            f"{name} is stored as {dtype}, a floating-point tensor is expected",
            where=where,
            remedy="start from the unquantized checkpoint (bfloat16, float16, float32 or FP8 in blocks)",
        )


class FloatRows:
    """A floating-point or FP8 tensor; nothing of it is in memory but what is asked for and a few chunks.

    Args:
        shard: the file that holds it.
        name: its name.
        scale: of an FP8 matrix.
        flat: take a tensor `[E, N, K]` for a matrix of `E N` rows.

    Attributes:
        count: the number of rows; a scalar is one row.
    """

    def __init__(
        self, shard: Shard, name: str, scale: BlockScale | None = None, *, flat: bool = False
    ) -> None:
        entry = shard.entries[name]
        self._shard = shard
        self._name = name
        self._scale = scale
        self._dtype = np.dtype(np.uint8 if scale else DTYPES[entry.dtype])
        self._shape = entry.shape[-1:] if flat else entry.shape[1:]
        self.count = math.prod(entry.shape[: -1 if flat else 1])
        self._row_bytes = math.prod(self._shape) * self._dtype.itemsize

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start` to `stop`, `[stop - start, ...]`.

        Raises:
            CheckpointError: the shard is damaged or was changed since it was opened, or NaN or infinity is
                among the values.
        """
        return self._read([(start, stop)])

    def take(self, indices: NDArray[np.integer]) -> NDArray[np.float32]:
        """Rows by number, in any order and also repeated, `[*indices.shape, ...]`; each is read once.

        Raises:
            CheckpointError: as `read`, or there is no row of such a number.
        """
        indices = np.asarray(indices)
        if not indices.size:
            return np.empty(indices.shape + self._shape, np.float32)
        unique, places = np.unique(indices, return_inverse=True)
        if unique[0] < 0 or unique[-1] >= self.count:
            wrong = unique[0] if unique[0] < 0 else unique[-1]
            raise CheckpointError(
                f"row {wrong} of {self._name} is asked for, which has {self.count} rows",
                where=self._shard.path,
                remedy="use the tokenizer that belongs to these weights",
            )
        runs = np.split(unique, np.flatnonzero(np.diff(unique) != 1) + 1)
        rows = self._read([(int(run[0]), int(run[-1]) + 1) for run in runs])
        return rows[places.reshape(indices.shape)]

    def blocks(self, max_bytes: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """All rows in order, `(first row, rows)`; a block takes at most `max_bytes`, or is a single row.

        Raises:
            CheckpointError: as `read`.
        """
        step = max(1, max_bytes // max(1, 4 * math.prod(self._shape)))
        for start in range(0, self.count, step):
            yield start, self.read(start, min(start + step, self.count))

    def stream(
        self, start: int, stop: int, max_bytes: int, step: int = 1
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Rows `start`, `start + step`, ... before `stop`, in order, in one thread and one piece of memory.

        Args:
            start: the first row.
            stop: behind the last one.
            max_bytes: of a block, which may be a single row.
            step: from one row to the next.

        Returns:
            Pairs of the place of a block's first row among these, and its rows, float32 `[n, ...]`, which the
            next block overwrites. Values are not checked: NaN and infinity may be among them.

        Raises:
            CheckpointError: the shard is damaged or was changed since it was opened; an FP8 code is NaN.
        """
        size = math.prod(self._shape)
        if self._scale is None:
            floats = np.empty((0, *self._shape), np.float32)
            for place, stored in self.stored(start, stop, max_bytes // 4 * self._dtype.itemsize, step):
                if len(floats) < len(stored):
                    floats = np.empty(stored.shape, np.float32)
                with np.errstate(over="ignore"):
                    np.copyto(floats[: len(stored)], stored, casting="unsafe")
                yield place, floats[: len(stored)]
            return
        most, border = max(1, max_bytes // max(1, 4 * size)), self._scale.block[0]
        raw, floats = np.empty((most, *self._shape), self._dtype), np.empty((most, *self._shape), np.float32)
        place = 0
        with self._shard.reading(self._name) as read:
            while start < stop:
                end = min(start + most, stop, (start // border + 1) * border)
                codes, out = raw[: end - start], floats[: end - start]
                read(start * self._row_bytes, codes)
                if bad := dequantize(codes, self._scale.of_row(start, self._shape[0]), out):
                    raise refuse_values(self._name, bad, out.size, self._shard.path)
                yield place, out
                place += len(out)
                start = end

    def stored(
        self, start: int, stop: int, max_bytes: int, step: int = 1
    ) -> Iterator[tuple[int, NDArray[Any]]]:
        """As `stream`, in the dtype that they are stored in; codes of FP8 are uint8.

        Args:
            start: the first row.
            stop: behind the last one.
            max_bytes: of a block as it is read, the rows between the wanted ones included.
            step: from one row to the next.
        """
        most = max(1, max_bytes // max(1, self._row_bytes * step)) * step
        raw = np.empty((min(most, max(0, stop - start)), *self._shape), self._dtype)
        wanted = raw if step == 1 else np.empty((-(-len(raw) // step), *self._shape), self._dtype)
        place = 0
        with self._shard.reading(self._name) as read:
            while start < stop:
                rows = raw[: min(most, stop - start)]
                read(start * self._row_bytes, rows)
                start += len(rows)
                if step > 1:
                    chosen = rows[::step]
                    rows = wanted[: len(chosen)]
                    np.copyto(rows, chosen)
                yield place, rows
                place += len(rows)

    def codes(self, max_bytes: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float32]]]:
        """The codes of an FP8 matrix by blocks of rows, in order, in one piece of memory.

        Args:
            max_bytes: of a block, which may be a single row.

        Returns:
            Pairs of the codes `[n, K]` of a block, which the next one overwrites, and the scales of the runs
            of columns that each of its rows is made of, `[n, ceil(K / bk)]`.

        Raises:
            CheckpointError: the shard is damaged or was changed since it was opened.
        """
        assert self._scale is not None
        for start, block in self.stored(0, self.count, max_bytes):
            numbers = np.arange(start, start + len(block)) // self._scale.block[0]
            yield block, self._scale.values[numbers]

    @property
    def has_even_blocks(self) -> bool:
        """Whether it is an FP8 matrix whose blocks all have the same number of columns."""
        return self._scale is not None and self._shape[0] % self._scale.block[1] == 0

    def _read(self, ranges: Sequence[tuple[int, int]]) -> NDArray[np.float32]:
        count = sum(stop - start for start, stop in ranges)
        out = np.empty((count, *self._shape), np.float32)
        with self._shard.reading(self._name) as read:

            def fill(chunk: tuple[int, int, int]) -> int:
                start, stop, place = chunk
                target = out[place : place + stop - start]
                stored: NDArray[Any] = (
                    target if self._dtype == np.float32 else np.empty(target.shape, self._dtype)
                )
                read(start * self._row_bytes, stored)
                if self._scale is not None:
                    return dequantize(stored, self._scale.of_row(start, self._shape[0]), target)
                return to_float(stored, target)

            chunks = list(self._chunks(ranges))
            if out.size <= _CHUNK_BYTES:
                bad = sum(map(fill, chunks))
            else:
                with ThreadPoolExecutor(_THREADS) as pool:
                    bad = sum(pool.map(fill, chunks))
        if bad:
            raise refuse_values(self._name, bad, out.size, self._shard.path)
        return out

    def _chunks(self, ranges: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
        """First row, last row and place in the result, none across the border of two blocks of scales."""
        step = max(1, _CHUNK_BYTES // max(1, self._row_bytes))
        border = self._scale.block[0] if self._scale else None
        place = 0
        for start, last in ranges:
            while start < last:
                stop = min(last, start + step)
                if border is not None:
                    stop = min(stop, (start // border + 1) * border)
                yield start, stop, place
                place += stop - start
                start = stop


def refuse_values(name: str, bad: int, size: int, where: Path) -> CheckpointError:
    """The error for a tensor with so many of `size` values that are not finite; `where` is its file."""
    return CheckpointError(
        f"{name} holds NaN or infinity in {bad} of {size} places",
        where=where,
        remedy="download this shard again; if the published file holds them too, it cannot be used",
    )


def require_finite(name: str, values: NDArray[Any], where: Path) -> None:
    """Raise CheckpointError if NaN or infinity is among values of a tensor; `where` is its file."""
    if bad := to_float(values, np.empty(values.shape, np.float32)):
        raise refuse_values(name, bad, values.size, where)


def to_float(stored: NDArray[Any], out: NDArray[np.float32]) -> int:
    """Write stored values into `out` as float32; returns how many of them are not finite."""
    if stored is not out:
        with np.errstate(over="ignore"):
            np.copyto(out, stored, casting="unsafe")
    # A maximum is NaN where any value is.
    if not out.size or (math.isfinite(out.max()) and math.isfinite(out.min())):
        return 0
    return out.size - int(np.count_nonzero(np.isfinite(out)))
