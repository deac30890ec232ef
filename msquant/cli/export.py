"""`msquant export`: a quantized folder in another format."""

from pathlib import Path
from typing import Annotated

import typer

from msquant.cli import console, options


def export(
    folder: Annotated[
        Path,
        typer.Argument(
            help="A quantized folder, of any format.",
            show_default=False,
            autocompletion=options.complete_folders,
        ),
    ],
    formats: Annotated[
        str,
        typer.Option(
            "--format",
            help="golden-stick, compressed-tensors, ascend, or several with commas between them.",
            show_default=False,
            autocompletion=options.complete_formats,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder to make; further formats go beside it, to OUTPUT-FORMAT.  [default: FOLDER-FORMAT]"
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="none: leave out the scales of an int8 key-value cache, which ascend alone has.",
            show_default="as the folder has it",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Write a quantized folder in another format, without quantizing again.

    golden-stick is for vLLM-MindSpore, compressed-tensors for vLLM, ascend for vllm-ascend. int8 weights and
    zero points stay what they are, and scales to a rounding of float32; what a format cannot express is
    refused with the reason. The files are first compared with the folder's msquant.json, if it has one.

    Example: msquant export smollm2-135m-osl --format compressed-tensors

    Example: msquant export qwen3-8b-osl --format compressed-tensors --cache none

    Example: msquant export DeepSeek-R1-W8A8 --format ascend --output /data/DeepSeek-R1-ascend
    """
    from msquant.models.device import silence_libraries

    silence_libraries()
    from msquant import api
    from msquant.cli.layer_progress import LayerProgress
    from msquant.flows.conversion import ExportProgress

    with LayerProgress("part") as display:
        results = api.export(
            folder,
            formats,
            output=output,
            cache=cache,
            overwrite=overwrite,
            progress=ExportProgress(
                stage=display.stage,
                parts=display.start,
                part=lambda done: display.advance(""),
            ),
        )
    if as_json:
        console.print_json(
            [
                {
                    "folder": str(result.folder),
                    "format": result.format,
                    "variant": result.variant,
                    "output_bytes": result.output_bytes,
                    "seconds": round(result.seconds, 3),
                }
                for result in results
            ]
        )
        return
    rows = [
        [result.format, result.folder, console.as_bytes(result.output_bytes), f"{result.seconds:.1f}"]
        for result in results
    ]
    console.print_table(f"{folder}, in other formats", ["format", "folder", "size", "seconds"], rows)
