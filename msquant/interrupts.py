"""Ctrl-C at safe points: MindSpore calls Python from C++ that does not survive an exception, and aborts."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_asked = threading.Event()


@contextmanager
def deferred_interrupts() -> Iterator[None]:
    """Within the block Ctrl-C takes effect in `check_interrupt`; a second one takes effect at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: FrameType | None) -> None:
        if _asked.is_set():
            raise KeyboardInterrupt
        _asked.set()

    _asked.clear()
    signal.signal(signal.SIGINT, ask)
    try:
        yield
        check_interrupt()
    finally:
        signal.signal(signal.SIGINT, before)
        _asked.clear()


def check_interrupt() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed within `deferred_interrupts`."""
    if _asked.is_set():
        raise KeyboardInterrupt
