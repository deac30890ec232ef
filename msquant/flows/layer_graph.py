"""What a quantization does to a model: tasks, what each waits for, and how one process runs them.

The inputs of a layer are the floating-point outputs of the one before, so the floating-point pass alone is a
chain. Everything else of a layer waits for that layer's inputs and for nothing more:

    embed ─► compute 0 ─► compute 1 ─► compute 2 ─► ...
        │            │            │
        ▼            ▼            ▼
    quantize 0   quantize 1   quantize 2 ...

In one process a layer is one task, `pass`, because the first step of its quantization gives its outputs as
well. Layers lie in a folder between the tasks, and so do hidden states; a task that is run twice writes the
same bytes twice. Without calibration there is no chain: each part of the model is a task, `round`.
"""

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from msquant.interrupts import check_interrupt

Kind = Literal["embed", "compute", "quantize", "pass", "round"]
Key = tuple[Kind, int]

_DOING: dict[Kind, str] = {
    "embed": "embedding",
    "compute": "computing layer",
    "quantize": "quantizing layer",
    "pass": "quantizing layer",
    "round": "rounding part",
}


@dataclass(frozen=True)
class Task:
    """A piece of work on one layer, or on one part of a model without calibration.

    Attributes:
        kind: `embed`, the inputs of the first layer; `compute`, a layer's floating-point outputs; `quantize`,
            its quantized weights, written; `pass`, both; `round`, a part's rounded weights, written.
        index: of the layer or the part.
        after: the tasks whose results it reads, or that must have made room for it.
    """

    kind: Kind
    index: int
    after: tuple[Key, ...] = ()

    @property
    def key(self) -> Key:
        """What tells it from others."""
        return self.kind, self.index

    @property
    def on_chain(self) -> bool:
        """Whether layers after this one wait for it."""
        return self.kind != "quantize"

    def __str__(self) -> str:
        return _DOING[self.kind] if self.kind == "embed" else f"{_DOING[self.kind]} {self.index}"


@dataclass(frozen=True)
class Result:
    """What came of a task.

    Attributes:
        seconds: that it took.
        record: the journal's record of the layer or the part; None where none was written.
    """

    seconds: float
    record: dict[str, Any] | None = None


Done = Callable[[Task, Result], None]


class Work(Protocol):
    """What one process has open to do tasks."""

    def run(self, task: Task) -> Result:
        """Do a task. Raises MsquantError."""
        ...

    def release(self) -> None:
        """Let go of what other processes may remove between two tasks."""
        ...


class Job(Protocol):
    """What every task on one model is to know; it can be sent to other processes."""

    @property
    def device(self) -> str | None:
        """Whose arithmetic the bytes depend on, `cpu` or `ascend`; None for that of no processor."""
        ...

    def begin(self, source: Path, output: Path, number: int) -> Work:
        """Open the model and the folder that is made, in the worker with that number.

        Raises:
            MsquantError: the source is not what it was, or the device is not there.
        """
        ...


class Executor(Protocol):
    """Who runs the tasks."""

    def run(self, tasks: Sequence[Task], done: Done) -> None:
        """Run all tasks; `done` is called in this thread when one is done, in whatever order they end.

        Raises:
            MsquantError: as the first task that fails; nothing else is begun then.
            KeyboardInterrupt: Ctrl-C was pressed.
        """
        ...


class InProcess:
    """Runs one task after the other, in the order in which they are given.

    Args:
        work: does a task.
    """

    def __init__(self, work: Callable[[Task], Result]) -> None:
        self._work = work

    def run(self, tasks: Sequence[Task], done: Done) -> None:
        """As `Executor.run`."""
        for task in tasks:
            done(task, self._work(task))
            check_interrupt()


class InThreads:
    """Runs some tasks side by side in threads of this process; none of them waits for another.

    Args:
        work: does a task, and looks at Ctrl-C.
        count: of threads.
    """

    def __init__(self, work: Callable[[Task], Result], count: int) -> None:
        self._work, self._count = work, count

    def run(self, tasks: Sequence[Task], done: Done) -> None:
        """As `Executor.run`."""
        with ThreadPoolExecutor(self._count, thread_name_prefix="task") as pool:
            futures = {pool.submit(self._work, task): task for task in tasks}
            try:
                for future in as_completed(futures):
                    done(futures[future], future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def layer_tasks(
    count: int,
    finished: Collection[int],
    made: Collection[int],
    ahead: int | None = None,
    *,
    recompute: bool = False,
) -> list[Task]:
    """The tasks that are left, each behind those that it waits for.

    Args:
        count: layers in all.
        finished: those that are quantized already.
        made: the boundaries whose hidden states are there: 3 between layers 2 and 3.
        ahead: how many layers the floating-point pass may be ahead of the quantization, which bounds the
            hidden states on disk; None for one process, which does both at once.
        recompute: compute the outputs of finished layers whose hidden states are not there; an earlier run
            has left them, unless its layers were taken from another result.
    """
    unfinished = [index for index in range(count) if index not in finished]
    if not unfinished:
        return []
    first, last = unfinished[0], unfinished[-1]
    if first not in made and first - 1 in made:
        # The layer before was quantized, and the run ended before its outputs were computed.
        first -= 1
    while recompute and first > 0 and first not in made:
        first -= 1
    tasks: list[Task] = []
    makers: dict[int, Key] = {}

    def add(kind: Kind, index: int, makes: int | None, *after: Key) -> None:
        inputs = (makers[index],) if kind != "embed" and index in makers else ()
        tasks.append(Task(kind, index, (*inputs, *after)))
        if makes is not None:
            makers[makes] = tasks[-1].key

    if first == 0:
        add("embed", 0, 0)
    for index in range(first, last + 1):
        if ahead is None and index not in finished:
            add("pass", index, index + 1)
            continue
        # Its outputs may be there from a run that did not come to quantize it.
        if index < last and index + 1 not in made:
            room: list[Key] = []
            if ahead is not None and index - ahead in unfinished:
                room.append(("quantize", index - ahead))
            add("compute", index, index + 1, *room)
        if index not in finished:
            add("quantize", index, None)
    return tasks


class Schedule:
    """Which task is to be begun next: of those that wait for nothing, one of the chain before others.

    Args:
        tasks: each behind those that it waits for.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        keys = {task.key for task in tasks}
        self._order = {task.key: place for place, task in enumerate(tasks)}
        self._waiting = {task.key: set(task.after) & keys for task in tasks}
        self._tasks = {task.key: task for task in tasks}
        self._undone = set(keys)
        self._ready: list[tuple[bool, int, Key]] = []
        for task in tasks:
            if not self._waiting[task.key]:
                self.put_back(task)

    @property
    def left(self) -> bool:
        """Whether a task is not done yet."""
        return bool(self._undone)

    def next(self) -> Task | None:
        """A task to begin now; None if all that is left waits for others."""
        return self._tasks[heapq.heappop(self._ready)[2]] if self._ready else None

    def put_back(self, task: Task) -> None:
        """A task that was begun is to be begun anew."""
        heapq.heappush(self._ready, (not task.on_chain, self._order[task.key], task.key))

    def done(self, task: Task) -> None:
        """A task is done."""
        self._undone.discard(task.key)
        for key, waiting in self._waiting.items():
            if task.key in waiting:
                waiting.remove(task.key)
                if not waiting:
                    self.put_back(self._tasks[key])


def makespan(tasks: Sequence[Task], seconds: Mapping[Key, float], workers: int) -> float:
    """How long so many workers take for tasks, by the rule of `Schedule`.

    Args:
        tasks: each behind those that it waits for.
        seconds: of each.
        workers: each does one task at a time.
    """
    schedule, running, now = Schedule(tasks), list[tuple[float, int, Task]](), 0.0
    begun = 0
    while schedule.left:
        while len(running) < workers and (task := schedule.next()) is not None:
            begun += 1
            heapq.heappush(running, (now + seconds[task.key], begun, task))
        now, _, task = heapq.heappop(running)
        schedule.done(task)
    return now


def critical_path(tasks: Sequence[Task], seconds: Mapping[Key, float]) -> float:
    """How long tasks take at least, however many workers there are: their longest chain."""
    ends: dict[Key, float] = {}
    for task in tasks:
        ends[task.key] = seconds[task.key] + max((ends.get(key, 0.0) for key in task.after), default=0.0)
    return max(ends.values(), default=0.0)
