"""`msquant calibration`: what a model would be calibrated on, to look at before any work."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from msquant.cli import console, options

if TYPE_CHECKING:
    from msquant.flows.calibration import ShownCalibration

calibration = typer.Typer(
    name="calibration",
    help="Look at the text that a model would be calibrated on, and list the datasets with a short name.",
    epilog="Example: msquant calibration show smollm2-135m --calibration gsm8k",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@calibration.command("show")
def show_calibration(
    model: options.Model,
    calibration: options.Calibration = None,
    template: options.Template = None,
    chat_template: options.ChatTemplate = None,
    pack: options.Pack = None,
    samples: options.Samples = None,
    sequence_length: options.SequenceLength = None,
    seed: options.Seed = None,
    source: options.Source = None,
    first: Annotated[int, typer.Option(min=0, help="Print so many samples of each source.")] = 2,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no hub.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print the first samples as the model will see them, special tokens included, and count each source.

    Only the model's config.json and tokenizer are needed, but for the source `self`.

    Example: msquant calibration show smollm2-135m

    Example: msquant calibration show ./Qwen3-8B --calibration ultrachat --calibration builtin=25%
    """
    from msquant.models.device import silence_libraries

    silence_libraries()
    from msquant.cli.layer_progress import LayerProgress
    from msquant.flows.calibration import look_at_calibration
    from msquant.hub.choose import is_offline
    from msquant.recipe.recipe import find_recipe

    recipe = find_recipe(model).adjusted(
        calibration=calibration,
        template=template,
        chat_template=chat_template,
        pack=pack,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
    )
    with LayerProgress() as display:
        shown = look_at_calibration(
            recipe.calibration,
            source or recipe.model,
            first,
            offline=offline or is_offline(),
            progress=display.flow(lambda record: ""),
        )
    if as_json:
        console.print_json(_as_json(shown))
    else:
        _print(shown)


@calibration.command("datasets")
def list_datasets(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the datasets that have a short name, where they are and under which licence.

    Example: msquant calibration datasets
    """
    from msquant.calibration.known_sets import KNOWN_SETS

    rows = [[name, known.word, known.licence] for name, known in KNOWN_SETS.items()]
    if as_json:
        columns = ("name", "source", "licence")
        console.print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    console.print_table("Datasets", ["name", "source", "licence"], rows)
    console.print_next("msquant calibration show MODEL --calibration NAME")


def _as_json(shown: "ShownCalibration") -> dict[str, Any]:
    return {
        **shown.calibration.record,
        "first": [
            {"source": sample.source, "tokens": sample.tokens, "text": sample.text} for sample in shown.first
        ],
    }


def _print(shown: "ShownCalibration") -> None:
    for number, sample in enumerate(shown.first, 1):
        console.print_line(f"Sample {number}, from {sample.source}, {sample.tokens} tokens:")
        for line in sample.text.splitlines():
            console.print_line(f"  {line}")
        console.print_line("")
    console.print_table(
        "Calibration",
        ["source", "samples", "tokens", "commit"],
        [
            [record["source"], record["samples"], f"{record['tokens']:,}", record.get("commit", "")[:10]]
            for record in shown.calibration.sources
        ],
        caption=f"sha256 of the tokens: {shown.calibration.samples.sha256[:16]}",
    )
