"""`msquant quantize`: a model to W8A8, or to another scheme."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msquant.cli import console, options, scores

if TYPE_CHECKING:
    from msquant.cli.layer_progress import LayerProgress
    from msquant.flows.pipeline import QuantizeResult
    from msquant.hub.transfer_events import HubProgress
    from msquant.progress import Progress


_SHOWN_LAYERS, _WARNED_LAYERS = 10, 3
"""Of the ranking, in the closing table and in the warning; `msquant report` has all."""


def quantize(
    model: options.Model,
    algo: options.Algo = None,
    scheme: options.SchemeWord = None,
    group_size: options.GroupSize = None,
    rotation: options.Rotation = None,
    cache: options.Cache = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to make.  [default: MODEL-ALGO in the current folder]")
    ] = None,
    calibration: options.Calibration = None,
    template: options.Template = None,
    chat_template: options.ChatTemplate = None,
    pack: options.Pack = None,
    samples: options.Samples = None,
    max_samples: options.MaxSamples = None,
    sequence_length: options.SequenceLength = None,
    seed: options.Seed = None,
    formats: options.Formats = None,
    server: options.ServerFor = None,
    max_kl: Annotated[
        float | None,
        typer.Option(
            help="Choose schemes: the smallest folder whose KL to the float model, in nats, is at most this "
            "on every text of a set that nothing else has seen. Exit code 3 if it cannot be.",
            show_default=False,
        ),
    ] = None,
    max_perplexity_increase: Annotated[
        str | None,
        typer.Option(
            help="Choose schemes: the same for perplexity, by what part it may be above the float model's, "
            "for example 0.02 or 2%.",
            show_default=False,
        ),
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            help="Choose schemes: the most accurate folder of at most this size, for example 340GB; with "
            "another bound both hold.",
            show_default=False,
        ),
    ] = None,
    schemes: options.SchemeWords = None,
    verdict_text: Annotated[
        list[str] | None,
        typer.Option(
            help="Text that these bounds are measured on, in place of the builtin texts: a file or folder. "
            "Repeat it for more.",
            show_default=False,
        ),
    ] = None,
    device: options.Device = "cpu",
    source: options.Source = None,
    memory_budget: options.MemoryBudget = options.MEMORY_BUDGET,
    workers: options.WorkerCount = None,
    ray_address: options.RayAddress = None,
    allow_different_arithmetic: Annotated[
        bool,
        typer.Option(
            "--allow-different-arithmetic", help="Use nodes that round differently: bytes then vary."
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Start over where an interrupted run would be continued.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would be done and what it takes, as msquant plan does."),
    ] = False,
    no_evaluate: Annotated[
        bool, typer.Option("--no-evaluate", help="Leave out the short comparison with the float model.")
    ] = False,
    offline: Annotated[
        bool,
        typer.Option(
            "--offline", help="Ask no hub, for weights or datasets; HF_HUB_OFFLINE=1 does the same."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Quantize a model to W8A8, or another scheme, and write the checkpoint that an engine serves.

    One decoder layer is in memory at a time. Finished layers are kept when the run is interrupted or killed:
    the same command continues with the next one. Weights that are not here are downloaded first, into
    MSQUANT_CACHE. At the end the result is compared with the float model on held-out text, and a divergence
    beyond the recipe's limit is a warning.

    With --calibration none no text is needed, and no modelling code: weights are rounded to nearest, and
    linear layers are found by the names of tensors, so that any architecture will do. The formats are then
    ascend and compressed-tensors; the schemes are W8A8_DYNAMIC, W8A16, W4A16 and W4A8_DYNAMIC, as the server
    takes them.

    Format golden-stick is for vLLM-MindSpore, compressed-tensors for vLLM, ascend for vllm-ascend. Of several
    the first is written to OUTPUT, each other one to OUTPUT-FORMAT.

    Example: msquant quantize smollm2-135m --algo osl

    Example: msquant quantize deepseek-r1 --source /data/DeepSeek-R1 --output /data/DeepSeek-R1-W8A8

    Example: msquant quantize smollm2-135m --format golden-stick,compressed-tensors

    Example: msquant quantize smollm2-135m --scheme W4A16 --group-size 64 --format compressed-tensors

    Example: msquant quantize smollm2-135m --scheme W8A8_DYNAMIC --cache int8 --format ascend

    Example: msquant quantize ./Llama-3.1-8B --calibration texts.jsonl --samples 32

    Example: msquant quantize ./GLM-4.6 --calibration none --format ascend

    Example: msquant quantize smollm2-135m --max-kl 0.02 --for vllm

    Example: msquant quantize qwen3-8b --workers 4

    Example: msquant quantize qwen3-8b --calibration builtin --calibration gsm8k=25% --calibration self=4
    """
    from msquant.models.device import silence_libraries

    if not verbose:
        silence_libraries()
    from msquant import api
    from msquant.cli import promise
    from msquant.recipe.recipe import default_folder, find_recipe

    wanted = promise.parse_schemes(schemes)
    increase = promise.parse_part(max_perplexity_increase, "--max-perplexity-increase")
    promised = any(bound is not None for bound in (max_kl, increase, max_size))
    if promised:
        promise.refuse_with_bounds(
            {
                "--scheme": scheme,
                "--group-size": group_size,
                "--dry-run": dry_run,
                "--workers": workers,
                "--ray-address": ray_address,
            }
        )
    else:
        promise.refuse_without_bounds({"--schemes": schemes, "--verdict-text": verdict_text})
    formats = options.formats_of(server, formats)
    recipe = find_recipe(model, formats).adjusted(
        algo=algo,
        scheme=scheme,
        group_size=group_size,
        rotation=rotation,
        cache=cache,
        calibration=calibration,
        template=template,
        chat_template=chat_template,
        pack=pack,
        samples=samples,
        max_samples=max_samples,
        sequence_length=sequence_length,
        seed=seed,
        formats=formats,
        evaluate=not no_evaluate,
    )
    target = output or default_folder(model, recipe)
    budget = console.parse_bytes(memory_budget, "--memory-budget")
    if dry_run:
        from msquant.cli.plan import show_plan

        show_plan(recipe, target, source, budget, probe=True, as_json=as_json, workers=workers or 1)
        return

    from msquant.cli.layer_progress import LayerProgress
    from msquant.flows.workers import Workers

    if promised:
        with LayerProgress() as display:
            kept = api.promise(
                recipe,
                target,
                max_kl=max_kl,
                max_perplexity_increase=increase,
                max_size=None if max_size is None else console.parse_bytes(max_size, "--max-size"),
                schemes=wanted,
                verdict_texts=verdict_text or (),
                source=source,
                overwrite=overwrite,
                restart=restart,
                device=device,
                memory_budget=budget,
                verbose=verbose,
                offline=offline,
                progress=display.flow(_promised),
                transfer=lambda: _transfer(display),
            )
        if as_json:
            console.print_json(promise.promise_as_json(kept))
        else:
            promise.print_promise(kept)
        if not kept.kept:
            raise typer.Exit(promise.EXIT_NOT_KEPT)
        return

    without_text = recipe.calibration.is_none
    alone = Workers(workers, ray_address).in_process
    with LayerProgress(unit="part" if without_text else "decoder layer") as display:
        result = api.quantize(
            recipe,
            target,
            source=source,
            overwrite=overwrite,
            restart=restart,
            device=device,
            memory_budget=budget,
            verbose=verbose,
            offline=offline,
            workers=workers,
            ray_address=ray_address,
            allow_different_arithmetic=allow_different_arithmetic,
            progress=_parts(display) if without_text else display.flow(_alphas, in_order=alone),
            transfer=lambda: _transfer(display),
        )
    if as_json:
        console.print_json(_as_json(result))
    else:
        _print_result(result)


@contextmanager
def _transfer(display: "LayerProgress") -> "Iterator[HubProgress]":
    """Show a download in place of the layers."""
    from msquant.cli.transfer_progress import TransferProgress
    from msquant.hub.transfer_events import HubProgress

    with display.paused(), TransferProgress() as transfer:
        yield HubProgress(stage=transfer.stage, update=transfer.update)


def _parts(display: "LayerProgress") -> "Progress":
    """Callbacks that show the parts of a model that is quantized without calibration."""
    from msquant.progress import Progress

    return Progress(
        stage=display.stage,
        layers=display.start,
        layer=lambda record: display.advance(record.get("shards", "")),
        step=display.step,
    )


def _promised(record: dict[str, Any]) -> str:
    """Of a layer that is measured the noise of its units, of one that is quantized what was chosen."""
    if "noise" in record:
        return " ".join(f"{name} {noise:.1e}" for name, noise in record["noise"].items())
    return _alphas(record)


def _alphas(record: dict[str, Any]) -> str:
    return " ".join(f"{group['name']} {group['alpha']:.2f}" for group in record["groups"])


def _as_json(result: "QuantizeResult") -> dict[str, Any]:
    return {
        "folder": str(result.folder),
        "folders": {name: str(folder) for name, folder in result.folders.items()},
        "source_bytes": result.source_bytes,
        "output_bytes": result.output_bytes,
        "serving": asdict(result.serving) if result.serving else None,
        "notes": list(result.notes),
        "seconds": round(result.seconds, 3),
        "peak_memory_bytes": result.peak_memory,
        "layer_seconds": [round(seconds, 3) for seconds in result.layer_seconds],
        "layers": result.layers,
        "evaluation": result.evaluation,
    }


def _print_layers(result: "QuantizeResult") -> None:
    """The layers that add most noise, or all of them in their order where that was not measured."""
    records = {record["index"]: record for record in result.layers}
    alphas = {i: {group["name"]: group["alpha"] for group in r["groups"]} for i, r in records.items()}
    groups = list(dict.fromkeys(name for layer in alphas.values() for name in layer))
    ranked = scores.ranked_layers(result.evaluation) if result.evaluation is not None else []
    snr = scores.own_snr(result.evaluation) if result.evaluation is not None else {}
    noise = {r.key: [scores.decibels(snr[r.key]), f"{r.share:.1%}"] for r in ranked[:_SHOWN_LAYERS]}
    rows = [
        [
            index,
            *noise.get(index, []),
            *(f"{alphas[index][name]:.2f}" if name in alphas[index] else "" for name in groups),
            f"{records[index]['error']:.2e}",
        ]
        for index in noise or records
    ]
    if not noise:
        title = "Chosen alpha of each group, and the relative error of each decoder layer's output"
        console.print_table(title, ["layer", *groups, "error"], rows)
        return
    console.print_table(
        "Decoder layers by the noise that they add themselves, and the alpha of each group",
        ["layer", "own SNR, dB", "share", *groups, "error"],
        rows,
        caption=f"{len(rows)} of {len(records)} layers. share: of the noise that all of them add.",
        spare=("error",),
    )


def _print_result(result: "QuantizeResult") -> None:
    if result.layers:
        _print_layers(result)
    saved = 1 - result.output_bytes / result.source_bytes
    console.print_table(
        "Result",
        ["", ""],
        [
            *([f"folder, {name}", folder] for name, folder in result.folders.items()),
            *([["layers", len(result.layers)]] if result.layers else []),
            ["size before", console.as_bytes(result.source_bytes)],
            ["size after", f"{console.as_bytes(result.output_bytes)} ({saved:.0%} less)"],
            *([["to serve", console.as_serving(result.serving)]] if result.layers else []),
            ["time", f"{result.seconds:.0f} s"],
            ["peak memory", console.as_bytes(result.peak_memory)],
        ],
    )
    for note in result.notes:
        console.print_line(f"Note: {note}")
    if result.evaluation is not None:
        scores.print_scores("Compared with the float model", result.evaluation)
        _warn_of_limits(result.evaluation, result.folder)
    few = {
        layer["index"]: len(layer["experts"]["few_tokens"]) for layer in result.layers if "experts" in layer
    }
    if any(few.values()):
        console.print_warning(
            f"{sum(few.values())} experts in {sum(map(bool, few.values()))} decoder layers got too few "
            "calibration tokens and were quantized from their weights alone; msquant.json lists them, "
            "--max-samples, --samples and --sequence-length give them more"
        )
    console.print_next(f"msquant run --model {shlex.quote(str(result.folder))} --prompt 'I am'")


def _warn_of_limits(evaluation: dict[str, Any], folder: Path) -> None:
    if not evaluation["beyond"]:
        return
    from msquant.reporting.verdict import beyond_limit

    broken = [beyond_limit(**limit) for limit in evaluation["beyond"]]
    worst = ", ".join(str(layer.key) for layer in scores.ranked_layers(evaluation)[:_WARNED_LAYERS])
    console.print_warning(
        f"the result is worse than the recipe allows: {' and '.join(broken)}. The decoder layers that "
        f"add most noise are {worst}. Try --algo osl, more --samples, --calibration with text of the "
        "kind that the model will serve, or keep the worst matrices in floating point: "
        "msquant analyze MODEL --keep-float 6. Commands that spare the worst layers are in the report: "
        f"msquant report {shlex.quote(str(folder))}",
        severe=True,
    )
