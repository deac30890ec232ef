"""The folder that a download goes into: who works in it, what is there already, what is held back."""

import os
import shutil
import stat
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

from msquant.checkpoint.disk import sync_folder, writing
from msquant.checkpoint.download_marker import DownloadMarker, MarkedFile
from msquant.checkpoint.file_names import DOWNLOAD_LOCK, STATE_FOLDER
from msquant.checkpoint.lock import LockHeld, acquire_lock
from msquant.errors import CheckpointError, OutputError
from msquant.hub.listing import RemoteFile, Snapshot
from msquant.hub.names import HELD, PARTIAL, check_folders
from msquant.hub.partial import is_partial

_POLL_SECONDS = 0.2


def is_held_back(path: str) -> bool:
    """Whether a file appears last: with one of these missing no engine takes a folder for a model."""
    return path == "config.json" or ("/" not in path and path.endswith(".index.json"))


@dataclass
class Inventory:
    """What a target holds of the files that are wanted.

    Attributes:
        good: the modification times of the verified files.
        unknown: files of the right size that have to be hashed first.
        missing: files that have to be fetched.
        conflicts: the missing ones in whose place something else is.
    """

    good: dict[str, int] = field(default_factory=dict)
    unknown: list[RemoteFile] = field(default_factory=list)
    missing: list[RemoteFile] = field(default_factory=list)
    conflicts: list[RemoteFile] = field(default_factory=list)


class TargetFolder:
    """A folder in which one process downloads at a time; a context manager.

    Args:
        target: the folder; made if it does not exist.
        waiting: called with a line if another process is at it, which is then waited for.

    Raises:
        OutputError: on entering, if it is no folder or cannot be written.

    Attributes:
        path: absolute.
        state: the folder in it that holds the marker, the lock and what is not complete.
        partial: where unfinished files are.
    """

    def __init__(self, target: Path, waiting: Callable[[str], None]) -> None:
        self.path = Path(os.path.abspath(target))
        self.state = self.path / STATE_FOLDER
        self.partial = self.state / PARTIAL
        self._waiting = waiting
        self._made = not os.path.lexists(self.path)
        self._lock: int | None = None

    def __enter__(self) -> Self:
        if os.path.lexists(self.path) and not self.path.is_dir():
            raise OutputError("not a folder", where=self.path, remedy="name another one with --output")
        with writing(self.path):
            check_folders(self.path, [])
            told = False
            while self._lock is None:
                self.state.mkdir(parents=True, exist_ok=True)
                try:
                    self._lock = acquire_lock(self.state / DOWNLOAD_LOCK)
                except FileNotFoundError:
                    continue
                except LockHeld as held:
                    if not told:
                        self._waiting(f"{held.who} is downloading into {self.path} now; waiting for it")
                        told = True
                    time.sleep(_POLL_SECONDS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lock is None:
            return
        try:
            for folder in (self.partial, self.state / HELD):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
            (self.state / DOWNLOAD_LOCK).unlink(missing_ok=True)
            # Nothing is left where nothing was written; a folder that holds something stays.
            self.state.rmdir()
            if self._made:
                self.path.rmdir()
        except OSError:
            pass
        finally:
            os.close(self._lock)
            self._lock = None

    def marker(self, snapshot: Snapshot) -> DownloadMarker | None:
        """The marker of an earlier download of the same repository, or None.

        Raises:
            OutputError: the folder is a download of another one.
        """
        try:
            marker = DownloadMarker.read(self.path)
        except CheckpointError:
            # It is written anew, and every file is hashed.
            return DownloadMarker(snapshot.hub.name, snapshot.repository, snapshot.revision, "")
        if marker is not None and marker.repository.lower() != snapshot.repository.lower():
            raise OutputError(
                f"holds a download of {marker.repository} already",
                where=self.path,
                remedy="name another folder with --output",
            )
        return marker

    def inventory(
        self, files: Sequence[RemoteFile], marker: DownloadMarker | None, *, verify: bool
    ) -> Inventory:
        """What is there of the files; with `verify`, nothing is believed without being hashed."""
        check_folders(self.path, [file.path for file in files])
        found = Inventory()
        for file in files:
            entry = marker.files.get(file.path) if marker else None
            try:
                state = os.lstat(self.path / file.path)
            except OSError:
                found.missing.append(file)
                continue
            if not stat.S_ISREG(state.st_mode) or state.st_size != file.size:
                found.missing.append(file)
                found.conflicts.append(file)
            elif (
                verify or entry is None or (entry.digest, entry.mtime_ns) != (file.digest, state.st_mtime_ns)
            ):
                found.unknown.append(file)
            else:
                found.good[file.path] = state.st_mtime_ns
        return found

    def remove_leftovers(self, keys: set[str]) -> None:
        """Remove the partial files of other contents than these. Raises OutputError."""
        with writing(self.partial):
            shutil.rmtree(self.state / HELD, ignore_errors=True)
            if self.partial.is_dir():
                for path in self.partial.iterdir():
                    if not is_partial(path.name, keys):
                        path.unlink()

    def remove_obsolete(self, files: Mapping[str, MarkedFile]) -> None:
        """Remove the files of earlier commits. Raises OutputError.

        Of a file that was not verified before the commit changed, only the size tells that it is not another.
        """
        check_folders(self.path, list(files))
        for name, entry in files.items():
            path = self.path / name
            with writing(path):
                if not os.path.lexists(path) or path.is_dir():
                    continue
                if entry.mtime_ns is None and path.lstat().st_size != entry.size:
                    continue
                path.unlink()
                for folder in path.parents[: len(PurePosixPath(name).parents) - 1]:
                    if any(folder.iterdir()):
                        break
                    folder.rmdir()

    def place(self, path: str) -> Path:
        """Where a file goes when it is verified."""
        return self.state / HELD / path if is_held_back(path) else self.path / path

    def hold_back(self, paths: Sequence[str]) -> None:
        """Take files that appear last out of the folder again. Raises OutputError."""
        for path in filter(is_held_back, paths):
            with writing(self.place(path)):
                self.place(path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.path / path, self.place(path))

    def release(self, paths: Sequence[str]) -> None:
        """Put the files that were held back in their place, config.json last. Raises OutputError."""
        for path in sorted(filter(is_held_back, paths), key=lambda path: path == "config.json"):
            with writing(self.path / path):
                if self.place(path).exists():
                    os.replace(self.place(path), self.path / path)
                    sync_folder(self.path)


def new_marker(
    snapshot: Snapshot, files: Sequence[RemoteFile], good: dict[str, int], before: DownloadMarker | None
) -> DownloadMarker:
    """The marker of a download that begins.

    Args:
        snapshot: where it is from.
        files: those that are wanted.
        good: the modification times of those that are verified.
        before: the marker of an earlier download; files of it that are the same now stay listed, those that
            are others now, or not listed any more, are obsolete.
    """
    marker = DownloadMarker(snapshot.hub.name, snapshot.repository, snapshot.revision, snapshot.commit)
    listed = {file.path: file.digest for file in snapshot.files}
    for path, entry in (before.files if before else {}).items():
        if entry.mtime_ns is not None and listed.get(path) == entry.digest:
            marker.files[path] = entry
    for file in files:
        marker.files[file.path] = MarkedFile(file.size, file.algorithm, file.digest, good.get(file.path))
    for path, entry in {**before.obsolete, **before.files}.items() if before else ():
        if path not in marker.files and listed.get(path) != entry.digest:
            marker.obsolete[path] = entry
    return marker
