"""One file on its way, worked on by several threads at once."""

import threading
from pathlib import Path

from msquant.checkpoint.disk import writing
from msquant.hub.listing import RemoteFile
from msquant.hub.partial import PartialFile, new_hash
from msquant.hub.retry import Stopped

HASH_PIECE = 4 << 20
"""Bytes hashed at a time; the interpreter's lock is released meanwhile."""


class Job:
    """A file that is fetched: its segments are written by many threads, and hashed from the beginning by one.

    A job that is started over has another generation; what still works on an earlier one has no effect.
    Methods raise OutputError where the disk fails.

    Args:
        file: what it will be.
        partial: what is here of it.
        target: where it goes when it is verified.

    Attributes:
        generation: how often it was started over.
        attempts: how often its content was wrong.
    """

    def __init__(self, file: RemoteFile, partial: PartialFile, target: Path) -> None:
        self.file = file
        self.partial = partial
        self.target = target
        self.generation = 0
        self.attempts = 0
        self._lock = threading.Lock()
        self._placing = threading.Lock()
        self._closed = False
        self._verified = False
        self._hashing = False
        self._hashed = 0
        self._digest = new_hash(file.algorithm, file.size)

    def unfinished(self) -> list[int]:
        """The segments of which something is missing."""
        segments = zip(self.partial.segments, self.partial.done, strict=True)
        return [number for number, ((start, end), done) in enumerate(segments) if start + done < end]

    def missing_range(self, segment: int, generation: int) -> tuple[int, int] | None:
        """The first missing byte of a segment and the one after its last; None if it is out of date."""
        with self._lock, writing(self.target, self.file.size):
            if self.generation != generation:
                return None
            self.partial.open()
            start, end = self.partial.segments[segment]
            return start + self.partial.done[segment], end

    def write(self, segment: int, generation: int, piece: bytes) -> bool:
        """Add what follows in a segment, and hash it if it is next; False if it is out of date."""
        with self._lock, writing(self.target, self.file.size):
            if self.generation != generation:
                return False
            start = self.partial.write(segment, piece)
            if self._hashing or start != self._hashed:
                return True
            self._hashing, digest = True, self._digest
        digest.update(piece)
        with self._lock:
            self._hashing = False
            if self.generation == generation:
                self._hashed += len(piece)
        return True

    def wants_hashing(self) -> bool:
        """Whether a thread should call `hash` now; the caller of this then has to see to it."""
        with self._lock:
            front = self.partial.front
            if (
                self._verified
                or self._hashing
                or (front - self._hashed < HASH_PIECE and front < self.file.size)
            ):
                return False
            self._hashing = True
            return True

    def hash(self, buffer: bytearray, stop: threading.Event) -> bool | None:
        """Hash what has come, from the page cache.

        Args:
            buffer: to read into.
            stop: ends it early.

        Returns:
            Whether the whole file has the listed digest; None while some of it is missing.
        """
        view = memoryview(buffer)
        while not stop.is_set():
            with self._lock, writing(self.target, self.file.size):
                self.partial.open()
                generation, digest, position = self.generation, self._digest, self._hashed
                front = self.partial.front
                if position == front < self.file.size:
                    self._hashing = False
                    return None
            while position < front and not stop.is_set():
                with writing(self.target):
                    count = min(self.partial.read(buffer, position), front - position)
                digest.update(view[:count])
                position += count
            with self._lock:
                if self.generation != generation:
                    continue
                self._hashed = position
                if position == self.file.size:
                    self._hashing = False
                    self._verified = digest.hexdigest() == self.file.digest
                    return self._verified
        return None

    def publish(self, stop: threading.Event) -> int:
        """Give the verified file its name, for good; returns its modification time. Raises Stopped."""
        with self._lock, writing(self.target, self.file.size):
            if not self.partial.sync(stop):
                raise Stopped
            # Syncing may take longer than a caller waits, and another call may be at the same file by then.
            with self._placing:
                if self._closed:
                    raise Stopped
                return self.partial.publish(self.target).st_mtime_ns

    def start_over(self, generation: int, *, whole: bool, wrong: bool, limit: int) -> int | None:
        """Forget the data.

        Args:
            generation: what the caller has worked on.
            whole: fetch it in one piece from now on, because the server sends no ranges.
            wrong: the content was wrong; after `limit` times the data is discarded for good.
            limit: of wrong contents.

        Returns:
            How many bytes are lost by it; None if it is out of date.
        """
        with self._lock, writing(self.target, self.file.size):
            if self.generation != generation:
                return None
            self.generation += 1
            self.attempts += wrong
            lost = self.partial.present
            self._hashed = 0
            self._digest = new_hash(self.file.algorithm, self.file.size)
            if self.attempts >= limit:
                self.partial.discard()
            else:
                self.partial.restart(whole=whole)
            return lost

    def close(self) -> None:
        """Let go of the files, unless a thread is at it just now; nothing gets its name any more."""
        with self._placing:
            self._closed = True
        if self._lock.acquire(blocking=False):
            self.generation += 1
            self.partial.close()
            self._lock.release()
