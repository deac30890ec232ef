"""What runs in a worker process: it binds itself to its cores, looks around, and does tasks."""

import ctypes
import os
import signal
import socket
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from msquant.errors import MsquantError
from msquant.flows.layer_graph import Job, Result, Task, Work
from msquant.flows.node_checks import NodeReport, look_around

# PR_SET_PDEATHSIG of <sys/prctl.h>.
_PARENT_DEATH_SIGNAL = 1
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")


def thread_variables(threads: int) -> dict[str, str]:
    """The variables by which libraries take so many threads."""
    return dict.fromkeys(_THREADS, str(threads))


@dataclass(frozen=True)
class Failure:
    """A task's own error, which no repetition would help; sent back as a value, without Ray's traceback.

    Attributes:
        known: the error, where it is one that a person can act on.
        text: else its traceback.
    """

    known: MsquantError | None
    text: str = ""

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """An exception as a value."""
        if isinstance(error, MsquantError):
            return cls(error)
        return cls(None, "".join(traceback.format_exception(error)))

    def error(self, host: str | None) -> Exception:
        """What to raise; with the name of the node, if it is given."""
        error: Exception = self.known or RuntimeError(f"a worker failed:\n{self.text}")
        if host:
            error.add_note(f"on node {host}")
        return error


class WorkerProcess:
    """A worker; Ray calls its methods one at a time."""

    def __init__(self) -> None:
        from msquant.models.device import silence_libraries

        # Ctrl-C goes to all processes of a terminal; the one that started this one decides.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        silence_libraries()
        self._work: Work | None = None
        self._bound = False

    def node(self) -> str:
        """What tells the node that this is from others."""
        return socket.gethostname()

    def look(
        self,
        slot: int,
        threads: int,
        device: str | None,
        source: Path | None,
        probe: Path | None,
        number: int,
    ) -> NodeReport | Failure:
        """What this node has and sees, see `look_around`; keeps to cores as `begin`."""
        self._bind(slot, threads)
        try:
            return look_around(device, source, probe, number)
        except Exception as error:
            return Failure.of(error)

    def begin(
        self, slot: int, threads: int, job: Job, source: Path, output: Path, number: int
    ) -> Failure | None:
        """Keep to some cores, and open the model and the folder that is made.

        Args:
            slot: which part of the node's cores, from 0.
            threads: cores of a part.
            job: what tasks are to know.
            source: folder of the weights.
            output: the folder that is made.
            number: of this worker.
        """
        self._bind(slot, threads)
        try:
            self._work = job.begin(source, output, number)
        except Exception as error:
            return Failure.of(error)
        return None

    def _bind(self, slot: int, threads: int) -> None:
        """Keep to a part of the node's cores, with as many threads of libraries."""
        if self._bound:
            return
        self._bound, cores = True, sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[(slot * threads + place) % len(cores)] for place in range(threads)})
        os.environ |= thread_variables(threads)
        # NumPy, which read the variables when this module was imported, was too early.
        from threadpoolctl import threadpool_limits

        threadpool_limits(threads)

    def run(self, task: Task) -> Result | Failure:
        """Do a task."""
        assert self._work is not None
        try:
            return self._work.run(task)
        except Exception as error:
            return Failure.of(error)
        finally:
            self._work.release()


def serve(descriptor: int, parent: int) -> None:
    """Answer the calls that come through a socket until it is closed; ends with the process that opened it.

    Args:
        descriptor: the socket, which this process has inherited.
        parent: number of the process at its other end.
    """
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        return
    worker, connection = WorkerProcess(), Connection(descriptor)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        connection.send(getattr(worker, method)(*arguments))
