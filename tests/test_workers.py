"""Layers that worker processes share: the same bytes, whoever dies; nothing is left running."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from msquant.checkpoint.json_file import read_json
from msquant.errors import EngineError
from msquant.evaluation.inputs import Text
from msquant.flows import model_free
from msquant.flows.analysis import analyze
from msquant.flows.comparison import score_folders
from msquant.flows.layer_graph import Done, Job, Schedule, Task
from msquant.flows.model_free import quantize_model_free
from msquant.flows.pipeline import quantize
from msquant.flows.ray_workers import Place, RayCrew, _places, divided
from msquant.flows.workers import Workers, require_workers
from msquant.formats.folder_plan import plan_folder
from msquant.progress import Progress
from msquant.recipe.recipe import find_recipe
from tests.fixtures import quantize_process
from tests.fixtures.quantize_process import FEED_FORWARD, digests, journaled, records, start
from tests.fixtures.tiny_families import write_tiny
from tests.fixtures.tiny_strangers import write_stranger

LAYERS = 4
KILLS = 6
RECIPE = f"{quantize_process.RECIPE}evaluation:\n  sequences: 0\n"

ended = partial(quantize_process.ended, seconds=900)


@pytest.fixture(scope="module", params=FEED_FORWARD)
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workers")
    model = write_tiny(folder / "model", request.param, layers=LAYERS, dtype="bfloat16")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(model=model, feed_forward=FEED_FORWARD[request.param]))
    return path


@pytest.fixture(scope="module")
def expected(recipe: Path) -> dict[str, str]:
    """What one process writes that nobody disturbs."""
    ended(start(recipe, recipe.parent / "whole"))
    return digests(recipe.parent / "whole")


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = []
    for child in family(process):
        try:
            if any("worker_process" in word for word in child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def family(process: subprocess.Popen[str]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def wait_for_layers(process: subprocess.Popen[str], output: Path, count: int) -> None:
    deadline = time.monotonic() + 600
    while journaled(output) < count:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)


def living(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.e2e
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_bytes_are_those_of_one_process(
    count: int, recipe: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    process, seen = start(recipe, tmp_path / "out", "--workers", str(count)), list[psutil.Process]()
    listening, most = set[object](), 0
    while process.poll() is None:
        seen = list({*seen, *family(process)})
        most = max(most, len(workers_of(process)))
        for each in family(process):
            try:
                listening |= {c.laddr for c in each.net_connections("inet") if c.status == psutil.CONN_LISTEN}
            except psutil.Error:
                continue
        time.sleep(0.5)
    ended(process)
    assert digests(tmp_path / "out") == expected
    assert most == count
    # Nobody but the one that started them can speak to workers of one machine.
    assert listening == set()
    assert living(seen) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.e2e
def test_a_worker_that_is_killed_is_replaced(recipe: Path, expected: dict[str, str], tmp_path: Path) -> None:
    process = start(recipe, tmp_path / "out", "--workers", "2")
    wait_for_layers(process, tmp_path / "out", 1)
    workers_of(process)[0].kill()
    assert "its task is done anew" in ended(process)
    assert digests(tmp_path / "out") == expected


@pytest.mark.e2e
def test_ctrl_c_ends_all_within_two_seconds_and_any_number_of_workers_goes_on(
    recipe: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = start(recipe, output, "--workers", "2")
    wait_for_layers(process, output, 1)
    children = family(process)
    assert workers_of(process)
    pressed = time.monotonic()
    process.send_signal(signal.SIGINT)
    while living(children):
        assert time.monotonic() - pressed < 2, living(children)
        time.sleep(0.02)
    assert "the same command continues" in ended(process, 130)
    ended(start(recipe, output))
    assert digests(output) == expected


class Shuffled:
    """Workers in this process, of which any does any task that is ready; they share nothing but folders.

    Takes the place of `WorkerPool`.
    """

    made: ClassVar[list["Shuffled"]] = []

    def __init__(self, workers: Workers, progress: Progress) -> None:
        assert workers.count is not None
        self.count, self._choose = workers.count, random.Random(len(self.made))
        self.kinds = Counter[str]()
        self.made.append(self)

    def __enter__(self) -> "Shuffled":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def prepare(self, job: Job, source: Path, sha256: str, output: Path) -> None:
        self._works = [job.begin(source, output, number) for number in range(self.count)]

    def run(self, tasks: Sequence[Task], done: Done) -> None:
        schedule = Schedule(tasks)
        while schedule.left:
            ready = []
            while (task := schedule.next()) is not None:
                ready.append(task)
            chosen = self._choose.choice(ready)
            for task in ready:
                if task is not chosen:
                    schedule.put_back(task)
            work = self._choose.choice(self._works)
            # A worker that died has done a part of the task, and another does it anew.
            for _ in range(self._choose.choice((1, 1, 2))):
                result = work.run(chosen)
            work.release()
            self.kinds[chosen.kind] += 1
            schedule.done(chosen)
            done(chosen, result)


@pytest.mark.parametrize(
    ("model_type", "formats", "algo", "quantization"),
    [
        ("deepseek_v3", "ascend", "rtn", {}),
        ("deepseek_v3", "ascend", "osl", {"smooth_alpha": [0.5], "min_expert_tokens": 60}),
        ("qwen3_moe", "compressed-tensors", "gptq", {}),
        ("qwen3_next", "ascend", "osl", {"smooth_alpha": [0.5]}),
    ],
)
def test_layers_that_are_cut_have_the_bytes_of_whole_ones(
    model_type: str,
    formats: str,
    algo: str,
    quantization: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    predictions = {"prediction_layers": 1} if model_type == "deepseek_v3" else {}
    model = write_tiny(tmp_path / "model", model_type, layers=4, dtype="bfloat16", **predictions)
    asked = find_recipe(str(model)).adjusted(
        algo=algo, formats=formats, samples=6, sequence_length=24, evaluate=False
    )
    asked = asked.replace("quantization", **quantization)
    monkeypatch.setattr("msquant.flows.source.BATCH_TOKENS", 48)
    # A layer then has several shards, and experts lie across their borders.
    monkeypatch.setattr("msquant.flows.source.plan_folder", partial(plan_folder, max_shard_bytes=30_000))
    expected = digests(quantize(asked, tmp_path / "whole", remember=False).folder)
    monkeypatch.setattr("msquant.flows.worker_pool.WorkerPool", Shuffled)
    made = quantize(asked, tmp_path / "cut", workers=Workers(3), remember=False)
    assert digests(made.folder) == expected
    kinds = Shuffled.made[-1].kinds
    layers = kinds["finish"]
    assert layers >= 2
    assert kinds["attention"] > layers
    assert kinds["experts"] == 3 * layers
    assert kinds["quantize"] > 2 * layers


@pytest.mark.parametrize("model_type", ["llama", "deepseek_v3"])
def test_an_evaluation_that_is_shared_finds_the_same_numbers(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny(tmp_path / "model", model_type, layers=6, dtype="bfloat16")
    asked = find_recipe(str(model)).adjusted(algo="rtn", samples=2, sequence_length=24, evaluate=False)
    folder = quantize(asked, tmp_path / "made", remember=False).folder
    choose = np.random.default_rng(0)
    texts = [Text(name, choose.integers(0, 64, (3, 40), dtype=np.int32)) for name in ("a", "b", "c")]
    folders = [model, folder, model]
    expected = score_folders(folders, texts, "cpu")
    monkeypatch.setattr("msquant.flows.worker_pool.WorkerPool", Shuffled)
    said: list[int] = []
    progress = Progress(layer=lambda record: said.append(record["index"]))
    found = score_folders(folders, texts, "cpu", progress=progress, workers=Workers(3))
    assert said == list(range(6))
    for one, other in zip(expected, found, strict=True):
        assert one == other
        assert all(map(np.array_equal, one.next_tokens, other.next_tokens))
    kinds = Shuffled.made[-1].kinds
    assert kinds["forward"] == 6 * 3 * (3 if model_type == "llama" else 1)
    assert kinds["predict"] == 3


@pytest.mark.e2e
def test_processes_share_an_evaluation(recipe: Path, expected: dict[str, str]) -> None:
    found = []
    for count in (1, 2):
        command = [sys.executable, "-m", "msquant", "evaluate", str(recipe.parent / "whole"), "--json"]
        options = ["--sequences", "2", "--sequence-length", "32", "--workers", str(count)]
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        found.append({key: document[key] for key in ("baseline", "models", "texts")})
    assert found[0] == found[1]
    assert found[0]["models"][0]["overall"]["kl"] > 0


@pytest.mark.parametrize("model_type", ["llama", "qwen3_moe"])
def test_a_ranking_that_is_shared_finds_the_same_errors(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_tiny(tmp_path / "model", model_type, layers=6, dtype="bfloat16")
    recipe = find_recipe(str(model)).adjusted(algo="osl", samples=2, sequence_length=24)
    expected = analyze(recipe)
    monkeypatch.setattr("msquant.flows.worker_pool.WorkerPool", Shuffled)
    said: list[int] = []
    progress = Progress(layer=lambda record: said.append(record["index"]))
    found = analyze(recipe, workers=Workers(3), progress=progress)
    assert found.groups == expected.groups
    assert sorted(said) == list(range(6))
    assert Shuffled.made[-1].kinds == {"embed": 1, "compute": 5, "measure": 6}


@pytest.mark.e2e
def test_processes_share_a_ranking(recipe: Path, tmp_path: Path) -> None:
    found = []
    for count in (1, 2):
        command = [sys.executable, "-m", "msquant", "analyze", str(recipe), "--keep-float", "2", "--json"]
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        done = subprocess.run(
            [*command, "--workers", str(count)], capture_output=True, text=True, timeout=900, env=environment
        )
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        found.append({key: document[key] for key in ("groups", "kept", "error", "recipe")})
        assert not list(tmp_path.iterdir())
    assert found[0] == found[1]
    assert found[0]["kept"]


POOL = """
import time
from msquant.flows.worker_pool import WorkerPool
from msquant.flows.workers import Workers
from msquant.progress import Progress
with WorkerPool(Workers(2), Progress()):
    print("up", flush=True)
    time.sleep(600)
"""


@pytest.mark.e2e
def test_workers_end_with_the_process_that_started_them() -> None:
    process = subprocess.Popen([sys.executable, "-c", POOL], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    children = workers_of(process)
    assert len(children) == 2
    killed = time.monotonic()
    process.kill()
    process.communicate()
    while living(children):
        assert time.monotonic() - killed < 2, living(children)
        time.sleep(0.02)


@pytest.mark.e2e
@pytest.mark.slow
def test_random_kills_change_nothing(recipe: Path, expected: dict[str, str], tmp_path: Path) -> None:
    choose, kills, runs = random.Random(7), 0, 0
    while kills < KILLS:
        output, runs = tmp_path / f"out{runs}", runs + 1
        while not output.exists():
            process = start(recipe, output, "--workers", str(choose.choice([2, 3])))
            children: list[psutil.Process] = []
            while process.poll() is None and kills < KILLS:
                time.sleep(choose.uniform(2, 12))
                children = family(process) or children
                victims = [process.pid, *(worker.pid for worker in workers_of(process))]
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(choose.choice(victims), signal.SIGKILL)
                        kills += 1
            _, errors = process.communicate(timeout=900)
            assert process.returncode in (0, -signal.SIGKILL), errors
            deadline = time.monotonic() + 10
            while living(children):
                assert time.monotonic() < deadline, living(children)
                time.sleep(0.1)
        assert digests(output) == expected


@pytest.mark.e2e
def test_a_tasks_own_error_is_said_as_in_one_process(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "model", "llama", layers=LAYERS)
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.2.self_attn.q_proj.weight"
    tensors[name] = np.array(tensors[name])
    tensors[name][0, 0] = np.nan
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=model, feed_forward=""))
    process = start(recipe, tmp_path / "out", "--workers", "2")
    errors = ended(process, 1)
    assert f"{name} holds NaN or infinity" in errors
    assert "Traceback" not in errors
    assert "ray." not in errors
    assert not (tmp_path / "out").exists()


FORMATS = "ascend,compressed-tensors"


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in many shards, and beside it what one process makes of it without calibration, `whole`."""
    folder = tmp_path_factory.mktemp("stranger")
    model = write_stranger(folder / "model", "dots1", max_shard_size="60KB")
    ended(start(model, folder / "whole", "--calibration", "none", "--format", FORMATS))
    return model


@pytest.mark.e2e
def test_parts_without_calibration_are_shared_and_any_number_of_workers_goes_on(
    stranger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = find_recipe(str(stranger)).adjusted(calibration="none", formats=FORMATS)
    write, calls = model_free._write_piece, list[object]()

    def stop(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) > 20:
            raise KeyboardInterrupt
        write(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(model_free, "_write_piece", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize_model_free(recipe, tmp_path / "out", remember=False)
    begun = len(records(tmp_path / "out-compressed-tensors"))
    assert begun >= 1
    # None of this process's own does a piece any more.
    monkeypatch.setattr(model_free, "_write_piece", None)
    said = list[str]()
    progress = Progress(step=said.append)
    quantize_model_free(recipe, tmp_path / "out", workers=Workers(2), remember=False, progress=progress)
    assert any("rounding part" in line for line in said)
    for name in ("", "-compressed-tensors"):
        assert digests(tmp_path / f"out{name}") == digests(stranger.parent / f"whole{name}")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out-compressed-tensors"}


@pytest.mark.e2e
def test_a_worker_that_is_killed_within_a_part_is_replaced(stranger: Path, tmp_path: Path) -> None:
    arguments = ("--calibration", "none", "--format", FORMATS, "--workers", "2")
    process = start(stranger, tmp_path / "out", *arguments)
    deadline = time.monotonic() + 300
    # The first part has begun, and is not done: its files have no record yet.
    while not any(tmp_path.rglob("*.safetensors*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    for worker in workers_of(process):
        worker.kill()
    assert "its task is done anew" in ended(process)
    for name in ("", "-compressed-tensors"):
        assert digests(tmp_path / f"out{name}") == digests(stranger.parent / f"whole{name}")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out-compressed-tensors"}


@pytest.mark.e2e
def test_an_error_in_a_part_is_said_as_in_one_process(tmp_path: Path) -> None:
    model = write_stranger(tmp_path / "model", "dots1", max_shard_size="60KB")
    name = "model.layers.1.self_attn.q_proj.weight"
    shard = model / read_json(model / "model.safetensors.index.json")["weight_map"][name]
    tensors = load_torch(shard)
    tensors[name][0, 0] = float("nan")
    save_torch(tensors, shard, metadata={"format": "pt"})
    process = start(model, tmp_path / "out", "--calibration", "none", "--workers", "2")
    errors = ended(process, 1)
    assert f"{name} holds NaN or infinity" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, None, "cpu"), "--workers: 0 workers"),
        ((None, "10.0.0.1", "cpu"), "--ray-address: '10.0.0.1' is no HOST:PORT"),
        ((None, ":6379", "cpu"), "is no HOST:PORT"),
        ((None, "head:70000", "cpu"), "is no HOST:PORT"),
        ((2, None, "ascend"), "not on ascend"),
    ],
)
def test_what_no_worker_can_do_is_refused(arguments: tuple[int | None, str | None, str], said: str) -> None:
    with pytest.raises(EngineError) as caught:
        require_workers(*arguments)
    assert said in str(caught.value)
    assert caught.value.remedy


def test_one_worker_needs_no_ray() -> None:
    assert Workers().in_process
    assert Workers(1).in_process
    assert not Workers(2).in_process
    assert not Workers(1, "10.0.0.1:6379").in_process


def test_too_many_workers_for_the_memory_are_refused(tmp_path: Path) -> None:
    from msquant.flows.worker_pool import WorkerPool
    from msquant.progress import Progress

    with (
        pytest.raises(EngineError, match="workers need about") as caught,
        WorkerPool(Workers(2, memory=10**15), Progress()),
    ):
        pass
    assert caught.value.remedy == "use --workers 1"


@pytest.mark.parametrize(
    ("cores", "count", "shares"),
    [
        ([64, 64, 64], 3, [[64], [64], [64]]),
        ([64, 64], 3, [[32, 32], [64]]),
        ([4, 64], 5, [[], [12] * 5]),
        ([4, 64], 20, [[4], [3] * 19]),
        ([1, 1], 2, [[1], [1]]),
    ],
)
def test_workers_divide_the_cores_of_the_nodes(cores: list[int], count: int, shares: list[list[int]]) -> None:
    assert divided(cores, count) == shares


@pytest.mark.parametrize(
    ("cores", "count", "said"), [([1, 1], 3, "more than the 2 cores"), ([], 0, "no node")]
)
def test_more_workers_than_cores_of_a_cluster_are_refused(cores: list[int], count: int, said: str) -> None:
    with pytest.raises(EngineError, match=said) as caught:
        divided(cores, count)
    assert f"at most {sum(cores)}" in str(caught.value.remedy)


def test_a_node_has_as_many_workers_as_make_use_of_its_cores() -> None:
    nodes = [
        {
            "Alive": True,
            "NodeID": name,
            "Resources": {"CPU": cores, "memory": 1e12},
            "NodeManagerAddress": name,
        }
        for name, cores in (("a", 4), ("b", 2))
    ]
    found = _places(nodes, Workers(address="a:1", threads=2))
    assert sorted(found, key=lambda place: place.node) == [Place("a", 2), Place("a", 2), Place("b", 2)]
    assert len(_places(nodes, Workers(address="a:1"))) == 2
    with pytest.raises(EngineError, match="2 workers on node a need about"):
        _places(nodes, Workers(address="a:1", threads=2, memory=10**12))


def test_a_cluster_that_is_not_there_is_refused_at_once() -> None:
    began = time.monotonic()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(EngineError, match="is not reached") as caught:
            RayCrew(Workers(address=address))
    assert "ray start" in str(caught.value.remedy)
    assert time.monotonic() - began < 20


def test_nodes_that_differ_are_named() -> None:
    from dataclasses import replace

    from msquant.flows.node_checks import NodeReport, own_versions, require_alike

    here = NodeReport("one", 2, 10**9, own_versions(), "a", "s", None)
    require_alike([here, here], Path("/model"), "s", different_arithmetic=False)
    cases = [
        (
            replace(here, host="two", versions=own_versions() | {"numpy": "9"}),
            "node two has numpy 9, .* here",
        ),
        (replace(here, host="two", source="t"), "node two sees other weights"),
        (replace(here, host="two", arithmetic="b"), "two and one round differently"),
    ]
    for other, said in cases:
        with pytest.raises(EngineError, match=said):
            require_alike([here, other], Path("/model"), "s", different_arithmetic=False)
    require_alike([here, cases[-1][0]], Path("/model"), "s", different_arithmetic=True)
