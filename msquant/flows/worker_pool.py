"""Tasks on a model, done by worker processes of this machine or of a cluster's nodes.

Which task goes to whom is decided here, so that the chain of the floating-point pass comes first. A worker
that dies is replaced, and its task is done anew: it writes the same bytes. Tasks and results are small;
weights and hidden states go through the folders.
"""

import os
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from msquant.checkpoint.output_folder import remove_path
from msquant.checkpoint.writer import is_temporary
from msquant.deploy.ascend_checks import Check
from msquant.errors import EngineError, MsquantError
from msquant.flows.layer_graph import Done, Job, Schedule, Task
from msquant.flows.layer_work import SCRATCH
from msquant.flows.node_checks import NodeReport, alike_checks, answer_of, require_alike
from msquant.flows.worker_process import Failure
from msquant.flows.workers import Workers, require_workers
from msquant.interrupts import check_interrupt
from msquant.progress import Progress

MOST_DEATHS = 3
"""Workers that may die of one task before the run gives up."""

TICK = 0.1
"""Seconds between two looks at Ctrl-C."""


class WorkerDied(Exception):  # noqa: N818 - it is told to the pool alone
    """A worker's process has ended, or the way to it is broken."""


class PlaceLost(WorkerDied):
    """So has its node, and none can be started there."""


class Hand(Protocol):
    """One worker; it answers one call before it gets the next."""

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method of its `WorkerProcess`."""
        ...

    def answer(self) -> Any:
        """What the call has returned, after `Crew.wait`. Raises WorkerDied."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


class Crew(Protocol):
    """Where workers come from; closed when all are done with."""

    count: int

    def threads(self, number: int) -> int:
        """Cores of the worker with that number."""
        ...

    def hire(self, number: int) -> Hand:
        """Start the worker with that number, from 0, or another in its place. Raises PlaceLost."""
        ...

    def wait(self, hands: Sequence[Any], seconds: float) -> Sequence[Any]:
        """Those of the called workers that have answered or died, at the latest after so many seconds."""
        ...

    def close(self) -> None:
        """End all workers that are left, and whatever else was started."""
        ...


class _Worker:
    """A worker's hand, number, part of its node's cores, and its node's name once it is known."""

    def __init__(self, hand: Hand, number: int) -> None:
        self.hand, self.number, self.slot, self.host = hand, number, number, ""


class WorkerPool:
    """Runs tasks in worker processes; a context manager around all of them, which leaves none behind.

    Args:
        workers: how many, and where.
        progress: callbacks.

    Raises:
        EngineError: on entering: the memory is too small for so many, Ray is not installed, or the cluster is
            not reached.
    """

    def __init__(self, workers: Workers, progress: Progress) -> None:
        self._asked, self._progress = workers, progress
        self._where = "--ray-address" if workers.address else "--workers"
        self._crew: Crew | None = None
        self._workers: list[_Worker] = []
        self._job: tuple[Job, Path, Path] | None = None

    @property
    def count(self) -> int:
        """How many workers there are."""
        return len(self._workers)

    def __enter__(self) -> Self:
        if self._asked.address is None:
            from msquant.flows.local_workers import LocalCrew

            cores = len(os.sched_getaffinity(0))
            shared = f" on {cores} cores, which is no faster" if (self._asked.count or 1) > cores else ""
            self._progress.stage(f"starting {self._asked.count} workers{shared}")
            self._crew = LocalCrew(self._asked)
        else:
            from msquant.flows.ray_workers import RayCrew

            self._progress.stage(f"joining the Ray cluster at {self._asked.address}")
            self._crew = RayCrew(self._asked)
        try:
            self._workers = [_Worker(self._crew.hire(n), n) for n in range(self._crew.count)]
            slots = Counter[str]()
            for worker, node in zip(self._workers, self._ask("node", lambda worker: ()), strict=True):
                worker.slot = slots[node]
                slots[node] += 1
        except BaseException:
            self._crew.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._crew is not None:
            self._crew.close()

    def look(
        self, device: str | None = "cpu", source: Path | None = None, output: Path | None = None
    ) -> list[NodeReport]:
        """What each worker has and sees.

        Args:
            device: whose arithmetic they are to show, as `Job.device`.
            source: folder of the weights, of which each takes the fingerprint.
            output: a folder in which each reads a file of this process and leaves one; removed again.

        Raises:
            EngineError: a worker dies, or sees another folder than this process does.
        """
        assert self._crew is not None
        threads, word, probe = self._crew.threads, secrets.token_hex(16), None
        if output is not None:
            probe = output / f".probe.{os.getpid()}.tmp"
            probe.write_text(word)
        try:
            reports = self._ask(
                "look", lambda w: (w.slot, threads(w.number), device, source, probe, w.number)
            )
            for worker, report in zip(self._workers, reports, strict=True):
                worker.host = report.host
                if probe is None:
                    continue
                answer = answer_of(probe, worker.number)
                left = answer.read_text() if answer.exists() else None
                answer.unlink(missing_ok=True)
                if report.probe != word or left != word:
                    raise EngineError(
                        f"node {report.host} does not see this folder as this machine does",
                        where=output,
                        remedy="put the output on a disk that all nodes mount at the same path",
                    )
        finally:
            if probe is not None:
                probe.unlink(missing_ok=True)
        return reports

    def prepare(self, job: Job, source: Path, sha256: str, output: Path) -> None:
        """Check that all nodes are alike and see the folders, and tell every worker what to do.

        Args:
            job: what tasks are to know.
            source: folder of the weights.
            sha256: its fingerprint here.
            output: the folder that is made.

        Raises:
            EngineError: they are not; names the node, what differs and the remedy.
        """
        reports = self.look(job.device, source, output)
        require_alike(reports, source, sha256, different_arithmetic=self._asked.allow_different_arithmetic)
        for left in (output / SCRATCH).glob("worker-*"):
            # Of workers of an earlier run, which was killed.
            remove_path(left)
        self._job = job, source, output
        self._ask("begin", self._beginning)

    def run(self, tasks: Sequence[Task], done: Done) -> None:
        """As `Executor.run`."""
        assert self._crew is not None
        assert self._job is not None
        schedule, deaths = Schedule(tasks), Counter[Task | int]()
        doing: dict[_Worker, Task | None] = {}
        idle = list(self._workers)
        while schedule.left:
            while idle and (task := schedule.next()) is not None:
                worker = idle.pop(0)
                doing[worker] = task
                worker.hand.call("run", task)
            self._say(doing)
            for worker in self._answered(list(doing)):
                task = doing.pop(worker)
                try:
                    result = worker.hand.answer()
                except WorkerDied as death:
                    cause = worker.number if task is None else task
                    deaths[cause] += 1
                    if deaths[cause] >= MOST_DEATHS:
                        raise _died(task, deaths[cause], worker) from death
                    if task is not None:
                        schedule.put_back(task)
                    again = "another begins" if task is None else "its task is done anew"
                    self._progress.stage(f"a worker on {worker.host} died; {again}")
                    worker.hand.kill()
                    try:
                        worker.hand = self._crew.hire(worker.number)
                    except PlaceLost as lost:
                        self._go_on_without(worker, lost)
                        continue
                    doing[worker] = None
                    worker.hand.call("begin", *self._beginning(worker))
                    continue
                if isinstance(result, Failure):
                    raise result.error(worker.host if self._asked.address else None)
                idle.append(worker)
                if task is not None:
                    schedule.done(task)
                    done(task, result)
        for path in self._job[2].iterdir():
            # Of a worker that died.
            if is_temporary(path.name):
                path.unlink()

    def _go_on_without(self, worker: _Worker, lost: PlaceLost) -> None:
        self._workers.remove(worker)
        if not self._workers:
            raise EngineError(
                f"the last worker is gone: {lost}",
                where=worker.host or self._where,
                remedy="start nodes, and the same command again: it continues with the layers that are left",
            ) from lost
        self._progress.stage(f"node {worker.host or 'of a worker'} is lost; {self.count} go on")

    def _answered(self, workers: Sequence[_Worker]) -> list[_Worker]:
        """Those that have answered or died; waits a tick for them, and looks at Ctrl-C."""
        assert self._crew is not None
        ready = self._crew.wait([worker.hand for worker in workers], TICK)
        check_interrupt()
        return [worker for worker in workers if worker.hand in ready]

    def _ask(self, method: str, arguments: Callable[[_Worker], tuple[Any, ...]]) -> list[Any]:
        """The answers of all workers to one call, in order; of one that dies, its successor's.

        One whose node is lost is gone on without.
        What is asked needs nothing that a worker was told before.
        """
        assert self._crew is not None
        for worker in self._workers:
            worker.hand.call(method, *arguments(worker))
        answers: dict[int, Any] = {}
        deaths = Counter[int]()
        while len(answers) < self.count:
            self._progress.step(f"{len(answers)} of {self.count} workers have answered")
            for worker in self._answered([w for w in self._workers if w.number not in answers]):
                try:
                    answer = worker.hand.answer()
                except WorkerDied as death:
                    deaths[worker.number] += 1
                    worker.hand.kill()
                    try:
                        if deaths[worker.number] >= MOST_DEATHS:
                            raise death
                        worker.hand = self._crew.hire(worker.number)
                    except PlaceLost as lost:
                        self._go_on_without(worker, lost)
                        continue
                    except WorkerDied as last:
                        raise EngineError(
                            f"{deaths[worker.number]} workers died before they began: {last}",
                            where=self._where,
                            remedy="run msquant doctor there: every node needs the same msquant, and memory",
                        ) from last
                    worker.hand.call(method, *arguments(worker))
                    continue
                if isinstance(answer, Failure):
                    raise answer.error(worker.host if self._asked.address else None)
                answers[worker.number] = answer
        return [answers[worker.number] for worker in self._workers]

    def _beginning(self, worker: _Worker) -> tuple[Any, ...]:
        assert self._job is not None
        assert self._crew is not None
        return (worker.slot, self._crew.threads(worker.number), *self._job, worker.number)

    def _say(self, doing: dict[_Worker, Task | None]) -> None:
        names = sorted(str(task) for task in doing.values() if task is not None)
        self._progress.step(f"{len(names)} of {self.count} workers: {', '.join(names)}")


def diagnose_cluster(address: str) -> list[Check]:
    """Look at every node of a Ray cluster, for `msquant doctor`.

    Args:
        address: `HOST:PORT`.

    Raises:
        EngineError: Ray is not installed or the cluster is not reached; or a node cannot start msquant.
    """
    require_workers(None, address, "cpu")
    with WorkerPool(Workers(address=address), Progress()) as pool:
        return alike_checks(pool.look())


def _died(task: Task | None, times: int, worker: _Worker) -> MsquantError:
    doing = "before it began" if task is None else f"each time at {task}"
    return EngineError(
        f"{times} workers died, {doing}",
        where=worker.host or None,
        remedy="see whether memory was short (dmesg), and use fewer workers; the same command continues",
    )
