"""Two workers of one core beside one process of one core, and R1 on many nodes by the plan's own simulation.

SmolLM2-135M by osl is quantized in one process without `--workers`, with `--workers 1` and with two workers;
then every task of its graph is measured by itself, and the simulation is held to both runs. The machine
should do nothing else: these are seconds of time; the evaluation is left out, which is not shared.

For DeepSeek-R1 one core of this machine is measured as `msquant plan` does. The table is that of
docs/guides/many-machines.md, and its plot is written to both languages' images.
"""

import os
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.command import msquant
from benchmarks.rows import row
from benchmarks.smollm2 import float_folder
from msquant.checkpoint.writer import file_sha256

if TYPE_CHECKING:
    from msquant.planning.timeline import Timeline

MIN_RATIO, MOST_OVERHEAD, TOLERANCE = 1.8, 0.05, 0.15
NODES = (1, 2, 4, 8, 16, 32, 64)
CORES = 64
WORKERS, MOST_WORKERS = (1, 4, 16, 64), 256
"""Of a node, of which the fewest are shown that are about as fast as any; and of all nodes."""
DOCS = Path(__file__).parent.parent / "docs"
PLOTS = tuple(folder / "images" / "r1-nodes.svg" for folder in (DOCS, DOCS / "zh-CN"))

Seconds = dict[int, dict[str, float]]
"""What the tasks on a layer took, of each kind together."""


def measure() -> list[dict[str, Any]]:
    """Measure this machine, and simulate what it has no nodes for."""
    rows = [row("other processes at work in the minute before", round(os.getloadavg()[0], 1))]
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        return [*rows, row("cores", len(cores), ">= 2", False), *many_nodes(cores)]
    return [*rows, *_small(cores), *many_nodes(cores)]


def _small(cores: list[int]) -> list[dict[str, Any]]:
    model = float_folder()
    seconds: dict[str, float] = {}
    cpu: dict[str, float] = {}
    shards: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory(prefix="msquant-scaling-") as folder:
        for name, count in (("alone", None), ("one", 1), ("two", 2)):
            output = Path(folder) / name
            workers = [] if count is None else ["--workers", count]
            with bound_to(cores[: count or 1]):
                before = _children_cpu()
                result = msquant(
                    "quantize", model, "--output", output, "--algo", "osl", "--no-evaluate", *workers
                )
            cpu[name], seconds[name] = _children_cpu() - before, result["seconds"]
            shards[name] = [file_sha256(path) for path in sorted(output.glob("*.safetensors"))]
            if name == "one":
                besides = result["seconds"] - sum(result["layer_seconds"])
        tasks = _in_process(cores[:1], measured_tasks, model, "osl", Path(folder) / "tasks")
        start = _in_process(cores[:2], _pool_start)
    ratio, overhead = seconds["one"] / seconds["two"], cpu["one"] / cpu["alone"] - 1
    return [
        row("one process on one core, s", round(seconds["one"], 1)),
        row("two workers of one core, s", round(seconds["two"], 1)),
        row("times faster", round(ratio, 2), f">= {MIN_RATIO}", ratio >= MIN_RATIO),
        row("the same bytes", shards["one"] == shards["two"], "True", shards["one"] == shards["two"]),
        row(
            "--workers 1 takes more CPU seconds than no workers by",
            f"{overhead:.1%}",
            f"< {MOST_OVERHEAD:.0%}",
            overhead < MOST_OVERHEAD,
        ),
        _foretold("one process", _simulated(tasks, 1) + besides, seconds["one"]),
        _foretold("two workers", _simulated(tasks, 2) + besides + start, seconds["two"]),
    ]


def _foretold(what: str, simulated: float, measured: float) -> dict[str, Any]:
    off = simulated / measured - 1
    target = f"within {TOLERANCE:.0%} of {measured:.1f}"
    return row(f"simulated: {what}, s", f"{simulated:.1f} ({off:+.0%})", target, abs(off) <= TOLERANCE)


def _simulated(seconds: Seconds, workers: int) -> float:
    """Seconds of so many workers of one core for tasks that took that; disk and network are not counted."""
    from msquant.planning.timeline import Cluster, LayerCost, play_layers

    # One process computes a layer's outputs while it quantizes it.
    layers = {
        index: LayerCost(took | {"pass": took["quantize"]}, 0, 0, 0, 0, 0, 0, 0)
        for index, took in seconds.items()
    }
    return play_layers(layers, {}, Cluster(workers)).seconds


def measured_tasks(model: Path, algorithm: str, folder: Path) -> Seconds:
    """CPU seconds of each task of a model's graph, done one after the other in this process.

    Args:
        model: its folder.
        algorithm: what `--algo` takes.
        folder: where to work.
    """
    from msquant.checkpoint.hidden_states import HiddenStateStore
    from msquant.checkpoint.memory import MEMORY_BUDGET
    from msquant.checkpoint.run_files import SourceHashes
    from msquant.flows.calibration import calibration_of
    from msquant.flows.layer_graph import InProcess, Result, Task, layer_tasks
    from msquant.flows.layer_work import LayerJob, LayerWork
    from msquant.flows.source import folder_plan, open_model, rotated
    from msquant.flows.workers import layers_ahead
    from msquant.formats.folder_stream import FolderStream
    from msquant.progress import Progress
    from msquant.recipe.recipe import find_recipe

    asked = find_recipe(str(model)).adjusted(algo=algorithm)
    source = rotated(open_model(asked, None), asked.quantization)
    calibration = calibration_of(asked.calibration, source.folder)
    folder.mkdir()
    writer = FolderStream(folder, folder_plan(asked, source))
    shared, own = (HiddenStateStore(folder / name, MEMORY_BUDGET) for name in ("shared", "own"))
    job = LayerJob.of(asked, calibration, source.config, 0, "cpu", MEMORY_BUDGET, False)
    seconds: Seconds = defaultdict(lambda: defaultdict(float))
    with SourceHashes(source.checkpoint) as hashes:
        work = LayerWork(job, source, writer, hashes, shared, own, Progress())

        def run(task: Task) -> Result:
            began = time.process_time()
            result = work.run(task)
            seconds[task.index][task.kind] += time.process_time() - began
            shared.release()
            return result

        count = source.config.num_hidden_layers
        # One layer more than there are, so that the last one is computed too.
        tasks = layer_tasks(count + 1, (), (), layers_ahead(2))
        InProcess(run).run([task for task in tasks if task.index < count], lambda task, result: None)
    return {index: dict(took) for index, took in seconds.items()}


def _pool_start() -> float:
    """Seconds until two workers have started and looked around."""
    from msquant.flows.worker_pool import WorkerPool
    from msquant.flows.workers import Workers
    from msquant.progress import Progress

    began = time.monotonic()
    with WorkerPool(Workers(2), Progress()) as pool:
        pool.look()
        return time.monotonic() - began


def many_nodes(cores: list[int]) -> list[dict[str, Any]]:
    """The table and the plot of R1 on more and more nodes.

    Args:
        cores: of this machine, of which one is measured.
    """
    from msquant.flows.layer_work import layer_cuts
    from msquant.flows.source import batch_samples, shapes_plans
    from msquant.hub.published import published_config, stored_bytes
    from msquant.models.config_json import parse_config
    from msquant.planning.blocks import LayerBlocks, Tokens
    from msquant.planning.measure import measure as measure_samples
    from msquant.planning.quantization_plan import BASE_BYTES, layer_bytes
    from msquant.planning.timeline import DISK, NETWORK, Cluster, LayerCost, Timeline, play_layers
    from msquant.planning.work import feed_forward_rounds
    from msquant.recipe.recipe import find_recipe

    recipe, budget = find_recipe("deepseek-r1"), 10**9
    config = parse_config(published_config(recipe.model), "the published config.json")
    plan, settings = shapes_plans(recipe, config, config.extra_layers)[0], recipe.calibration
    length = settings.sequence_length
    tokens = Tokens(settings.samples, length, batch_samples(config, length))
    with tempfile.TemporaryDirectory(prefix="msquant-scaling-") as folder:
        measured = _in_process(cores[:1], measure_samples, recipe, config, Path(folder) / "out", None)
    layers, memory = {}, 0
    taken: dict[bool, dict[str, float]] = {}
    for index in range(config.num_hidden_layers):
        blocks = LayerBlocks(config, recipe.quantization, index)
        stored = {
            name: stored_bytes(name, shape, config.fp8_block)
            for name, shape in config.layer_shapes(index).items()
        }
        rounds = feed_forward_rounds(config, tokens, budget)
        took = measured.task_seconds(blocks, tokens.count, rounds)
        taken[bool(blocks.experts)] = took
        layers[index] = LayerCost.of(config, index, stored, plan.group_bytes[index], tokens, took)
        memory = max(memory, BASE_BYTES + layer_bytes(blocks, tokens, budget))
    rows = [
        row(f"R1, {'layer with experts' if experts else 'dense layer'}: {kind}, CPU s", round(seconds, 1))
        for experts, took in taken.items()
        for kind, seconds in took.items()
    ]
    best: dict[int, Timeline] = {}
    for nodes in NODES:
        found = []
        for workers in (each for each in WORKERS if nodes * each <= MOST_WORKERS):
            # A worker has its cores, but nothing is taken for granted of what they divide.
            cluster = Cluster(nodes, workers, CORES // workers, network=NETWORK, disk=DISK)
            cuts = layer_cuts(config, plan, 0, cluster.count, tokens.batches)
            found.append((play_layers(layers, cuts, cluster), workers))
        # As few as come within a twentieth of the fastest: each takes memory.
        fastest = min(line.seconds for line, _ in found)
        line, workers = next(each for each in found if each[0].seconds <= 1.05 * fastest)
        best[nodes] = line
        rows.append(
            row(
                f"R1 on {nodes} nodes of {CORES} cores, minutes",
                f"{line.seconds / 60:.0f}: {workers} workers a node, {workers * memory / 1e9:.0f} GB; chain "
                f"{line.chain_seconds / 60:.0f}, computing {line.computing / 60:.0f}, disk "
                f"{line.disk / 60:.0f}, {line.transferred / 1e12:.1f} TB; bound by {line.bound}",
            )
        )
        rows.append(
            row(
                f"the chain on {nodes}, minutes",
                ", ".join(f"{kind} {seconds / 60:.1f}" for kind, seconds in line.chain.items()),
            )
        )
    _draw(best)
    return rows


def _draw(best: "dict[int, Timeline]") -> None:
    """The plot of the table."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "r1-nodes", "svg.fonttype": "none"}):
        figure = Figure(figsize=(7, 3.6), layout="constrained")
        axes = figure.add_subplot(xscale="log", yscale="log", xlabel="nodes of 64 cores", ylabel="minutes")
        shown = {
            "all layers": [line.seconds for line in best.values()],
            "chain": [line.chain_seconds for line in best.values()],
            "computing": [line.computing for line in best.values()],
            "disk": [line.disk for line in best.values()],
        }
        for name, seconds in shown.items():
            style = {"marker": "o", "color": "#1f6feb"} if name == "all layers" else {"linestyle": "--"}
            axes.plot(list(best), [each / 60 for each in seconds], label=name, **style)
        axes.set_xticks(list(best), [str(nodes) for nodes in best])
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.3)
        axes.legend(frameon=False)
        for path in PLOTS:
            path.parent.mkdir(exist_ok=True)
            figure.savefig(path, metadata={"Date": None})


def _in_process(cores: list[int], function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own that keeps to some cores."""
    with bound_to(cores), get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def _children_cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def bound_to(cores: list[int]) -> Iterator[None]:
    """Within the block this process and those that it starts keep to some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
