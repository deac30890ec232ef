"""`msquant analyze`: what quantizing each group of linears costs, and a recipe that spares the worst."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msquant.cli import console, options
from msquant.errors import RecipeError

if TYPE_CHECKING:
    from msquant.flows.analysis import Analysis
    from msquant.flows.frontier import Frontier, FrontierPoint
    from msquant.quantization.selection import RankedGroup

SHOWN = 20
"""Rows of the table for people; --json has all."""


def analyze(
    model: options.Model,
    algo: options.Algo = None,
    scheme: options.SchemeWord = None,
    group_size: options.GroupSize = None,
    rotation: options.Rotation = None,
    calibration: options.Calibration = None,
    template: options.Template = None,
    chat_template: options.ChatTemplate = None,
    pack: options.Pack = None,
    samples: options.Samples = None,
    sequence_length: options.SequenceLength = None,
    seed: options.Seed = None,
    device: options.Device = "cpu",
    source: options.Source = None,
    memory_budget: options.MemoryBudget = options.MEMORY_BUDGET,
    workers: options.WorkerCount = None,
    ray_address: options.RayAddress = None,
    allow_different_arithmetic: options.DifferentArithmetic = False,
    keep_float: Annotated[
        int | None, typer.Option(help="Make a recipe that keeps at most so many matrices in floating point.")
    ] = None,
    keep_dynamic: Annotated[
        int | None, typer.Option(help="Make a recipe that gives at most so many matrices a scale per token.")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(
            help="Make a recipe that keeps as few in floating point as bring the summed error down to this."
        ),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            help="Make a recipe that keeps as many in floating point as all tensors fit this size, "
            "for example 200MB."
        ),
    ] = None,
    frontier: Annotated[
        bool,
        typer.Option(
            "--frontier",
            help="Size against predicted KL, from the fewest bits to floating point, for one server.",
        ),
    ] = False,
    point: Annotated[
        float | None,
        typer.Option(
            help="With --frontier: the recipe of the smallest folder whose predicted KL is at most this.",
            show_default=False,
        ),
    ] = None,
    points: Annotated[int, typer.Option(min=2, max=200, help="With --frontier: how many points.")] = 12,
    server: options.ServerFor = None,
    formats: options.Formats = None,
    schemes: options.SchemeWords = None,
    output: Annotated[
        Path | None, typer.Option(help="File for the recipe, .yaml.  [default: printed]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Rank the linears of a model by the error that quantizing only them causes, and spare the worst.

    Linears that run as one, such as q, k and v, are one group: they are measured and kept together. One pass
    over the decoder layers, with one of them in memory at a time.

    Example: msquant analyze smollm2-135m

    With --frontier schemes are chosen for every group, and KL is predicted for the whole model.

    Example: msquant analyze smollm2-135m --frontier --for vllm --point 0.02 --output small.yaml

    Example: msquant analyze smollm2-135m --keep-float 6 --output mixed.yaml && msquant quantize mixed.yaml
    """
    from msquant.quantization.selection import budget_of

    size = None if max_size is None else console.parse_bytes(max_size, "--max-size")
    budget = budget_of(keep_float, keep_dynamic, max_error, size)
    if frontier:
        asked = {} if budget is None else {budget.option: True}
        options.refuse(
            {**asked, "--scheme": scheme, "--group-size": group_size},
            "does not go with --frontier, which chooses every scheme",
            "leave one of them out",
        )
        options.refuse(
            {"--workers": workers, "--ray-address": ray_address},
            "does not go with --frontier, which one process computes",
            "leave one of them out",
        )
    else:
        options.refuse(
            {"--point": point, "--for": server, "--format": formats, "--schemes": schemes},
            "is for --frontier",
            "give --frontier, too",
        )
    if output is not None:
        from msquant.recipe.recipe import check_target

        if frontier and point is None:
            raise RecipeError(
                "there is no recipe to write", where="--output", remedy="choose a point: --point 0.02"
            )
        if not frontier and budget is None:
            raise RecipeError(
                "there is no recipe to write",
                where="--output",
                remedy="say what it may keep: --keep-float, --keep-dynamic, --max-error or --max-size",
            )
        check_target(output, overwrite=overwrite)
    from msquant.models.device import silence_libraries

    if not verbose:
        silence_libraries()
    from msquant import api
    from msquant.recipe.recipe import write_recipe

    formats = options.formats_of(server, formats)
    recipe = api.find_recipe(model, formats).adjusted(
        algo=algo,
        scheme=scheme,
        group_size=group_size,
        rotation=rotation,
        calibration=calibration,
        template=template,
        chat_template=chat_template,
        pack=pack,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        formats=formats,
    )
    from msquant.cli.layer_progress import LayerProgress

    if frontier:
        from msquant.cli.promise import parse_schemes

        with LayerProgress() as display:
            found = api.frontier(
                recipe,
                point=point,
                points=points,
                schemes=parse_schemes(schemes),
                source=source,
                device=device,
                memory_budget=console.parse_bytes(memory_budget, "--memory-budget"),
                verbose=verbose,
                progress=display.flow(lambda record: _note(record["noise"])),
            )
        if output is not None and found.chosen is not None and found.chosen.recipe is not None:
            write_recipe(found.chosen.recipe, output, overwrite=overwrite)
        if as_json:
            console.print_json(_frontier_as_json(found, output))
        else:
            _print_frontier(found, output)
        return

    with LayerProgress() as display:
        analysis = api.analyze(
            recipe,
            keep_float=keep_float,
            keep_dynamic=keep_dynamic,
            max_error=max_error,
            max_size=size,
            source=source,
            device=device,
            memory_budget=console.parse_bytes(memory_budget, "--memory-budget"),
            verbose=verbose,
            workers=workers,
            ray_address=ray_address,
            allow_different_arithmetic=allow_different_arithmetic,
            progress=display.flow(lambda record: _note(record["errors"])),
        )
    if output is not None and analysis.recipe is not None:
        write_recipe(analysis.recipe, output, overwrite=overwrite)
    if as_json:
        console.print_json(_as_json(analysis, output))
    else:
        _print(analysis, output, source)


def _frontier_as_json(found: "Frontier", output: Path | None) -> dict[str, Any]:
    losses = found.losses
    return {
        "texts": list(losses.texts),
        "points": [_point(point) for point in found.points],
        "chosen": None if found.chosen is None else _point(found.chosen),
        "interaction": losses.interaction,
        "units": losses.as_dict()["units"],
        "file": None if output is None else str(output),
        "seconds": round(found.seconds, 3),
    }


def _point(point: "FrontierPoint") -> dict[str, Any]:
    return {
        "bytes": point.nbytes,
        "kl": point.loss,
        "kl_by_text": list(point.losses),
        "linears": point.counts,
        "recipe": None if point.recipe is None else point.recipe.model_dump(mode="json"),
    }


def _print_frontier(found: "Frontier", output: Path | None) -> None:
    rows = [
        [
            console.as_bytes(point.nbytes),
            f"{point.loss:.4f}",
            ", ".join(f"{count} {word}" for word, count in point.counts.items()),
        ]
        for point in found.points
    ]
    console.print_table(
        "Size against predicted KL to the float model",
        ["size", "KL", "linears"],
        rows,
        caption="KL: of the choice text on which it is greatest, in nats.",
    )
    if found.chosen is None:
        return
    point = found.chosen
    console.print_line(f"Chosen: {console.as_bytes(point.nbytes)}, predicted KL {point.loss:.4f}")
    if output is not None:
        console.print_line(f"Wrote {output}.")
        console.print_next(f"msquant quantize {shlex.quote(str(output))}")
    elif point.recipe is not None:
        from msquant.recipe.recipe import recipe_text

        console.print_document(recipe_text(point.recipe).rstrip("\n"))


def _note(errors: dict[str, float]) -> str:
    return " ".join(f"{name} {error:.1e}" for name, error in errors.items())


def _as_json(analysis: "Analysis", output: Path | None) -> dict[str, Any]:
    return {
        "error": analysis.error,
        "output_bytes": analysis.output_bytes,
        "groups": [_group(group) for group in analysis.groups],
        "kept": [linear for group in analysis.kept for linear in group.measured.linears],
        "mixed_error": analysis.mixed_error,
        "mixed_bytes": analysis.mixed_bytes,
        "recipe": None if analysis.recipe is None else analysis.recipe.model_dump(mode="json"),
        "file": None if output is None else str(output),
        "seconds": round(analysis.seconds, 3),
        "peak_memory_bytes": analysis.peak_memory,
    }


def _group(group: "RankedGroup") -> dict[str, Any]:
    return asdict(group.measured) | {"share": group.share, "float_bytes": group.float_bytes}


def _print(analysis: "Analysis", output: Path | None, source: str | None) -> None:
    shown = analysis.groups[:SHOWN]
    dynamic = any(group.measured.dynamic_error is not None for group in analysis.groups)
    columns = ["layer", "group", "matrices", "scheme", "error", "share", "if float"]
    console.print_table(
        "Error of the decoder layer's output with only this group quantized",
        [*columns, "per token"] if dynamic else columns,
        [_row(group, dynamic) for group in shown],
        caption=f"{len(shown)} of {len(analysis.groups)} groups, the greatest error first. "
        "if float: what the result grows by.",
    )
    rows: list[list[Any]] = [
        ["summed error", f"{analysis.error:.3e}"],
        ["size", console.as_bytes(analysis.output_bytes)],
    ]
    if analysis.mixed_error is not None and analysis.mixed_bytes is not None:
        kept = sum(group.matrices for group in analysis.kept)
        rows += [
            ["matrices kept", kept],
            ["summed error then", f"{analysis.mixed_error:.3e}"],
            ["size then", console.as_bytes(analysis.mixed_bytes)],
        ]
    rows += [["time", f"{analysis.seconds:.0f} s"], ["peak memory", console.as_bytes(analysis.peak_memory)]]
    console.print_table("Result", ["", ""], rows)
    if output is not None:
        command = ["msquant", "quantize", str(output), *(["--source", source] if source else [])]
        console.print_line(f"Wrote {output}.")
        console.print_next(shlex.join(command))
    elif analysis.recipe is not None:
        from msquant.recipe.recipe import recipe_text

        console.print_document(recipe_text(analysis.recipe).rstrip("\n"))


def _row(group: "RankedGroup", dynamic: bool) -> list[Any]:
    measured = group.measured
    row = [
        measured.layer,
        measured.group,
        group.matrices,
        measured.scheme,
        f"{measured.error:.2e}",
        f"{group.share:.1%}",
        "not served" if group.float_bytes is None else f"+{console.as_bytes(group.float_bytes)}",
    ]
    per_token = "" if measured.dynamic_error is None else f"{measured.dynamic_error:.2e}"
    if per_token and not group.per_token:
        per_token += ", not served"
    return [*row, per_token] if dynamic else row
