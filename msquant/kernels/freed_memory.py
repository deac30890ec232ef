"""What glibc does with memory that arrays give back."""

import ctypes

# `mallopt(3)`; numbers of <malloc.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_LARGEST = 256 << 20
"""Bytes from which an array's memory goes back to the system at once; by default it is 32 MiB."""
_KEPT = 512 << 20
"""Bytes at the end of the heap that may wait for the next array."""
_GROWTH = 64 << 20
"""Bytes that the heap grows by."""


def reuse_freed_memory() -> None:
    """Let arrays take the memory that earlier ones have left: the system clears every page it gives anew.

    A decoder layer's products come and go many times. It is for processes of msquant's own, because it is for
    all that a process does. Without glibc nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for parameter, size in ((_MMAP_THRESHOLD, _LARGEST), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _GROWTH)):
        mallopt(parameter, size)
