"""Threads that hash: what arrives, while it arrives, and what is on disk already."""

import os
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from msquant.hub.job import HASH_PIECE, Job
from msquant.hub.listing import RemoteFile
from msquant.hub.partial import new_hash
from msquant.hub.retry import Stopped


def hash_threads() -> int:
    """How many threads hash at once: one core makes 0.3 to 2 GB/s."""
    return min(4, os.cpu_count() or 1)


class HashPool:
    """Threads that work on jobs; a job is in one thread at a time, which its caller sees to.

    Args:
        work: called with each job and a buffer that is the thread's own.
        fail: called with what that raises.
    """

    def __init__(self, work: Callable[[Job, bytearray], None], fail: Callable[[BaseException], None]) -> None:
        self._work = work
        self._fail = fail
        self._jobs: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(hash_threads())]
        for thread in self._threads:
            thread.start()

    def put(self, job: Job) -> None:
        """Have a job worked on."""
        self._jobs.put(job)

    def stop(self) -> list[threading.Thread]:
        """Let the threads end after what they do now, and return them."""
        for _ in self._threads:
            self._jobs.put(None)
        return self._threads

    def _run(self) -> None:
        buffer = bytearray(HASH_PIECE)
        while (job := self._jobs.get()) is not None:
            try:
                self._work(job, buffer)
            except Stopped:
                return
            except BaseException as error:
                self._fail(error)


class DiskCheck:
    """Hashes files that are on disk and tells which are what they should be.

    Args:
        folder: where they are.
        files: which.

    Attributes:
        checked: bytes that are hashed so far.
        good: the state of each file, taken before it was read, that has its digest.
    """

    def __init__(self, folder: Path, files: Sequence[RemoteFile]) -> None:
        self._folder = folder
        self._files = iter(files)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.checked = 0
        self.good: dict[str, os.stat_result] = {}

    def run(self, tick: Callable[[], None]) -> None:
        """Hash them all; `tick` is called about ten times a second from this thread."""
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(hash_threads())]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.1)
                    tick()
        finally:
            self._stop.set()

    def _work(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                file = next(self._files, None)
            if file is None:
                return
            state = self._matching(file)
            if state is not None:
                with self._lock:
                    self.good[file.path] = state

    def _matching(self, file: RemoteFile) -> os.stat_result | None:
        """The state of a file if it has the listed content; one that cannot be read has not."""
        digest = new_hash(file.algorithm, file.size)
        buffer = bytearray(HASH_PIECE)
        view = memoryview(buffer)
        try:
            descriptor = os.open(self._folder / file.path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return None
        try:
            state = os.fstat(descriptor)
            while count := os.readv(descriptor, [buffer]):
                digest.update(view[:count])
                with self._lock:
                    self.checked += count
                if self._stop.is_set():
                    return None
        except OSError:
            return None
        finally:
            os.close(descriptor)
        return state if digest.hexdigest() == file.digest else None
