"""Files from outside, read only if they are files, and never more of them than a limit.

A name in a model's folder may be a link to anything: a device that never ends, a pipe that nobody writes to.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read it; links are followed, and nothing is waited for.

    Raises:
        OSError: it cannot be opened, or is no regular file; `strerror` says what it is instead.
    """
    # Without O_NONBLOCK, opening a pipe would wait for somebody to write to it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            kind = _KINDS.get(stat.S_IFMT(mode), "something else")
            raise OSError(errno.EINVAL, f"it is {kind}, only regular files are read", str(path))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file.

    Raises:
        OSError: as `open_regular`, or it has more than `max_bytes`; `strerror` says both numbers.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        # The size may be wrong: files of /proc have none, and others grow meanwhile.
        data = file.read(max_bytes + 1) if size <= max_bytes else b""
    if size > max_bytes or len(data) > max_bytes:
        raise OSError(
            errno.EFBIG, f"it has {max(size, len(data))} bytes, at most {max_bytes} are read", str(path)
        )
    return data
