"""The graph of tasks on decoder layers: what waits for what, and who is begun first."""

import random

import pytest

from msquant.flows.layer_graph import Cut, Key, Schedule, Task, layer_tasks


def shown(tasks: list[Task]) -> list[tuple[str, int]]:
    return [(task.kind, task.index) for task in tasks]


def test_one_process_does_a_layer_in_one_go() -> None:
    tasks = layer_tasks(3, (), ())
    assert shown(tasks) == [("embed", 0), ("pass", 0), ("pass", 1), ("pass", 2)]
    assert [task.after for task in tasks] == [(), (Key("embed", 0),), (Key("pass", 0),), (Key("pass", 1),)]


def test_several_have_a_chain_and_what_hangs_on_it() -> None:
    tasks = layer_tasks(3, (), (), ahead=8)
    assert shown(tasks) == [
        ("embed", 0),
        ("compute", 0),
        ("quantize", 0),
        ("compute", 1),
        ("quantize", 1),
        # Nothing reads the outputs of the last layer.
        ("quantize", 2),
    ]
    assert tasks[-1].after == (Key("compute", 1),)


def test_the_chain_is_ahead_by_so_many_layers_and_no_more() -> None:
    waits = {task.key: task.after for task in layer_tasks(9, (), (), ahead=3)}
    assert Key("quantize", 2) in waits[Key("compute", 5)]
    assert Key("quantize", 2) not in waits[Key("compute", 4)]


@pytest.mark.parametrize("ahead", [None, 3])
def test_a_later_run_does_what_is_left(ahead: int | None) -> None:
    # Layers 0 and 3 are finished; the inputs of 1 and 2 are there, and the outputs of 3 are not.
    tasks = shown(layer_tasks(6, {0, 3}, {1, 2}, ahead))
    assert not {("embed", 0), ("quantize", 0), ("quantize", 3), ("pass", 3), ("compute", 0)} & set(tasks)
    assert ("compute", 3) in tasks
    if ahead is None:
        assert tasks == [("pass", 1), ("pass", 2), ("compute", 3), ("pass", 4), ("pass", 5)]
    else:
        assert ("compute", 1) not in tasks
        assert ("compute", 2) in tasks


@pytest.mark.parametrize("ahead", [None, 3])
def test_outputs_that_a_killed_run_did_not_come_to_are_computed(ahead: int | None) -> None:
    # Layer 1 is quantized, its inputs are there and its outputs are not.
    tasks = layer_tasks(5, {0, 1}, {1}, ahead)
    assert shown(tasks)[0] == ("compute", 1)
    assert tasks[1].after == (Key("compute", 1),)


@pytest.mark.parametrize("ahead", [None, 3])
def test_layers_that_were_taken_from_elsewhere_are_computed_for_those_behind_them(ahead: int | None) -> None:
    tasks = shown(layer_tasks(4, {0, 1, 3}, (), ahead, recompute=True))
    last = ("pass", 2) if ahead is None else ("quantize", 2)
    assert tasks == [("embed", 0), ("compute", 0), ("compute", 1), last]
    assert shown(layer_tasks(4, {0, 1, 3}, {1}, ahead, recompute=True)) == [("compute", 1), last]


def test_nothing_is_left_when_all_layers_are_finished() -> None:
    assert layer_tasks(2, {0, 1}, ()) == []


@pytest.mark.parametrize("seed", range(20))
def test_every_task_is_begun_once_and_after_what_it_reads(seed: int) -> None:
    choose = random.Random(seed)
    finished = set(choose.sample(range(12), choose.randrange(12)))
    cuts = {index: Cut(*(choose.randrange(1, 4) for _ in range(3))) for index in range(3, 12)}
    tasks = layer_tasks(12, finished, set(), ahead=choose.randrange(1, 5), cuts=cuts)
    schedule, done, running = Schedule(tasks), set[Key](), list[Task]()
    while schedule.left:
        while len(running) < 3 and (task := schedule.next()) is not None:
            assert set(task.after) & {each.key for each in tasks} <= done
            running.append(task)
        assert running, "a task waits for what nobody does"
        task = running.pop(choose.randrange(len(running)))
        if choose.random() < 0.3:
            schedule.put_back(task)
            continue
        assert task.key not in done
        done.add(task.key)
        schedule.done(task)
    assert done == {task.key for task in tasks}


def test_a_layer_that_is_cut_is_computed_and_quantized_in_pieces() -> None:
    tasks = layer_tasks(2, (), (), ahead=3, cuts={1: Cut(2, 3, 2)})
    waits = {task.key: set(task.after) for task in tasks}
    experts = {Key("experts", 1, part) for part in range(3)}
    shards = {Key("quantize", 1, part) for part in range(2)}
    attention = {Key("attention", 1, part) for part in range(2)}
    assert all(waits[key] == {Key("compute", 0)} for key in [*attention, Key("search", 1)])
    assert all(waits[key] == attention for key in experts)
    assert waits[Key("combine", 1)] == experts
    assert all(waits[key] == {Key("search", 1)} | experts for key in shards)
    assert waits[Key("finish", 1)] == {Key("combine", 1)} | shards
    assert {task.kind for task in tasks if not task.on_chain} == {"search", "quantize", "finish"}
    # Its outputs alone are asked for where another run has quantized it; its inputs are there.
    left = layer_tasks(3, {0, 1}, {1}, ahead=3, cuts={1: Cut(1, 2, 2)})
    assert shown(left) == [
        *[("attention", 1), ("experts", 1), ("experts", 1), ("combine", 1)],
        ("quantize", 2),
    ]
