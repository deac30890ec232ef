"""The graph of tasks, played through: what bounds it, and what a disk and a network that are shared take."""

import math
import random

import pytest

from msquant.flows.layer_graph import Cut, Key, Task, layer_tasks
from msquant.planning.timeline import Cluster, LayerCost, TaskCost, play, play_layers


def alone(count: int, cost: TaskCost) -> tuple[list[Task], dict[Key, TaskCost]]:
    """Tasks that wait for nothing."""
    tasks = [Task("quantize", index) for index in range(count)]
    return tasks, {task.key: cost for task in tasks}


def test_the_chain_bounds_what_workers_can_do() -> None:
    tasks = layer_tasks(10, (), (), ahead=100)
    costs = {task.key: TaskCost({"embed": 0.0, "compute": 1.0, "quantize": 4.0}[task.kind]) for task in tasks}
    one, two, many = (play(tasks, costs, Cluster(count)) for count in (1, 2, 100))
    # Nine layers are computed, and the last one is quantized after that.
    assert one.chain == two.chain == many.chain == {"embed": 0, "compute": 9, "quantize": 4}
    assert (one.seconds, many.seconds) == (9 + 40, 13)
    assert 49 / 2 <= two.seconds <= 28
    assert (one.bound, many.bound) == ("computing", "chain")


def test_more_cores_divide_a_part_of_the_computing() -> None:
    tasks, costs = alone(1, TaskCost(10))
    assert play(tasks, costs, Cluster(1, cores=4, parallel=0.8)).seconds == pytest.approx(2 + 8 / 4)


def test_those_that_read_at_the_same_time_share_the_disk_and_their_nodes_network() -> None:
    tasks, costs = alone(4, TaskCost(5, read=100))
    # The disk gives each of four 25 bytes a second; two of a node have 10 each of its network.
    assert play(tasks, costs, Cluster(4, disk=100)).seconds == pytest.approx(4 + 5)
    assert play(tasks, costs, Cluster(2, 2, network=20, disk=100)).seconds == pytest.approx(10 + 5)
    assert play(tasks, costs, Cluster(4)).seconds == 5
    timeline = play(tasks, costs, Cluster(4, disk=100))
    assert (timeline.transferred, timeline.disk, timeline.computing) == (400, 4, 5)


def test_what_one_reads_while_another_computes_is_as_fast_as_alone() -> None:
    first, second = Task("compute", 0), Task("compute", 1, (Key("embed", 0),))
    embed = Task("embed", 0)
    costs = {first.key: TaskCost(10, read=100), embed.key: TaskCost(3), second.key: TaskCost(1, read=100)}
    # The first reads until second 2, when the other has not begun to.
    timeline = play([embed, first, second], costs, Cluster(2, disk=50))
    assert timeline.seconds == pytest.approx(2 + 10)


@pytest.mark.parametrize("seed", range(10))
def test_no_number_of_workers_is_faster_than_the_bounds(seed: int) -> None:
    choose = random.Random(seed)
    kinds = ("compute", "quantize", "attention", "experts", "combine", "search", "finish")
    layers = {
        index: LayerCost(
            {kind: choose.uniform(0, 9) for kind in kinds},
            *(choose.randrange(1000) for _ in range(3)),
            *(20, 5, 4, 3),
        )
        for index in range(8)
    }
    cuts = {index: Cut(2, choose.randrange(1, 6), 2) for index in range(3, 8)}
    cluster = Cluster(choose.randrange(1, 6), choose.randrange(1, 4), network=300, disk=500)
    timeline = play_layers(layers, {} if cluster.count == 1 else cuts, cluster)
    assert timeline.seconds >= max(timeline.computing, timeline.chain_seconds, timeline.disk) - 1e-9
    assert math.isfinite(timeline.seconds)
    # One worker does them one after the other.
    one = Cluster(1, network=300, disk=500)
    alone = play_layers(layers, {}, one)
    tasks = layer_tasks(8, (), ())
    assert alone.seconds == pytest.approx(sum(one.alone(layers[t.index].cost(t)) for t in tasks))
