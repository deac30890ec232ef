"""Hidden states between two decoder layers: always on disk, to be continued from, and in memory if they fit.

A file `hidden-00012.f32` holds the float32 batches at boundary 12, one after another, then their shapes and
checksums as JSON, then that JSON's length as 8 bytes, little-endian. Other arrays that go from one process to
another are stored likewise, by a name.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from msquant.checkpoint.disk import writing
from msquant.checkpoint.json_file import MAX_BYTES, decode_json
from msquant.checkpoint.writer import is_temporary, publish, temporary_path
from msquant.errors import StartOverError

_LENGTH_BYTES = 8

Batch = NDArray[np.float32]

Boundary = int | str
"""The number of a boundary between layers; or a name, for other arrays."""


class HiddenStates(Sequence[Batch]):
    """The batches at one boundary, each `[samples, tokens, hidden]`; what is not held is read when asked for.

    Do not change a batch: it may be the one that is held.

    Attributes:
        path: the file.
        shapes: of the batches.
    """

    def __init__(
        self, path: Path, shapes: list[tuple[int, ...]], checksums: list[int], held: list[Batch] | None
    ) -> None:
        self.path = path
        self.shapes = shapes
        self._checksums = checksums
        self._held = held

    @property
    def nbytes(self) -> int:
        """Bytes of all batches."""
        return sum(4 * math.prod(shape) for shape in self.shapes)

    @property
    def is_held(self) -> bool:
        """Whether the batches are in memory."""
        return self._held is not None

    def __len__(self) -> int:
        return len(self.shapes)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> list[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | list[Batch]:
        """A batch, or a list of them.

        Raises:
            StartOverError: the file is gone or damaged.
            IndexError: there is no such batch.
        """
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self._held is not None:
            return self._held[index]
        return self._read(range(len(self))[index])

    def _read(self, index: int) -> Batch:
        batch = np.empty(self.shapes[index], np.float32)
        view = batch.reshape(-1).view(np.uint8).data
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(sum(4 * math.prod(shape) for shape in self.shapes[:index]))
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise _damaged(self.path, "it is truncated")
                    done += count
        except OSError as error:
            raise _damaged(self.path, error.strerror or str(error)) from error
        if zlib.crc32(view) != self._checksums[index]:
            raise _damaged(self.path, f"the checksum of batch {index} does not fit")
        return batch


class HiddenStatesWriter:
    """Takes the batches at one boundary, in order; see `HiddenStateStore.write`."""

    def __init__(self, store: "HiddenStateStore", path: Path, descriptor: int, hold: bool) -> None:
        self._store = store
        self._path = path
        self._descriptor = descriptor
        self._held: list[Batch] | None = [] if hold else None
        self._shapes: list[tuple[int, ...]] = []
        self._checksums: list[int] = []

    def append(self, batch: Batch) -> None:
        """Add a float32 batch `[samples, tokens, hidden]`, which must not be changed afterwards.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        if batch.dtype != np.float32:
            raise TypeError(f"a batch of hidden states is {batch.dtype}, float32 is expected")
        batch = np.ascontiguousarray(batch)
        view = batch.reshape(-1).view(np.uint8).data
        with writing(self._path, len(view)):
            self._put(view)
        self._shapes.append(batch.shape)
        self._checksums.append(zlib.crc32(view))
        if self._held is not None:
            self._held.append(batch)
            if self._store.held_bytes > self._store.budget_bytes:
                self._held = None

    @property
    def held_bytes(self) -> int:
        """Bytes held in memory now."""
        return sum(batch.nbytes for batch in self._held or ())

    def close(self) -> HiddenStates:
        """Write the shapes and checksums; the file is complete."""
        text = json.dumps({"shapes": self._shapes, "crc32": self._checksums}).encode()
        self._put(memoryview(text + len(text).to_bytes(_LENGTH_BYTES, "little")))
        return HiddenStates(self._path, self._shapes, self._checksums, self._held)

    def _put(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += os.write(self._descriptor, view[done:])


class HiddenStateStore:
    """The hidden states of a run in a folder of its own.

    Args:
        folder: made if it does not exist; temporary files of a killed process in it are removed.
        budget_bytes: how many bytes of batches are held in memory, over all boundaries together. A
            boundary is held as a whole or not at all.
        shared: other processes work in the folder too, so temporary files stay.

    Raises:
        OutputError: the folder cannot be written.

    Attributes:
        folder: the folder.
        budget_bytes: as given.
    """

    def __init__(self, folder: Path, budget_bytes: int, *, shared: bool = False) -> None:
        self.folder = folder
        self.budget_bytes = budget_bytes
        self._open: dict[Boundary, HiddenStates] = {}
        self._writers: list[HiddenStatesWriter] = []
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in [] if shared else list(folder.iterdir()):
                if is_temporary(leftover.name):
                    leftover.unlink()

    @property
    def held_bytes(self) -> int:
        """Bytes held in memory now."""
        finished = sum(states.nbytes for states in self._open.values() if states.is_held)
        return finished + sum(writer.held_bytes for writer in self._writers)

    def path(self, boundary: Boundary) -> Path:
        """The file of a boundary."""
        return self.folder / f"{boundary if isinstance(boundary, str) else f'hidden-{boundary:05d}'}.f32"

    @contextmanager
    def write(self, boundary: Boundary, *, hold: bool = True) -> Iterator[HiddenStatesWriter]:
        """Write a boundary anew; it is there, for good, when the block is left without an exception.

        Args:
            boundary: which.
            hold: whether its batches may be held in memory.

        Raises:
            OutputError: the disk is full or cannot be written.
        """
        path = self.path(boundary)
        temporary = temporary_path(path)
        self._open.pop(boundary, None)
        try:
            with writing(path):
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o666)
            writer = HiddenStatesWriter(self, path, descriptor, hold)
            self._writers.append(writer)
            try:
                yield writer
                with writing(path):
                    states = writer.close()
            finally:
                self._writers.remove(writer)
                os.close(descriptor)
            with writing(path):
                publish(temporary, path)
            self._open[boundary] = states
        finally:
            temporary.unlink(missing_ok=True)

    def open(self, boundary: Boundary) -> HiddenStates:
        """The hidden states at a boundary; what this process did not write itself is verified first.

        Raises:
            StartOverError: they are missing or damaged.
        """
        if boundary not in self._open:
            self._open[boundary] = self._load(boundary)
        return self._open[boundary]

    def stream(self, boundary: Boundary) -> HiddenStates:
        """As `open`, to be read once: each batch is read and verified when it is asked for."""
        return HiddenStates(self.path(boundary), *_read_trailer(self.path(boundary)), None)

    def discard(self, boundary: Boundary) -> None:
        """Remove a boundary's file and let go of its batches; nothing happens if there is none."""
        self._open.pop(boundary, None)
        with writing(self.path(boundary)):
            self.path(boundary).unlink(missing_ok=True)

    def release(self) -> None:
        """Let go of all batches that are held; the files stay."""
        self._open.clear()

    def _load(self, boundary: Boundary) -> HiddenStates:
        path = self.path(boundary)
        shapes, checksums = _read_trailer(path)
        states = HiddenStates(path, shapes, checksums, None)
        if self.held_bytes + states.nbytes <= self.budget_bytes:
            return HiddenStates(path, shapes, checksums, list(states))
        for _ in states:
            pass
        return states


def _read_trailer(path: Path) -> tuple[list[tuple[int, ...]], list[int]]:
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _LENGTH_BYTES))
            length = int.from_bytes(file.read(), "little")
            start = size - _LENGTH_BYTES - length
            if start < 0:
                raise ValueError("it is truncated")
            file.seek(start)
            if length > MAX_BYTES:
                raise ValueError(
                    f"its end says that {length} bytes describe it, at most {MAX_BYTES} are read"
                )
            value = decode_json(file.read(length))
        shapes = [tuple(map(int, shape)) for shape in value["shapes"]]
        checksums = [int(checksum) for checksum in value["crc32"]]
        if start != sum(4 * math.prod(shape) for shape in shapes) or len(shapes) != len(checksums):
            raise ValueError("its size does not fit")
    except FileNotFoundError:
        raise StartOverError(
            "the hidden states that the run would continue from are missing", where=path, remedy=_START_OVER
        ) from None
    except OSError as error:
        raise _damaged(path, error.strerror or str(error)) from error
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise _damaged(path, str(error)) from error
    return shapes, checksums


_START_OVER = "start over with --restart"


def _damaged(path: Path, why: str) -> StartOverError:
    return StartOverError(f"the hidden states are damaged: {why}", where=path, remedy=_START_OVER)
