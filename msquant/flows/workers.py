"""Who does the work on a model."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.disk import writing
from msquant.errors import EngineError
from msquant.progress import Progress

if TYPE_CHECKING:
    from msquant.flows.layer_graph import Job
    from msquant.flows.worker_pool import WorkerPool

# Beyond one a worker, so that none of them waits for the chain.
_AHEAD = 2


def layers_ahead(workers: int) -> int:
    """How many layers the floating-point pass of so many workers may be ahead of the quantization."""
    return workers + _AHEAD


@dataclass(frozen=True)
class Workers:
    """Who does the work on decoder layers, or on the parts of a model without calibration.

    Attributes:
        count: processes; 1 is this one alone, without Ray. None: one, or with an address one a node.
        address: `HOST:PORT` of a Ray cluster to join; None for this machine.
        memory: bytes that one takes at most, as the plan says; 0 if that is not known.
        threads: cores that one makes use of; where no count is given a node has as many workers as that
            allows. None: all of a node's.
        allow_different_arithmetic: go on where nodes round differently, so that bytes depend on who computes.
    """

    count: int | None = None
    address: str | None = None
    memory: int = 0
    threads: int | None = None
    allow_different_arithmetic: bool = False

    @property
    def in_process(self) -> bool:
        """Whether no other process is needed."""
        return self.address is None and self.count in (None, 1)


@contextmanager
def working(
    workers: Workers, job: "Job", source: Checkpoint, output: Path, progress: Progress
) -> Iterator["WorkerPool | None"]:
    """The workers, looked at and ready; None where this process does everything itself.

    Args:
        workers: who they are.
        job: what they are to do.
        source: the weights.
        output: the folder that is made.
        progress: callbacks.

    Raises:
        EngineError: as `WorkerPool` and its `prepare`.
    """
    if workers.in_process:
        yield None
        return
    from msquant.flows.worker_pool import WorkerPool

    with WorkerPool(workers, progress) as pool:
        pool.prepare(job, source.folder.absolute(), source.fingerprint()["sha256"], output.absolute())
        yield pool


@contextmanager
def scratch_folder(workers: Workers, beside: Path) -> Iterator[Path]:
    """A folder for what workers leave one another, removed in the end.

    Args:
        workers: who they are: all nodes of a cluster see the disk of the model, not one another's.
        beside: the model's folder; theirs lies beside it on a cluster, in the temporary folder otherwise.

    Raises:
        StorageError: it cannot be made.
    """
    place = beside.absolute().parent if workers.address else Path(tempfile.gettempdir())
    with writing(place):
        folder = tempfile.TemporaryDirectory(prefix=".msquant-", dir=place)
    with folder as name:
        yield Path(name)


def require_workers(count: int | None, address: str | None, device: str) -> None:
    """Refuse what no worker can do, before any work.

    Args:
        count: as in `Workers`.
        address: likewise.
        device: that they would compute on.

    Raises:
        EngineError: the count or the address is none; workers are asked for where only one process works.
    """
    if count is not None and count < 1:
        raise EngineError(f"{count} workers can do nothing", where="--workers", remedy="use 1 or more")
    if address is not None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise EngineError(
                f"{address!r} is no HOST:PORT",
                where="--ray-address",
                remedy="give what ray start --head has shown, such as 10.0.0.1:6379",
            )
    if Workers(count, address).in_process:
        return
    if device != "cpu":
        raise EngineError(
            f"workers compute on the CPU, not on {device}",
            where="--workers" if address is None else "--ray-address",
            remedy="leave one of the options out",
        )
