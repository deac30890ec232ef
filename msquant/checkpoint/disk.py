"""What a full, read-only or vanished disk says, turned into an error a person can act on."""

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from msquant.errors import OutputError

# SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER.
_WRITE_AND_WAIT = 1 | 2 | 4
_FULL = {errno.ENOSPC, errno.EDQUOT}
_CANNOT_RESERVE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_READ_ONLY = {errno.EACCES, errno.EPERM, errno.EROFS}


def free_bytes(path: Path) -> int | None:
    """Free bytes for an ordinary user on the disk that holds `path` or will; None if that cannot be told."""
    for existing in (path, *path.parents):
        if existing.exists():
            try:
                return shutil.disk_usage(existing).free
            except OSError:
                return None
    return None


def shown_sizes(*counts: int) -> list[str]:
    """Numbers of bytes for people (`80.0 GB`), in as many digits as tell different ones apart."""
    from rich.filesize import decimal

    for precision in range(1, 12):
        shown = [decimal(count, precision=precision) for count in counts]
        if len(set(shown)) == len(set(counts)):
            break
    return shown


def require_free_space(folder: Path, needed_bytes: int) -> None:
    """Check that a folder, which need not exist yet, has room.

    Raises:
        OutputError: it has not; names the free and the needed bytes.
    """
    free = free_bytes(folder.absolute())
    if free is not None and free < needed_bytes:
        left, needed = shown_sizes(free, needed_bytes)
        raise OutputError(
            f"{left} are free on its disk, {needed} are needed",
            where=folder,
            remedy="free some space, or choose another disk with --output",
        )


@contextmanager
def writing(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Turn an OSError or a SafetensorError that is raised inside into an OutputError.

    Args:
        path: what is being written.
        needed_bytes: how many bytes it takes, where known.

    Raises:
        OutputError: names the path, the free bytes and the needed ones.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise _explain(error, path, needed_bytes) from error


def reserve(descriptor: int, size: int) -> None:
    """Give an open, empty file its size, and the disk space for it where the file system can.

    `fallocate` itself and not `os.posix_fallocate`: that one, where the file system cannot, writes to every
    block.

    Raises:
        OSError: ENOSPC if there is no room.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is not None and size:
        if not fallocate(ctypes.c_int(descriptor), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(size)):
            return
        if (number := ctypes.get_errno()) not in _CANNOT_RESERVE:
            raise OSError(number, os.strerror(number))
    os.ftruncate(descriptor, size)


def sync_range(descriptor: int, start: int, size: int) -> None:
    """Write a part of a file to disk, so that an `fsync` of all of it takes less long; a hint, no promise."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "sync_file_range", None)
    if call is not None:
        call(
            ctypes.c_int(descriptor),
            ctypes.c_int64(start),
            ctypes.c_int64(size),
            ctypes.c_uint(_WRITE_AND_WAIT),
        )


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _explain(error: OSError | SafetensorError, path: Path, needed_bytes: int | None) -> OutputError:
    if isinstance(error, OSError):
        number, text = error.errno, error.strerror or str(error)
    else:
        # The safetensors library, written in Rust, gives the number only in its message.
        found = re.search(r"os error (\d+)", str(error))
        number, text = (int(found[1]) if found else None), str(error)
    if number in _FULL:
        sizes = shown_sizes(free_bytes(path.absolute()) or 0, needed_bytes or 0)
        needed = f", {sizes[1]} needed for this file" if needed_bytes is not None else ""
        return OutputError(
            f"the disk is full ({sizes[0]} free{needed})",
            where=path,
            remedy="free some space, or choose another disk with --output",
        )
    if number in _READ_ONLY:
        return OutputError(
            f"cannot be written: {text}", where=path, remedy="choose a writable folder with --output"
        )
    needed = f" ({shown_sizes(needed_bytes)[0]})" if needed_bytes is not None else ""
    return OutputError(
        f"cannot be written{needed}: {text}", where=path, remedy="choose another place with --output"
    )


def shard_file_bytes(folder: Path) -> int:
    """Of a folder's safetensors files as they are on disk."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
