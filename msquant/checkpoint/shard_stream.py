"""A safetensors file written piece by piece: the header first, then tensors in any order."""

import bisect
import json
import os
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.disk import reserve, writing
from msquant.checkpoint.tensor_spec import TensorSpec, dtype_code
from msquant.checkpoint.writer import file_sha256, publish, temporary_path
from msquant.errors import OutputError

# The order of the safetensors library, so that a file has the bytes that the library would write.
_ORDER = (
    *("U64", "I64", "F64"),
    *("F32", "U32", "I32"),
    *("BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
_RANK = {dtype: rank for rank, dtype in enumerate(_ORDER)}
_SHOWN = 3


class ShardStream:
    """One shard, of which no more is in memory than the piece that is being written.

    Use as a context manager: `write` every tensor, whole or by rows, then `finish()`. The file has its name
    only after that; leaving without `finish()` removes it. The same tensors give the same bytes in whatever
    order and pieces they come, and they are the bytes of `write_shard`.

    Args:
        path: the file, replaced if it exists.
        specs: its tensors.

    Raises:
        OutputError: a name occurs twice; on entering, if the disk has no room or cannot be written.

    Attributes:
        path: the file.
        nbytes: its size, with the header.
    """

    def __init__(self, path: Path, specs: Iterable[TensorSpec]) -> None:
        self.path = path
        self._temporary = temporary_path(path)
        self._descriptor: int | None = None
        ordered = sorted(specs, key=lambda spec: (_RANK[spec.dtype], spec.name))
        self._header = _header(ordered)
        self._specs = {spec.name: spec for spec in ordered}
        if len(self._specs) != len(ordered):
            raise OutputError("a tensor is to be written twice", where=path)
        self._offsets: dict[str, int] = {}
        self._missing: dict[str, list[tuple[int, int]]] = {}
        self.nbytes = len(self._header)
        for spec in ordered:
            self._offsets[spec.name] = self.nbytes
            self.nbytes += spec.nbytes
            if spec.nbytes:
                self._missing[spec.name] = [(0, spec.rows)]

    def __enter__(self) -> Self:
        try:
            with writing(self.path, self.nbytes):
                flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
                self._descriptor = os.open(self._temporary, flags, 0o666)
                reserve(self._descriptor, self.nbytes)
                self._put(memoryview(self._header), 0)
        except BaseException:
            self._abandon()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._abandon()

    def write(self, name: str, array: NDArray[Any], start_row: int = 0) -> None:
        """Write a tensor or some of its rows.

        Args:
            name: one of the specs'.
            array: of the spec's dtype; rows `[n, ...]` of the spec's shape, or all of it.
            start_row: where the rows begin.

        Raises:
            OutputError: there is no such tensor; dtype or shape differ from the spec; rows are written twice;
                the disk is full.
        """
        spec = self._specs.get(name)
        if spec is None:
            raise OutputError(f"{name} is not planned for this shard", where=self.path)
        rows = array.shape[0] if array.shape else 1
        if (
            dtype_code(array.dtype) != spec.dtype
            or array.ndim != len(spec.shape)
            or array.shape[1:] != spec.shape[1:]
            or not 0 <= start_row <= start_row + rows <= spec.rows
        ):
            given = TensorSpec.of(name, array)
            raise OutputError(
                f"{name} is given as {given} from row {start_row} on, but planned as {spec}", where=self.path
            )
        if self._descriptor is None:
            raise OutputError("the shard is not open for writing", where=self.path)
        if not array.nbytes:
            return
        rest = _without(self._missing.get(name, []), start_row, start_row + rows)
        if rest is None:
            raise OutputError(
                f"rows {start_row} to {start_row + rows} of {name} are written twice", where=self.path
            )
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        with writing(self.path, self.nbytes):
            self._put(data, self._offsets[name] + start_row * spec.row_bytes)
        if rest:
            self._missing[name] = rest
        else:
            del self._missing[name]

    def finish(self) -> str:
        """Give the complete file its name.

        Returns:
            sha256 of the file in hexadecimal, taken by reading it back.

        Raises:
            OutputError: tensors are missing, in whole or in part; or the disk cannot be written.
        """
        if self._descriptor is None:
            raise OutputError("the shard is not open for writing", where=self.path)
        if self._missing:
            parts = [
                f"{name} rows {start} to {stop}"
                for name, gaps in list(self._missing.items())[:_SHOWN]
                for start, stop in gaps[:1]
            ]
            more = ", ..." if len(self._missing) > _SHOWN else ""
            raise OutputError(
                f"{len(self._missing)} of {len(self._specs)} tensors are not complete: "
                + ", ".join(parts)
                + more,
                where=self.path,
            )
        with writing(self.path, self.nbytes):
            digest = file_sha256(self._temporary)
            publish(self._temporary, self.path)
        self._abandon()
        return digest

    def _put(self, data: memoryview, offset: int) -> None:
        assert self._descriptor is not None
        done = 0
        while done < len(data):
            done += os.pwrite(self._descriptor, data[done:], offset + done)

    def _abandon(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self._temporary.unlink(missing_ok=True)


def shard_bytes(specs: Iterable[TensorSpec]) -> int:
    """Size of the file that `ShardStream` writes, with its header."""
    ordered = sorted(specs, key=lambda spec: (_RANK[spec.dtype], spec.name))
    return len(_header(ordered)) + sum(spec.nbytes for spec in ordered)


def _header(ordered: Iterable[TensorSpec]) -> bytes:
    # transformers refuses a file without this format.
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in ordered:
        start, end = end, end + spec.nbytes
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (start, end)}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _without(gaps: list[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]] | None:
    """Gaps, sorted, less one range; None if the range does not lie inside one of them."""
    place = bisect.bisect_right(gaps, start, key=lambda gap: gap[0]) - 1
    if place < 0 or gaps[place][1] < stop:
        return None
    low, high = gaps[place]
    kept = [gap for gap in ((low, start), (stop, high)) if gap[0] < gap[1]]
    return [*gaps[:place], *kept, *gaps[place + 1 :]]
