"""`msquant plan`: what quantizing a model would make and take."""

from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msquant.cli import console, options
from msquant.errors import OutputError

if TYPE_CHECKING:
    from msquant.checkpoint.checkpoint_reader import Checkpoint
    from msquant.models.config import ModelConfig
    from msquant.planning.measure import Measured, Span
    from msquant.planning.model_free_plan import ModelFreePlan
    from msquant.planning.quantization_plan import PartPlan, Plan
    from msquant.progress import Phase
    from msquant.recipe.recipe import Recipe

_CAPTION = (
    "Linears by scheme, sizes and time are of one layer. prediction: multi-token prediction, with an "
    "embedding and a head of its own; ends: embeddings, last norm, output head."
)
_STAGES: "dict[Phase, str]" = {
    "layers": "decoder layers",
    "evaluation": "comparing the result with the float model",
    "ends": "the two ends and prediction layers",
    "formats": "further formats",
    "start": "loading MindSpore, calibration and all else",
}


def plan(
    model: options.Model,
    algo: options.Algo = None,
    scheme: options.SchemeWord = None,
    group_size: options.GroupSize = None,
    rotation: options.Rotation = None,
    cache: options.Cache = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder that would be made.  [default: MODEL-ALGO here]")
    ] = None,
    source: options.Source = None,
    calibration: options.Calibration = None,
    samples: options.Samples = None,
    sequence_length: options.SequenceLength = None,
    formats: options.Formats = None,
    memory_budget: options.MemoryBudget = options.MEMORY_BUDGET,
    workers: options.WorkerCount = None,
    node_cores: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cores of each worker's own machine, with 10 Gbit/s to a disk of 2 GB/s that all share.  "
            "[default: all workers are on this machine]",
        ),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Measure this machine, to estimate the time.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say what quantizing a model would make, what it takes, and what of that does not fit here.

    From config.json and the shards' headers alone; a published model is planned without its weights. Exits
    with 1 if something does not fit.

    With --calibration none it lists by name, shape and size what would be quantized and what would not.

    Example: msquant plan deepseek-r1

    Example: msquant plan ./GLM-4.6 --calibration none

    Example: msquant plan deepseek-r1 --workers 16 --node-cores 64

    Example: msquant plan deepseek-r1 --source /data/DeepSeek-R1 --output /data/DeepSeek-R1-W8A8 --json
    """
    from msquant.models.device import silence_libraries
    from msquant.recipe.recipe import default_folder, find_recipe

    silence_libraries()
    recipe = find_recipe(model, formats).adjusted(
        algo=algo,
        scheme=scheme,
        group_size=group_size,
        rotation=rotation,
        cache=cache,
        calibration=calibration,
        samples=samples,
        sequence_length=sequence_length,
        formats=formats,
    )
    target = output or default_folder(model, recipe)
    budget = console.parse_bytes(memory_budget, "--memory-budget")
    show_plan(
        recipe,
        target,
        source,
        budget,
        probe=probe,
        as_json=as_json,
        workers=workers or 1,
        node_cores=node_cores,
    )


def show_plan(
    recipe: "Recipe",
    output: Path,
    source: str | None,
    memory_budget: int,
    *,
    probe: bool,
    as_json: bool,
    workers: int = 1,
    node_cores: int | None = None,
) -> None:
    """Make a plan and print it; exits with 1 if something does not fit.

    Args:
        recipe: everything that affects the result.
        output: the folder that would be made.
        source: folder of the weights, in place of the recipe's model.
        memory_budget: bytes of hidden states held in memory.
        probe: measure this machine, to estimate the time.
        as_json: print JSON.
        workers: processes that share the work.
        node_cores: of each worker's own machine.
    """
    if recipe.calibration.is_none:
        _show_model_free(recipe, output, source, as_json=as_json, workers=workers)
        return
    from msquant.planning.quantization_plan import make_plan

    def measure(config: "ModelConfig", checkpoint: "Checkpoint | None") -> "Measured":
        from msquant.cli.layer_progress import LayerProgress
        from msquant.planning.measure import measure as measure_samples

        LayerProgress().stage("measuring this machine with a piece of the model")
        return measure_samples(recipe, config, output, checkpoint)

    made = make_plan(
        recipe,
        output,
        source=source,
        memory_budget=memory_budget,
        probe=measure if probe else None,
        workers=workers,
        node_cores=node_cores,
    )
    if as_json:
        console.print_json(_as_json(made))
    else:
        _print(made)
    if made.problems:
        raise typer.Exit(1)


def _show_model_free(
    recipe: "Recipe", output: Path, source: str | None, *, as_json: bool, workers: int
) -> None:
    """As `show_plan`, of a quantization without calibration."""
    from msquant.planning.model_free_plan import make_model_free_plan

    made = make_model_free_plan(recipe, output, source=source, workers=workers)
    if as_json:
        document = asdict(made)
        document["source"] = None if made.source is None else str(made.source)
        document["output"] = str(made.output)
        document["formats"] = [{**asdict(each), "folder": str(each.folder)} for each in made.formats]
        console.print_json(document | {"fits": not made.problems})
    else:
        _print_model_free(made)
    if made.problems:
        raise typer.Exit(1)


def _print_model_free(plan: "ModelFreePlan") -> None:
    quantized = [kind for kind in plan.kinds if not kind.reason]
    kept = [kind for kind in plan.kinds if kind.reason and len(kind.shape) > 1]
    vectors = [kind for kind in plan.kinds if kind.reason and len(kind.shape) <= 1]
    for title, kinds, told in (
        (f"{plan.model}: {plan.architecture}, linear layers that are quantized", quantized, "scheme"),
        ("What stays in floating point", kept, "why"),
    ):
        rows = [
            [
                kind.pattern,
                kind.count,
                " x ".join(map(str, kind.shape)),
                kind.reason or kind.scheme,
                console.as_bytes(kind.source_bytes),
                console.as_bytes(kind.output_bytes),
            ]
            for kind in kinds
        ]
        console.print_table(title, ["name", "tensors", "shape", told, "before", "after"], rows)
    if vectors:
        sizes = console.as_bytes(sum(kind.output_bytes for kind in vectors))
        console.print_line(
            f"So do {sum(kind.count for kind in vectors)} tensors that are no matrices, {sizes}."
        )
    free = "unknown" if plan.free_disk is None else console.as_bytes(plan.free_disk)
    available = "unknown" if plan.available_memory is None else console.as_bytes(plan.available_memory)
    takes: list[list[object]] = []
    takes += [["output", each.folder] for each in plan.formats]
    takes += [["format", f"{each.name} for {each.consumer}"] for each in plan.formats]
    takes += [
        ["size before", console.as_bytes(plan.source_bytes)],
        ["size after", console.as_bytes(plan.output_bytes)],
        ["disk", f"{console.as_bytes(plan.output_bytes)} of {free} free"],
        ["peak memory", f"about {console.as_bytes(plan.peak_memory)}{_each(plan)} of {available} available"],
    ]
    console.print_table("What it takes", ["", ""], takes)
    for note in plan.notes:
        console.print_line(f"Note: {note}")
    for problem in plan.problems:
        console.print_error(OutputError(f"does not fit: {problem}"))


def _as_json(plan: "Plan") -> dict[str, Any]:
    document = asdict(plan)
    document["source"] = None if plan.source is None else str(plan.source)
    document["output"] = str(plan.output)
    document["formats"] = [{**asdict(each), "folder": str(each.folder)} for each in plan.formats]
    return document | {"disk_bytes": plan.disk_bytes, "fits": not plan.problems}


def _print(plan: "Plan") -> None:
    shown = list(dict.fromkeys(word for part in plan.parts for word in part.linears))
    columns = ["layers", "kind", *shown, "before", "after"]
    timed = plan.seconds is not None
    rows = [_row(list(parts), shown, timed) for _, parts in groupby(plan.parts, key=_alike)]
    each = ["time"] if timed else []
    console.print_table(
        f"{plan.model}: {plan.architecture}, {plan.parameters / 1e9:,.2f} B parameters, {plan.stored}",
        columns + each,
        rows,
        caption=_CAPTION,
    )
    free = "unknown" if plan.free_disk is None else console.as_bytes(plan.free_disk)
    available = "unknown" if plan.available_memory is None else console.as_bytes(plan.available_memory)
    rows = [
        *(["output", each.folder] for each in plan.formats),
        *(["format", f"{each.name} for {each.consumer}"] for each in plan.formats),
        ["calibration", f"{plan.samples} x {plan.sequence_length} tokens from {', '.join(plan.sources)}"],
        ["reads", f"at most {plan.source_characters / 1e6:.0f} million characters of each source"],
        ["size before", console.as_bytes(plan.source_bytes)],
        ["size after", console.as_bytes(plan.output_bytes)],
        ["to serve", console.as_serving(plan.serving)],
        ["scratch", console.as_bytes(plan.scratch_bytes)],
        ["disk", f"{console.as_bytes(plan.disk_bytes)} of {free} free"],
        ["peak memory", f"about {console.as_bytes(plan.peak_memory)}{_each(plan)} of {available} available"],
        ["time", _span(plan.seconds)],
        *_shared(plan),
    ]
    console.print_table("What it takes", ["", ""], rows)
    if plan.seconds_by_stage is not None and plan.machine is not None:
        stages = [
            f"{_STAGES[name]} {_span(time)}" for name, time in plan.seconds_by_stage.items() if time.high
        ]
        console.print_line(f"Of the time: {', '.join(stages)}.")
        machine = plan.machine
        console.print_line(
            f"Measured with {machine.load:.1f} other processes at work on {machine.cores} cores, of which "
            f"msquant got {machine.share:.1f}."
        )
    for note in plan.notes:
        console.print_line(f"Note: {note}")
    for problem in plan.problems:
        console.print_error(OutputError(f"does not fit: {problem}"))


def _each(plan: "Plan | ModelFreePlan") -> str:
    return f" for each of {plan.workers} workers" if plan.workers > 1 else ""


def _shared(plan: "Plan") -> list[list[object]]:
    """What several workers share."""
    rows: list[list[object]] = []
    if plan.shared_bytes is not None:
        what = "disk, by all workers" if plan.node_cores is None else "over the network"
        rows.append([what, console.as_bytes(plan.shared_bytes)])
    if plan.timelines is not None:
        low, high = plan.timelines
        chain = ", ".join(f"{kind} {console.as_duration(taken)}" for kind, taken in high.chain.items())
        lasts = f"{console.as_duration(low.chain_seconds)} to {console.as_duration(high.chain_seconds)}"
        bounds = " or ".join(dict.fromkeys((low.bound, high.bound)))
        rows.append(["of it the chain", f"{lasts}, however many workers; at most {chain}"])
        rows.append(["bound by", bounds])
    return rows


def _span(time: "Span | None") -> str:
    if time is None:
        return "not estimated"
    return f"{console.as_duration(time.low)} to {console.as_duration(time.high)}"


def _alike(part: "PartPlan") -> tuple[Any, ...]:
    """What parts of one row have in common; a few bytes of a header make no difference."""
    return part.kind, tuple(part.linears.items()), part.parameters, part.source_bytes


def _row(parts: "list[PartPlan]", schemes: list[str], timed: bool) -> list[Any]:
    first, last = parts[0], parts[-1]
    layers = "" if first.index is None else f"{first.index}"
    if first is not last:
        layers += f"-{last.index}"
    kind = f"{first.experts} experts" if first.experts else first.kind
    sizes = [console.as_bytes(first.source_bytes), console.as_bytes(first.output_bytes)]
    linears = [first.linears.get(scheme, 0) for scheme in schemes]
    row = [layers, kind, *linears, *sizes]
    return [*row, _span(first.seconds)] if timed else row
