"""How long workers take for the graph of tasks on decoder layers: it is played through, event by event.

A worker does one task at a time: it reads, computes, and writes. Computing takes what it takes on one core,
but for the share that more cores divide (Amdahl, 1967). What is read and written goes over its node's network
and to the one disk that all share: those that do it at the same time get equal parts of either.

simpy's resources are held by one process at a time, and not divided among all that use them; so the loop is
our own.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

from msquant.flows.layer_graph import Cut, Key, Kind, Schedule, Task, layer_tasks
from msquant.flows.workers import layers_ahead
from msquant.models.config import ModelConfig
from msquant.planning.blocks import Tokens

NETWORK, DISK = 10e9 / 8, 2e9
"""Bytes a second, to and from a node each, and of the shared disk, where nobody has measured them."""

_FLOAT = 4


@dataclass(frozen=True)
class TaskCost:
    """What a task takes.

    Attributes:
        seconds: of computing, on one core.
        read: bytes of the source and of other tasks' results.
        written: bytes.
    """

    seconds: float
    read: float = 0
    written: float = 0


@dataclass(frozen=True)
class Cluster:
    """Who does the tasks.

    Attributes:
        nodes: machines.
        workers: of each node.
        cores: of each worker.
        parallel: share of a task's computing that a worker's cores divide.
        network: bytes a second to a node, and as many from it.
        disk: bytes a second of the disk that all nodes share.
        slower: what all computing takes longer by.
    """

    nodes: int
    workers: int = 1
    cores: int = 1
    parallel: float = 0.0
    network: float = inf
    disk: float = inf
    slower: float = 1.0

    @property
    def count(self) -> int:
        """All workers."""
        return self.nodes * self.workers

    def computing(self, cost: TaskCost) -> float:
        """Seconds in which a worker computes a task."""
        return self.slower * cost.seconds * (1 - self.parallel + self.parallel / self.cores)

    def alone(self, cost: TaskCost) -> float:
        """Seconds of a task if nobody else reads or writes."""
        rate = min(self.network, self.disk)
        return self.computing(cost) + (cost.read + cost.written) / rate


@dataclass(frozen=True)
class Timeline:
    """How it went.

    Attributes:
        seconds: until the last task is done.
        chain: what the longest chain of tasks takes, each of them alone, by the kind of task.
        computing: seconds if all workers computed all of the time and waited for nothing.
        transferred: bytes read and written, which go over the network where there are several nodes.
        disk: seconds in which the disk reads and writes them.
    """

    seconds: float
    chain: dict[Kind, float]
    computing: float
    transferred: float
    disk: float

    @property
    def chain_seconds(self) -> float:
        """Of the longest chain."""
        return sum(self.chain.values())

    @property
    def bound(self) -> str:
        """What bounds it most: `chain`, `computing` or `disk`."""
        bounds = {"chain": self.chain_seconds, "computing": self.computing, "disk": self.disk}
        return max(bounds, key=lambda name: bounds[name])


@dataclass
class _Transfer:
    """Bytes on their way from or to a node."""

    task: Task
    worker: int
    node: int
    left: float
    writes: bool


def play(tasks: Sequence[Task], costs: Mapping[Key, TaskCost], cluster: Cluster) -> Timeline:
    """Let workers do tasks by the rule of `Schedule`.

    Args:
        tasks: each behind those that it waits for.
        costs: of each.
        cluster: who does them.
    """
    schedule, now, begun = Schedule(tasks), 0.0, 0
    # The next idle worker is on another node than the last one.
    idle = [(number // cluster.nodes, number % cluster.nodes) for number in range(cluster.count)][::-1]
    computing: list[tuple[float, int, Task, tuple[int, int]]] = []
    moving: list[_Transfer] = []
    while schedule.left:
        while idle and (task := schedule.next()) is not None:
            worker, node = idle.pop()
            moving.append(_Transfer(task, worker, node, costs[task.key].read, False))
        shares = Counter((each.node, each.writes) for each in moving)
        rates = [
            min(cluster.network / shares[each.node, each.writes], cluster.disk / len(moving))
            for each in moving
        ]
        ends = [each.left / rate if rate < inf else 0.0 for each, rate in zip(moving, rates, strict=True)]
        step = min([*ends, *([computing[0][0] - now] if computing else [])])
        now += step
        still = []
        for each, rate, end in zip(moving, rates, ends, strict=True):
            if end > step:
                each.left -= rate * step
                still.append(each)
            elif each.writes:
                schedule.done(each.task)
                idle.append((each.worker, each.node))
            else:
                begun += 1
                done = now + cluster.computing(costs[each.task.key])
                heappush(computing, (done, begun, each.task, (each.worker, each.node)))
        moving = still
        while computing and computing[0][0] <= now:
            _, _, task, (worker, node) = heappop(computing)
            moving.append(_Transfer(task, worker, node, costs[task.key].written, True))
    transferred = sum(cost.read + cost.written for cost in (costs[task.key] for task in tasks))
    return Timeline(
        now,
        _chain(tasks, {task.key: cluster.alone(costs[task.key]) for task in tasks}),
        sum(cluster.computing(costs[task.key]) for task in tasks) / cluster.count,
        transferred,
        transferred / cluster.disk,
    )


def _chain(tasks: Sequence[Task], seconds: Mapping[Key, float]) -> dict[Kind, float]:
    """The longest chain of tasks by its kinds, which bounds any number of workers."""
    ends: dict[Key, float] = {}
    before: dict[Key, Key | None] = {}
    for task in tasks:
        last = max((key for key in task.after if key in ends), key=lambda key: ends[key], default=None)
        before[task.key] = last
        ends[task.key] = seconds[task.key] + (0.0 if last is None else ends[last])
    key = max(ends, key=lambda key: ends[key], default=None)
    kinds: dict[Kind, float] = {}
    while key is not None:
        kinds[key.kind] = seconds[key] + kinds.get(key.kind, 0.0)
        key = before[key]
    return kinds


@dataclass(frozen=True)
class LayerCost:
    """What the tasks on one decoder layer take.

    Attributes:
        seconds: of computing on one core, of all tasks of a kind together.
        attention: bytes of its attention block and all else that belongs to no expert.
        experts: bytes of its experts, or of its one feed-forward block.
        output: bytes of its shards.
        tokens: calibration tokens.
        first: those of the first batch.
        hidden: bytes of a token between layers.
        met: experts that work on a token.
    """

    seconds: Mapping[Kind, float]
    attention: int
    experts: int
    output: int
    tokens: int
    first: int
    hidden: int
    met: int

    def cost(self, task: Task) -> TaskCost:
        """Of one of its tasks."""
        states, first = self.tokens * self.hidden, self.first * self.hidden
        attention, chunks, shards = task.cut or (1, 1, 1)
        # What is read of the source and of other tasks, and what is written.
        read, written = {
            "embed": (0, states),
            "compute": (states + self.attention + self.experts, states),
            "pass": (states + self.attention + 2 * self.experts, states + self.output),
            "attention": (states / attention + self.attention, states / attention),
            "experts": (states + self.experts / chunks, self.met * states / chunks),
            "combine": (states + self.met * states, states + first),
            "search": (states + self.attention, self.attention + first),
            "quantize": (
                (first + self.experts / shards, (self.output + self.met * first) / shards)
                if task.cut
                else (states + self.attention + 2 * self.experts, self.output)
            ),
            "finish": (3 * first + self.met * first, 0),
        }[task.kind]
        return TaskCost(self.seconds.get(task.kind, 0.0) / task.parts, read, written)

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        index: int,
        sizes: Mapping[str, int],
        output: int,
        tokens: Tokens,
        seconds: Mapping[Kind, float],
    ) -> "LayerCost":
        """Of layer `index`.

        Args:
            config: the model's shape.
            index: of the layer.
            sizes: bytes of its tensors in the source, by name.
            output: bytes of its shards.
            tokens: of the calibration.
            seconds: see above.
        """
        inner = tuple(f"{name}." for name in config.expert_names(index))
        experts = sum(size for name, size in sizes.items() if name.startswith(inner))
        routed = config.experts if config.has_experts(index) else None
        met = 1 if routed is None else routed.per_token + bool(routed.shared)
        attention = sum(sizes.values()) - experts
        hidden = _FLOAT * config.hidden_size
        return cls(seconds, attention, experts, output, tokens.count, tokens.first, hidden, met)


def play_layers(layers: Mapping[int, LayerCost], cuts: Mapping[int, Cut], cluster: Cluster) -> Timeline:
    """Let workers quantize all layers of a model.

    Args:
        layers: what each takes, by its number.
        cuts: those that are shared, see `layer_cuts`; for one worker nothing is cut.
        cluster: who does it.
    """
    alone = cluster.count == 1
    ahead = None if alone else layers_ahead(cluster.count)
    tasks = layer_tasks(len(layers), (), (), ahead, cuts=None if alone else cuts)
    return play(tasks, {task.key: layers[task.index].cost(task) for task in tasks}, cluster)
