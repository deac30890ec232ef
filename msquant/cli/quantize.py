"""`msquant quantize`: a model to W8A8."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msquant.cli import console

if TYPE_CHECKING:
    from msquant.pipeline import QuantizeResult
    from msquant.quantization.report import LayerReport


def quantize(
    model: Annotated[
        str,
        typer.Argument(help="A recipe's name or file (.yaml), or a model's folder (Hugging Face)."),
    ],
    algo: Annotated[str | None, typer.Option(help="Algorithm: osl (OutlierSuppressionLite).")] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder to make.  [default: MODEL-ALGO in the current folder]")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text to calibrate on: builtin, or a .txt, .jsonl or .parquet file.")
    ] = None,
    text_field: Annotated[str | None, typer.Option(help="Field of the text in .jsonl and .parquet.")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in each calibration sequence.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the choice of calibration sequences.")] = None,
    search: Annotated[
        str | None, typer.Option(help="fast, or reference: golden-stick's own modules, slow.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or ascend.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show golden-stick's own log.")] = False,
) -> None:
    """Quantize a model to W8A8 and write the checkpoint that vLLM-MindSpore serves.

    Example: msquant quantize smollm2-135m --algo osl

    Example: msquant quantize ./Llama-3.1-8B --algo osl --calibration texts.jsonl --samples 32
    """
    from msquant.models.device import silence_libraries

    if not verbose:
        silence_libraries()
    from msquant.pipeline import Progress
    from msquant.pipeline import quantize as quantize_model
    from msquant.recipes import find_recipe

    recipe = find_recipe(model)
    recipe = recipe.replace("quantization", algorithm=algo, search=search)
    recipe = recipe.replace(
        "calibration",
        source=calibration,
        text_field=text_field,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
    )
    target = output or Path(f"{Path(model).stem}-{recipe.quantization.algorithm}")

    with console.LayerProgress() as display:
        result = quantize_model(
            recipe,
            target,
            overwrite=overwrite,
            device=device,
            verbose=verbose,
            progress=Progress(
                stage=display.stage,
                layers=display.start,
                layer=lambda index, report: display.advance(index, _alphas(report)),
            ),
        )
    if as_json:
        console.print_json(_as_json(result))
    else:
        _print_result(result)


def _alphas(report: "LayerReport") -> str:
    return " ".join(f"{group.name} {group.alpha:.2f}" for group in report.groups)


def _as_json(result: "QuantizeResult") -> dict[str, Any]:
    return {
        "folder": str(result.folder),
        "source_bytes": result.source_bytes,
        "output_bytes": result.output_bytes,
        "seconds": round(result.seconds, 3),
        "peak_memory_bytes": result.peak_memory,
        "layers": [
            {"index": index, "error": report.error, "groups": [asdict(group) for group in report.groups]}
            for index, report in enumerate(result.reports)
        ],
    }


def _print_result(result: "QuantizeResult") -> None:
    groups = [group.name for group in result.reports[0].groups]
    rows = [
        [index, *(f"{group.alpha:.2f}" for group in report.groups), f"{report.error:.2e}"]
        for index, report in enumerate(result.reports)
    ]
    console.print_table(
        "Chosen alpha of each group, and the relative error of each decoder layer's output",
        ["layer", *groups, "error"],
        rows,
    )
    saved = 1 - result.output_bytes / result.source_bytes
    console.print_table(
        "Result",
        ["", ""],
        [
            ["folder", result.folder],
            ["decoder layers", len(result.reports)],
            ["size before", console.as_bytes(result.source_bytes)],
            ["size after", f"{console.as_bytes(result.output_bytes)} ({saved:.0%} less)"],
            ["time", f"{result.seconds:.0f} s"],
            ["peak memory", console.as_bytes(result.peak_memory)],
        ],
    )
    console.print_line(f"Next: msquant run --model {shlex.quote(str(result.folder))} --prompt 'I am'")
