"""What an unfinished run has read and written, held to the hashes that its journal has of it.

One thread hashes what the run reads while it works on that, when most of it is in the page cache; the run
notes the hashes with what it has made of the tensors. When a run continues an earlier one, another thread
verifies every file that is finished, and what was read of shards that may have changed since. What a finished
layer was made of is what the source holds now, so the result is that of the source as it is.
"""

import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.fp8 import SCALE_SUFFIX
from msquant.checkpoint.journal import Journal
from msquant.errors import StartOverError

_PIECE = 4 << 20


class _Stopped(Exception):  # noqa: N818 - nobody waits for it
    """The run has ended."""


class SourceHashes:
    """Hashes what is read of a checkpoint in a thread of its own.

    Args:
        source: what is read.
    """

    def __init__(self, source: Checkpoint) -> None:
        self._source = source
        self._stop = threading.Event()
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="hash-source")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop.set()
        self._readers.shutdown(cancel_futures=True)

    def reading(self, names: Iterable[str]) -> Callable[[], dict[str, Any]]:
        """Hash tensors of the source, and their scales, beside what is done with them.

        Args:
            names: the tensors.

        Returns:
            What to call when that is done: it waits for the hashes and returns the journal's record of what
            was read: by shard, its size, times and inode, the tensors, and the sha256 of their bytes. It
            raises CheckpointError if a shard cannot be read or was changed since it was opened.
        """
        tensors: dict[str, list[str]] = defaultdict(list)
        for name in map(self._source.stored_name, names):
            for part in (name, name + SCALE_SUFFIX):
                if part in self._source:
                    tensors[self._source.weight_map[part]].append(part)
        hashes = {
            shard: self._readers.submit(self._tensors_sha256, shard, sorted(parts))
            for shard, parts in sorted(tensors.items())
        }

        def record() -> dict[str, Any]:
            return {
                shard: {
                    **self._source.shards[shard].state,
                    "tensors": sorted(tensors[shard]),
                    "sha256": future.result(),
                }
                for shard, future in hashes.items()
            }

        return record

    def _tensors_sha256(self, name: str, tensors: Sequence[str]) -> str:
        """The sha256 of tensors' bytes, one after another. Raises CheckpointError as `Shard.read`."""
        shard, digest = self._source.shards[name], hashlib.sha256()
        buffer = np.empty(_PIECE, np.uint8)
        for tensor in tensors:
            with shard.reading(tensor) as read:
                nbytes = shard.entries[tensor].nbytes
                for start in range(0, nbytes, _PIECE):
                    self._go_on()
                    piece = buffer[: min(_PIECE, nbytes - start)]
                    read(start, piece)
                    digest.update(piece.data)
        return digest.hexdigest()

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise _Stopped


class RunFiles(SourceHashes):
    """Vouches for the files of a run; a context manager around all of its work.

    Args:
        journal: of the run. Its records have `files`, and `source` as `reading` gives it; `sources` are more
            of those, of what several processes have read.
        source: what the run reads.
    """

    def __init__(self, journal: Journal, source: Checkpoint) -> None:
        super().__init__(source)
        self._journal = journal
        self._verifiers = ThreadPoolExecutor(1, thread_name_prefix="verify")
        self._checks: list[Future[None]] = []

    def __enter__(self) -> Self:
        folder = self._journal.path.parent
        for record in self._journal.records:
            reads = [record.get("source", {}), *record.get("sources", [])]
            for name, entry in [item for read in reads for item in read.items()]:
                self._checks.append(self._verifiers.submit(self._verify_source, name, entry))
            for name, entry in record.get("files", {}).items():
                self._checks.append(self._verifiers.submit(self._verify_file, folder / name, entry["sha256"]))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        super().__exit__(kind, value, traceback)
        self._verifiers.shutdown(cancel_futures=True)

    @property
    def unverified(self) -> int:
        """How many files of an earlier run are still to be verified."""
        return sum(not check.done() for check in self._checks)

    def check(self) -> None:
        """Look at what is verified so far.

        Raises:
            StartOverError: a file is not what it was; it is named.
        """
        for check in [check for check in self._checks if check.done()]:
            self._checks.remove(check)
            check.result()

    def finish(self) -> None:
        """Wait until everything is verified. Raises as `check`."""
        for check in self._checks:
            check.result()

    def _verify_source(self, name: str, entry: Mapping[str, Any]) -> None:
        """Whether a shard has what was read of it; which is not read again if nothing has touched it."""
        shard = self._source.shards.get(name)
        if shard is not None:
            if all(entry[key] == value for key, value in shard.state.items()):
                return
            if self._tensors_sha256(name, entry["tensors"]) == entry["sha256"]:
                return
        raise StartOverError(
            "is not what the unfinished run has read: layers of two models would be in one result",
            where=self._source.folder / name,
            remedy="put the file back that the run began with and run the same command again, or start over "
            "with --restart",
        )

    def _verify_file(self, path: Path, sha256: str) -> None:
        digest, buffer = hashlib.sha256(), bytearray(_PIECE)
        try:
            with path.open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    self._go_on()
                    digest.update(memoryview(buffer)[:count])
            problem = "its sha256 is not the one in the journal" if digest.hexdigest() != sha256 else None
        except OSError as error:
            problem = error.strerror or str(error)
        if problem:
            raise StartOverError(
                f"is not what the unfinished run has written: {problem}",
                where=path,
                remedy="start over with --restart",
            )
