"""Worker processes of this machine, each at the end of a socket that nobody else can open."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from msquant.checkpoint.disk import shown_sizes
from msquant.checkpoint.memory import available_memory
from msquant.errors import EngineError
from msquant.flows.worker_pool import WorkerDied
from msquant.flows.worker_process import thread_variables
from msquant.flows.workers import Workers

# Not `-m`: what it sends would be of a module called __main__.
_SERVE = "import sys; from msquant.flows.worker_process import serve; serve(*map(int, sys.argv[1:]))"


class LocalHand:
    """A worker process, see `Hand`; it ends with this one, however that ends.

    Args:
        threads: cores that it gets.
    """

    def __init__(self, threads: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                # Without -P a module in the current folder, perhaps a downloaded model's, would be imported.
                [sys.executable, "-P", "-c", _SERVE, str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=os.environ | thread_variables(threads),
                pass_fds=[theirs.fileno()],
            )
        self.connection = Connection(ours.detach())

    def call(self, method: str, *arguments: Any) -> None:
        """As `Hand.call`."""
        # Where nobody is there any more, `answer` finds that.
        with suppress(OSError):
            self.connection.send((method, arguments))

    def answer(self) -> Any:
        """As `Hand.answer`."""
        try:
            return self.connection.recv()
        except (EOFError, OSError) as error:
            code = self._process.wait()
            raise WorkerDied(f"its process ended with {code}") from error

    def end(self) -> None:
        """Let it end, without waiting for that."""
        self._process.kill()

    def kill(self) -> None:
        """As `Hand.kill`."""
        self.end()
        self._process.wait()
        self.connection.close()


class LocalCrew:
    """Starts worker processes on this machine, which share its cores.

    Args:
        workers: how many.

    Raises:
        EngineError: the memory is too small for so many.

    Attributes:
        count: workers to hire.
    """

    def __init__(self, workers: Workers) -> None:
        self.count = workers.count or 1
        self._threads = max(1, len(os.sched_getaffinity(0)) // self.count)
        self._hands: list[LocalHand] = []
        available = available_memory()
        if available is not None and self.count * workers.memory > available:
            left, needed = shown_sizes(available, self.count * workers.memory)
            raise EngineError(
                f"{self.count} workers need about {needed} of memory, {left} are available",
                where="--workers",
                remedy=f"use --workers {max(1, available // workers.memory)}",
            )

    def threads(self, number: int) -> int:
        """As `Crew.threads`."""
        return self._threads

    def hire(self, number: int) -> LocalHand:
        """As `Crew.hire`."""
        self._hands.append(LocalHand(self._threads))
        return self._hands[-1]

    def wait(self, hands: Sequence[LocalHand], seconds: float) -> list[LocalHand]:
        """As `Crew.wait`."""
        ready = wait([hand.connection for hand in hands], seconds)
        return [hand for hand in hands if hand.connection in ready]

    def close(self) -> None:
        """As `Crew.close`."""
        # All at once: a process with much memory takes a while to end.
        for hand in self._hands:
            hand.end()
        for hand in self._hands:
            hand.kill()
