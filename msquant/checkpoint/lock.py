"""A lock file that says who holds it, and that a killed process cannot leave locked."""

import fcntl
import json
import os
import socket
from pathlib import Path

from msquant.checkpoint.json_file import decode_json


class LockHeld(Exception):  # noqa: N818 - a state that the caller handles, no failure
    """Another process holds the lock.

    Attributes:
        who: that process, for a person: `process 123 on host`.
    """

    def __init__(self, who: str) -> None:
        super().__init__(who)
        self.who = who


def acquire_lock(path: Path) -> int:
    """Lock a file, made if it does not exist; closing the returned descriptor releases it.

    Raises:
        LockHeld: another process has it.
        OSError: it cannot be written; FileNotFoundError if its folder is not there.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between opening and locking, the holder may have finished and taken the file away with it.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        except BlockingIOError:
            holder = os.pread(descriptor, 1000, 0)
            os.close(descriptor)
            raise LockHeld(_who(holder)) from None
        os.close(descriptor)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
    return descriptor


def _who(holder: bytes) -> str:
    try:
        value = decode_json(holder)
        return f"process {value['pid']} on {value['host']}"
    except (ValueError, TypeError, KeyError):
        return "another process"
