"""What a quantization does to a model: tasks, what each waits for, and how one process runs them.

The inputs of a layer are the floating-point outputs of the one before, so the floating-point pass alone is a
chain. Everything else of a layer waits for that layer's inputs and for nothing more:

    embed ─► compute 0 ─► compute 1 ─► compute 2 ─► ...
        │            │            │
        ▼            ▼            ▼
    quantize 0   quantize 1   quantize 2 ...

A layer with experts is cut, so that several workers share it. Each `attention` computes some batches, each of
its `experts` some of them on all tokens, and `combine` adds up what they give in the experts' order, whoever
computed them:

    ─► attention (A) ─► experts (C) ─► combine ─►
    │                        │            └──────────────┐
    └─► search ──────────────┴─► quantize (S) ─► finish ◄┘

`search` quantizes the attention block; each `quantize` writes one of the layer's S shards, with the experts
in it. In one process a layer is one task, `pass`, because the first step of its quantization gives its
outputs as well. Layers lie in a folder between the tasks, and so do hidden states; a task that is run twice
writes the same bytes twice. Without calibration there is no chain: each part of the model is a task, `round`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from msquant.interrupts import check_interrupt

Kind = Literal[
    "embed",
    "compute",
    "quantize",
    "pass",
    "attention",
    "experts",
    "combine",
    "search",
    "finish",
    "forward",
    "differ",
    "predict",
    "measure",
    "round",
]

_DOING: dict[Kind, str] = {
    "embed": "embedding",
    "compute": "computing",
    "quantize": "quantizing",
    "pass": "quantizing",
    "attention": "computing attention of",
    "experts": "computing experts of",
    "combine": "adding up",
    "search": "quantizing attention of",
    "finish": "finishing",
    "forward": "computing",
    "differ": "comparing",
    "predict": "predicting behind",
    "measure": "measuring",
    "round": "rounding",
}

# Layers after the one at hand do not wait for these.
_OFF_CHAIN: tuple[Kind, ...] = ("quantize", "search", "finish", "differ", "measure")


class Key(NamedTuple):
    """What tells a task from others: its kind, its layer, and which of that layer's parts."""

    kind: Kind
    layer: int
    part: int = 0


class Cut(NamedTuple):
    """Into how many tasks of a kind a layer with experts is cut."""

    attention: int
    experts: int
    quantize: int


@dataclass(frozen=True)
class Task:
    """A piece of work on one layer, or on one part of a model without calibration.

    Attributes:
        kind: `embed`, the inputs of the first layer; `compute`, a layer's floating-point outputs; `quantize`,
            its quantized weights, written; `pass`, both. Of a layer that is cut: `attention`, the states
            between its blocks; `experts`, some experts' outputs and ranges; `combine`, the layer's outputs;
            `search`, its quantized attention; `quantize`, one of its shards; `finish`, what is said of it. Of
            an evaluation: see `evaluation_work.py`; of a ranking, see `analysis_work.py`. Without
            calibration: `round`, a part's rounded weights, written.
        index: of the layer, or of the part of a model without calibration.
        after: the tasks whose results it reads, or that must have made room for it.
        part: which of the `parts` that are alike.
        parts: how many there are.
        cut: of the layer; None where it is whole.
    """

    kind: Kind
    index: int
    after: tuple[Key, ...] = ()
    part: int = 0
    parts: int = 1
    cut: Cut | None = None

    @property
    def key(self) -> Key:
        """What tells it from others."""
        return Key(self.kind, self.index, self.part)

    @property
    def on_chain(self) -> bool:
        """Whether layers after this one wait for it."""
        return self.kind not in _OFF_CHAIN

    def __str__(self) -> str:
        if self.kind == "embed":
            return _DOING[self.kind]
        which = f" ({self.part + 1} of {self.parts})" if self.parts > 1 else ""
        what = "part" if self.kind == "round" else "layer"
        return f"{_DOING[self.kind]} {what} {self.index}{which}"


@dataclass(frozen=True)
class Result:
    """What came of a task.

    Attributes:
        seconds: that it took.
        record: the journal's record of the layer or part, or what `finish` makes it of; None where none is.
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
    cuts: Mapping[int, Cut] | None = None,
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
        cuts: the layers that several workers share; none for one process.
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
    ends: dict[int, Key] = {}

    def add(kind: Kind, index: int, *after: Key, parts: int = 1) -> list[Key]:
        added = [Task(kind, index, after, part, parts, cut) for part in range(parts)]
        tasks.extend(added)
        return [task.key for task in added]

    cut = None
    if first == 0:
        (makers[0],) = add("embed", 0)
    for index in range(first, last + 1):
        inputs, left = [makers[index]] if index in makers else [], index not in finished
        if ahead is None and left:
            (makers[index + 1],) = add("pass", index, *inputs)
            continue
        # Its outputs may be there from a run that did not come to quantize it.
        asked = index < last and index + 1 not in made
        room = [ends[index - ahead]] if ahead is not None and index - ahead in ends else []
        if (cut := (cuts or {}).get(index)) is None:
            if asked:
                (makers[index + 1],) = add("compute", index, *inputs, *room)
            if left:
                (ends[index],) = add("quantize", index, *inputs)
        elif asked or left:
            # What is kept of the experts' outputs in floating point is what the layer is compared with.
            attention = add("attention", index, *inputs, *room, parts=cut.attention)
            computed = add("experts", index, *attention, parts=cut.experts)
            combined = add("combine", index, *computed)
            if asked:
                (makers[index + 1],) = combined
            if left:
                searched = add("search", index, *inputs, *room)
                shards = add("quantize", index, *searched, *computed, parts=cut.quantize)
                (ends[index],) = add("finish", index, *combined, *shards)
    return tasks


class Schedule:
    """Which task is to be begun next: of those that wait for nothing, one of the chain before others.

    Args:
        tasks: each behind those that it waits for.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._order = {task.key: place for place, task in enumerate(tasks)}
        self._tasks = {task.key: task for task in tasks}
        self._waiting = {task.key: len(self._tasks.keys() & set(task.after)) for task in tasks}
        self._behind: dict[Key, list[Task]] = {task.key: [] for task in tasks}
        for task in tasks:
            for key in self._tasks.keys() & set(task.after):
                self._behind[key].append(task)
        self._undone = set(self._tasks)
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
        return self._tasks[heappop(self._ready)[2]] if self._ready else None

    def put_back(self, task: Task) -> None:
        """A task that was begun is to be begun anew."""
        heappush(self._ready, (not task.on_chain, self._order[task.key], task.key))

    def done(self, task: Task) -> None:
        """A task is done."""
        self._undone.discard(task.key)
        for behind in self._behind[task.key]:
            self._waiting[behind.key] -= 1
            if not self._waiting[behind.key]:
                self.put_back(behind)
