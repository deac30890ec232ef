"""A result folder that appears whole or not at all."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from msquant.checkpoint.disk import sync_folder, writing
from msquant.checkpoint.journal import JOURNAL_NAME
from msquant.checkpoint.lock import LockHeld, acquire_lock
from msquant.checkpoint.results import MANIFEST_NAME
from msquant.checkpoint.writer import is_temporary
from msquant.errors import OutputError, StartOverError

LOCK_NAME = ".msquant.lock"

# The result that is replaced, inside of the one that replaces it: a kill leaves no third folder.
REPLACED_NAME = ".msquant.replaced"
"""Holds an earlier result while it is replaced."""


class OutputFolder:
    """Collects a result in `<target>.partial` and gives it its name when it is complete.

    Use as a context manager: write into `path`, then call `finish()`. Leaving without `finish()`, by an
    exception or by Ctrl-C, removes the partial folder, unless `keep` is set. What a killed process left
    behind is there again for the next one if it holds a journal, and is removed if it does not: then nobody
    could tell what it is. A partial folder that a living process works in is refused. Where a process was
    killed while it replaced a result, the next one puts the old result back, or removes what is left of it.

    Args:
        target: the result's final name; it must not hold anything, unless `overwrite`.
        overwrite: replace `target` in `finish()` if it is a result of msquant; nothing else is ever replaced.

    Raises:
        OutputError: on entering, if the target is taken, in use, or cannot be written.

    Attributes:
        target: the final name.
        path: the partial folder, to write into.
        keep: leave the partial folder to a later run that continues it, if this one does not finish; true on
            entering one that an earlier run left so.
    """

    def __init__(self, target: Path | str, *, overwrite: bool = False) -> None:
        self.target = Path(os.path.abspath(target))
        self.path = self.target.with_name(self.target.name + ".partial")
        self.keep = False
        self._overwrite = overwrite
        self._lock: int | None = None

    def __enter__(self) -> Self:
        with writing(self.path):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self._acquire()
            try:
                self.keep = (self.path / JOURNAL_NAME).is_file()
                self._recover()
                self._check_target()
                for leftover in self.path.iterdir():
                    if leftover.name != LOCK_NAME and (not self.keep or is_temporary(leftover.name)):
                        remove_path(leftover)
            except BaseException:
                self._leave()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._lock is not None:
            self._leave()

    def _leave(self) -> None:
        if self.keep:
            self._release()
            return
        try:
            self.clear()
            # Another process that comes now makes a lock of its own, and keeps the folder by that.
            (self.path / LOCK_NAME).unlink(missing_ok=True)
            self.path.rmdir()
        except (OSError, OutputError):
            pass
        finally:
            self._release()

    def clear(self) -> None:
        """Remove everything that the partial folder holds. Raises OutputError if it cannot be removed."""
        with writing(self.path):
            # The journal first: a folder without one is never continued.
            (self.path / JOURNAL_NAME).unlink(missing_ok=True)
            for leftover in self.path.iterdir():
                if leftover.name not in (LOCK_NAME, REPLACED_NAME):
                    remove_path(leftover)

    @contextmanager
    def continued_later(self, finished: Callable[[], int], total: int, parts: str) -> Iterator[None]:
        """Keep what is finished where the block is left by an error or by Ctrl-C, and say so in its notes.

        Args:
            finished: counts the parts that a later run need not do again; with none, nothing is kept.
            total: how many there are.
            parts: what they are called.
        """
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            if done := finished():
                self.keep = True
                # Such an error says itself whether the same command can continue.
                then = "they are kept" if isinstance(error, StartOverError) else "the same command continues"
                error.add_note(f"{done} of {total} {parts} are finished in {self.path}; {then}")
            raise

    def finish(self, scratch: Iterable[str] = ()) -> Path:
        """Give the complete folder its final name, and return that.

        The journal goes only after that, and a result that is replaced last of all: a process that is killed
        on the way leaves a folder that can be continued, or one that is finished, in which the journal, the
        lock and the old result may be too many. The next call for this target clears that away.

        Args:
            scratch: files and folders in it that are no part of the result; removed first.

        Raises:
            OutputError: the target was taken meanwhile, or the disk cannot be written.
        """
        if self._lock is None:
            raise OutputError("the folder is not open for writing", where=self.target)
        self._check_target()
        with writing(self.target):
            for name in scratch:
                if os.path.lexists(self.path / name):
                    remove_path(self.path / name)
            for folder, _, _ in os.walk(self.path):
                sync_folder(Path(folder))
            try:
                if self.target.exists():
                    os.rename(self.target, self.path / REPLACED_NAME)
                os.rename(self.path, self.target)
            except BaseException:
                if os.path.lexists(self.path / REPLACED_NAME):
                    os.rename(self.path / REPLACED_NAME, self.target)
                raise
            _tidy(self.target)
            sync_folder(self.target)
            sync_folder(self.target.parent)
        self._release()
        return self.target

    def _recover(self) -> None:
        """Clear up after a process that was killed in `finish`; the lock is held."""
        replaced = self.path / REPLACED_NAME
        if not os.path.lexists(replaced):
            if (self.target / MANIFEST_NAME).is_file() and not self.target.is_symlink():
                _tidy(self.target)
        elif not os.path.lexists(self.target):
            os.rename(replaced, self.target)
        else:
            self.keep = True
            raise OutputError(
                f"is what a killed --overwrite was replacing, and {self.target} was made anew since then",
                where=replaced,
                remedy="move it away, or remove it, and run the same command again",
            )

    def _check_target(self) -> None:
        if not os.path.lexists(self.target):
            return
        if self.target.is_symlink() or not self.target.is_dir():
            raise OutputError("not a folder", where=self.target, remedy="name another folder with --output")
        with writing(self.target):
            if not any(self.target.iterdir()):
                return
        if not (self.target / MANIFEST_NAME).is_file():
            raise OutputError(
                f"holds files that msquant did not write (there is no {MANIFEST_NAME})",
                where=self.target,
                remedy="name another folder with --output; --overwrite replaces only results of msquant",
            )
        if not self._overwrite:
            raise OutputError(
                "holds a result already",
                where=self.target,
                remedy="name another folder with --output, or replace it with --overwrite",
            )

    def _acquire(self) -> None:
        while self._lock is None:
            self.path.mkdir(exist_ok=True)
            try:
                self._lock = acquire_lock(self.path / LOCK_NAME)
            except FileNotFoundError:
                continue
            except LockHeld as held:
                raise OutputError(
                    f"{held.who} is writing this result now",
                    where=self.path,
                    remedy="wait for it or stop it, or name another folder with --output",
                ) from None

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _tidy(target: Path) -> None:
    """Remove from a finished result what is no part of it."""
    shutil.rmtree(target / REPLACED_NAME, ignore_errors=True)
    for name in (JOURNAL_NAME, LOCK_NAME):
        (target / name).unlink(missing_ok=True)


def remove_path(path: Path) -> None:
    """Remove a file, a symlink, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
