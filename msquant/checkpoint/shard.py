"""One safetensors file: its header checked against its size, its tensors read one at a time.

The layout (https://github.com/huggingface/safetensors#format): 8 bytes, the header's length as a
little-endian integer; the header, JSON; the data. Tensors are read into memory of their own and not through a
memory map, of which every page that was touched would stay resident as long as the map does.
"""

import hashlib
import math
import os
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from msquant.checkpoint.disk import shown_sizes
from msquant.checkpoint.json_file import decode_json
from msquant.checkpoint.regular_file import open_regular
from msquant.errors import CheckpointError

DTYPES: dict[str, DTypeLike] = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
}
"""NumPy's type of each safetensors dtype."""

_ITEM_SIZES = {code: np.dtype(dtype).itemsize for code, dtype in DTYPES.items()}

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""

MAX_TENSORS = 250_000
"""Of one file: a model of 61 layers with 256 experts has 92,000 in all of its files."""

MAX_DIMENSIONS = 32
"""What NumPy takes."""

MAX_TENSOR_BYTES = 2**62
"""Of one tensor, its empty dimensions left out: NumPy counts in 64 bits even where nothing is stored."""

MAX_NAME_LENGTH = 1_000
"""Characters of a tensor's name."""

_DOWNLOAD_AGAIN = "copy or download this file again"


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies in its file.

    Attributes:
        dtype: safetensors name, for example `BF16`.
        shape: sizes, outermost first; empty for a scalar.
        offset: bytes from the start of the file.
        nbytes: bytes it takes.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Shard:
    """One safetensors file, opened only while a tensor is read.

    Attributes:
        path: the file.
        entries: the tensors it holds, in the order of the header.
        size: bytes of the file.
        state: what tells without reading it that it is still the same: its size, inode and times of change.
        header_sha256: of the header, in hexadecimal.
    """

    def __init__(
        self, path: Path, entries: dict[str, TensorEntry], status: os.stat_result, header_sha256: str
    ) -> None:
        self.path = path
        self.entries = entries
        self.size = status.st_size
        self.header_sha256 = header_sha256
        self.state = {
            "size": status.st_size,
            "mtime_ns": status.st_mtime_ns,
            "ctime_ns": status.st_ctime_ns,
            "inode": status.st_ino,
        }

    @classmethod
    def open(cls, path: Path) -> "Shard":
        """Read and check the header.

        Raises:
            CheckpointError: the file is missing, shorter or longer than its header says, or damaged.
        """
        try:
            with open_regular(path) as file:
                status = os.fstat(file.fileno())
                found = status.st_size
                if found < 8:
                    raise _truncated(path, found, 8, "at least ")
                length = int.from_bytes(file.read(8), "little")
                if length > MAX_HEADER_BYTES:
                    raise CheckpointError(
                        f"not a safetensors file: its header would be {length} bytes long, "
                        f"at most {MAX_HEADER_BYTES} are read",
                        where=path,
                        remedy=_DOWNLOAD_AGAIN,
                    )
                if found < 8 + length:
                    raise _truncated(path, found, 8 + length, "at least ")
                header = file.read(length)
        except FileNotFoundError:
            raise CheckpointError("the shard is missing", where=path, remedy=_DOWNLOAD_AGAIN) from None
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from error
        entries = _parse_header(path, header)
        expected = max((entry.offset + entry.nbytes for entry in entries.values()), default=8 + length)
        if found != expected:
            raise _truncated(path, found, expected)
        return cls(path, entries, status, hashlib.sha256(header).hexdigest())

    def read(self, name: str) -> NDArray[Any]:
        """Return one tensor in the dtype it is stored in, in memory of its own.

        Raises:
            CheckpointError: the file has no such tensor, cannot be read any more, or was changed.
        """
        with self.reading(name) as read:
            entry = self.entries[name]
            array = np.empty(entry.shape, dtype=DTYPES[entry.dtype])
            read(0, array)
        return array

    def row_blocks(self, name: str, max_bytes: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """Read one tensor in the dtype it is stored in by blocks of rows, in order.

        Args:
            name: the tensor.
            max_bytes: of a block; a single row may be larger.

        Returns:
            Pairs of a block's first row and its rows `[n, ...]`; a scalar is one row `[1]`.

        Raises:
            CheckpointError: as `read`, when the block is read.
        """
        entry = self.entries[name]
        rows = entry.shape[0] if entry.shape else 1
        row_bytes = entry.nbytes // max(1, rows)
        step = max(1, max_bytes // max(1, row_bytes))
        with self.reading(name) as read:
            for start in range(0, rows, step):
                count = min(step, rows - start)
                block = np.empty((count, *entry.shape[1:]), DTYPES[entry.dtype])
                read(start * row_bytes, block)
                yield start, block

    @contextmanager
    def reading(self, name: str) -> Iterator[Callable[[int, NDArray[Any]], None]]:
        """Open the file to read parts of one tensor.

        Returns:
            `read(start, array)`, which fills a contiguous array from byte `start` of the tensor on; it may be
            called by several threads at once.

        Raises:
            CheckpointError: as `read`.
        """
        if name not in self.entries:
            raise CheckpointError(f"has no tensor {name}", where=self.path)
        entry = self.entries[name]

        def read(start: int, array: NDArray[Any]) -> None:
            view = array.reshape(-1).view(np.uint8).data
            position = entry.offset + start
            done = 0
            while done < len(view):
                count = os.preadv(descriptor, [view[done:]], position + done)
                if not count:
                    raise _truncated(self.path, position + done, self.size)
                done += count

        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                self._check_unchanged(os.fstat(descriptor))
                yield read
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(f"cannot read {name}: {error.strerror}", where=self.path) from error

    def _check_unchanged(self, status: os.stat_result) -> None:
        if status.st_size != self.size:
            raise _truncated(self.path, status.st_size, self.size)
        # Its ctime changes with its rights and its links, too.
        if (status.st_mtime_ns, status.st_ino) != (self.state["mtime_ns"], self.state["inode"]):
            raise CheckpointError(
                "the file was written to since it was opened, or replaced",
                where=self.path,
                remedy="let nothing change the model while it is read, then run the same command again",
            )


def _truncated(path: Path, found: int, expected: int, least: str = "") -> CheckpointError:
    here, whole = shown_sizes(found, expected)
    return CheckpointError(
        f"{here} found, {least}{whole} expected: the file is truncated or damaged",
        where=path,
        remedy=_DOWNLOAD_AGAIN,
    )


def _parse_header(path: Path, header: bytes) -> dict[str, TensorEntry]:
    try:
        value = decode_json(header, max_bytes=MAX_HEADER_BYTES, unique_keys=True)
        if not isinstance(value, dict):
            raise ValueError("it is not a JSON object")
        value.pop("__metadata__", None)
        if len(value) > MAX_TENSORS:
            raise ValueError(f"it lists {len(value)} tensors, at most {MAX_TENSORS} are read")
        start = 8 + len(header)
        entries = {name: _parse_entry(name, raw, start) for name, raw in value.items()}
        end = start
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
            if entry.offset != end:
                raise ValueError(
                    f"{name} starts at byte {entry.offset} where the tensor before it ends at {end}"
                )
            end += entry.nbytes
    except ValueError as error:
        raise CheckpointError(
            f"the safetensors header is damaged: {error}", where=path, remedy=_DOWNLOAD_AGAIN
        ) from error
    return entries


def _parse_entry(name: str, raw: Any, start: int) -> TensorEntry:
    if len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"a tensor's name has {len(name)} characters, at most {MAX_NAME_LENGTH} are read")
    if not isinstance(raw, dict):
        raise ValueError(f"{name} is not described by an object")
    dtype = raw.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{name} has the unknown dtype {reprlib.repr(dtype)}")
    shape, offsets = _sizes(raw.get("shape")), _sizes(raw.get("data_offsets"))
    if shape is None or offsets is None or len(offsets) != 2:
        raise ValueError(
            f"{name} has shape {reprlib.repr(raw.get('shape'))} "
            f"and data_offsets {reprlib.repr(raw.get('data_offsets'))}"
        )
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name} has {len(shape)} dimensions, at most {MAX_DIMENSIONS} are read")
    if math.prod(filter(None, shape)) * _ITEM_SIZES[dtype] > MAX_TENSOR_BYTES:
        raise ValueError(
            f"{name} has shape {reprlib.repr(shape)}, at most {MAX_TENSOR_BYTES} bytes are read of a tensor"
        )
    nbytes = math.prod(shape) * _ITEM_SIZES[dtype]
    if offsets[1] - offsets[0] != nbytes:
        raise ValueError(f"{name} takes {nbytes} bytes as {dtype} {shape}, but data_offsets are {offsets}")
    return TensorEntry(dtype, tuple(shape), start + offsets[0], nbytes)


def _sizes(value: Any) -> list[int] | None:
    if isinstance(value, list) and all(type(size) is int and size >= 0 for size in value):
        return value
    return None
