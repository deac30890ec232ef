"""A file on its way: its data in segments, and beside it how far each segment has come."""

import hashlib
import os
import struct
import threading
from pathlib import Path
from typing import Any

from msquant.checkpoint.disk import sync_folder, sync_range
from msquant.hub.listing import Algorithm, RemoteFile

MIN_SEGMENT, MAX_SEGMENT, SEGMENTS = 32 << 20, 512 << 20, 16

# One call to the system cannot be interrupted, and a slow disk writes 32 MB in a fifth of a second.
_SYNC_PIECE = 32 << 20
_NUMBER = struct.Struct("<q")
_DATA, _PROGRESS = ".data", ".progress"


def segment_bytes(size: int) -> int:
    """How large the pieces are that a file of this size is fetched in, by several connections at once."""
    return min(MAX_SEGMENT, max(MIN_SEGMENT, -(-size // SEGMENTS)))


def new_hash(algorithm: Algorithm, size: int) -> Any:
    """A hash of a content of this size; that of a git blob begins with its header."""
    if algorithm == "sha256":
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)


def partial_key(file: RemoteFile) -> str:
    """What a partial file is called: it differs for every name and every content."""
    return hashlib.sha256(f"{file.path}\0{file.digest}\0{file.size}".encode()).hexdigest()[:32]


def allocated_bytes(folder: Path, file: RemoteFile) -> int:
    """Bytes of the disk that the partial file in a folder takes already."""
    try:
        return min(file.size, (folder / (partial_key(file) + _DATA)).stat().st_blocks * 512)
    except OSError:
        return 0


def is_partial(name: str, keys: set[str]) -> bool:
    """Whether a file belongs to one of these partial files."""
    return Path(name).stem in keys and Path(name).suffix in (_DATA, _PROGRESS)


class PartialFile:
    """The data that is here of one file, for one process at a time; the caller locks.

    A segment's progress is written after its data, so it never claims more than a killed process has
    written. What does not fit together, an oversized file for example, is discarded.

    Args:
        folder: where both files are kept.
        file: what they will be.

    Attributes:
        segments: the first byte of each and the one after its last.
        done: how many bytes of each segment are there.
    """

    def __init__(self, folder: Path, file: RemoteFile) -> None:
        key = partial_key(file)
        self.size = file.size
        self.path = folder / (key + _DATA)
        self._progress_path = folder / (key + _PROGRESS)
        self._data = self._progress = -1
        self._split(segment_bytes(self.size))
        self._restore()

    def _split(self, length: int) -> None:
        self._length = max(1, length)
        starts = range(0, self.size, self._length)
        self.segments = [(start, min(start + self._length, self.size)) for start in starts]
        self.done = [0] * len(self.segments)

    def _restore(self) -> None:
        try:
            raw = self._progress_path.read_bytes()
            stored = self.path.lstat().st_size
        except OSError:
            self.discard()
            return
        numbers = [number for (number,) in _NUMBER.iter_unpack(raw[: len(raw) // 8 * 8])]
        if numbers and numbers[0] == self.size:
            self._split(self.size)
        fits = len(raw) == 8 * (1 + len(self.segments)) and numbers[0] == self._length
        done = numbers[1:]
        if (
            not fits
            or stored != self.size
            or any(
                not 0 <= count <= end - start for count, (start, end) in zip(done, self.segments, strict=True)
            )
        ):
            self._split(segment_bytes(self.size))
            self.discard()
            return
        self.done = done

    @property
    def present(self) -> int:
        """Bytes that are there."""
        return sum(self.done)

    @property
    def front(self) -> int:
        """Bytes that are there from the beginning without a gap."""
        for (start, end), count in zip(self.segments, self.done, strict=True):
            if start + count < end:
                return start + count
        return self.size

    def open(self) -> None:
        """Make both files if they are not there; the data has its size, but for holes. Raises OSError."""
        if self._data >= 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._data = os.open(self.path, flags, 0o666)
        os.ftruncate(self._data, self.size)
        self._progress = os.open(self._progress_path, flags, 0o666)
        self._write_progress()

    def _write_progress(self) -> None:
        os.ftruncate(self._progress, 0)
        os.pwrite(self._progress, b"".join(map(_NUMBER.pack, [self._length, *self.done])), 0)

    def write(self, segment: int, piece: bytes) -> int:
        """Add what follows in a segment; returns where in the file that is. Raises OSError."""
        start, _ = self.segments[segment]
        place = offset = start + self.done[segment]
        view = memoryview(piece)
        while view:
            written = os.pwrite(self._data, view, offset)
            offset, view = offset + written, view[written:]
        self.done[segment] = offset - start
        os.pwrite(self._progress, _NUMBER.pack(self.done[segment]), 8 * (1 + segment))
        return place

    def read(self, buffer: bytearray, offset: int) -> int:
        """Fill a buffer with what is there from an offset on; returns how much that was. Raises OSError."""
        return os.preadv(self._data, [buffer], offset)

    def restart(self, *, whole: bool) -> None:
        """Forget the data; `whole` makes it one segment, for a server that ignores ranges. Raises OSError."""
        self._split(self.size if whole or len(self.segments) == 1 else self._length)
        self._write_progress()

    def sync(self, stop: threading.Event) -> bool:
        """Have the data on disk for good; False if `stop` was set on the way. Raises OSError."""
        self.open()
        for start in range(0, self.size, _SYNC_PIECE):
            if stop.is_set():
                return False
            sync_range(self._data, start, _SYNC_PIECE)
        os.fsync(self._data)
        return True

    def publish(self, target: Path) -> os.stat_result:
        """Give the synced file its name; returns its state there. Raises OSError."""
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.path, target)
        state = os.fstat(self._data)
        sync_folder(target.parent)
        self.close()
        self._progress_path.unlink(missing_ok=True)
        return state

    def close(self) -> None:
        """Close the files; they stay."""
        for descriptor in (self._data, self._progress):
            if descriptor >= 0:
                os.close(descriptor)
        self._data = self._progress = -1

    def discard(self) -> None:
        """Close and remove the files. Raises OSError."""
        self.close()
        for path in (self.path, self._progress_path):
            path.unlink(missing_ok=True)
