"""What commands show of an evaluation, and what `evaluate` and `compare` share."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msquant.cli import console

if TYPE_CHECKING:
    from msquant.evaluation.domain_scores import LayerScore
    from msquant.evaluation.ranking import Ranked
    from msquant.flows.comparison import ComparedModel, Comparison

_WORST = 3
"""Decoder layers named below a table of scores."""

Text = Annotated[
    list[str] | None,
    typer.Option(
        "--text", help="Text to evaluate on, too: a file, a folder, hf:ORG/NAME; repeat it for more."
    ),
]
NoBuiltin = Annotated[bool, typer.Option("--no-builtin", help="Leave the builtin texts out.")]
Sequences = Annotated[int, typer.Option(min=1, help="Windows of each text, evenly spread over it.")]
SequenceLength = Annotated[
    int | None,
    typer.Option(min=2, help="Tokens in each window.  [default: 512, or what the model takes at most]"),
]


def run_comparison(
    models: list[str], *, baseline: str | None, verbose: bool, memory_budget: str, **settings: Any
) -> "Comparison":
    """Compare models with progress on the terminal; see `msquant.api.compare`."""
    from msquant.models.device import silence_libraries

    if not verbose:
        silence_libraries()
    from msquant import api
    from msquant.cli.layer_progress import LayerProgress

    with LayerProgress() as display:
        return api.compare(
            models,
            baseline,
            memory_budget=console.parse_bytes(memory_budget, "--memory-budget"),
            progress=display.flow(lambda record: _note(record["layers"])),
            **settings,
        )


def as_json(result: "Comparison") -> dict[str, Any]:
    """A comparison as plain data."""
    return {
        "baseline": _model_json(result.baseline) if result.baseline else None,
        "models": [_model_json(model) for model in result.models],
        "texts": {name: list(shape) for name, shape in result.texts.items()},
        "notes": result.notes,
        "seconds": round(result.seconds, 3),
        "peak_memory_bytes": result.peak_memory,
    }


def print_notes(result: "Comparison") -> None:
    """Say what the reader should know, and what it took."""
    if result.baseline is not None:
        for note in result.notes:
            console.print_warning(note)
    console.print_line(f"Took {result.seconds:.0f} s and {console.as_bytes(result.peak_memory)} of memory.")


def print_scores(title: str, score: Mapping[str, Any]) -> None:
    """A table of a model's scores, a row a text, and its worst decoder layers.

    Args:
        title: of the table.
        score: `ModelScore.as_dict()`.
    """
    rows = score["texts"] + ([score["overall"]] if score["texts"][1:] else [])
    compared = score["overall"]["kl"] is not None
    columns = ["text", "tokens", "perplexity"]
    if compared:
        columns += ["float", "change", "KL", "top 1", "top 5", "logits MSE"]
    table = [_row(row, compared) for row in rows]
    console.print_table(title, columns, table, spare=("logits MSE", "tokens", "top 5"))
    if ranked := ranked_layers(score):
        snr = own_snr(score)
        listed = ", ".join(f"{layer.key} ({decibels(snr[layer.key])} dB)" for layer in ranked[:_WORST])
        console.print_line(f"Decoder layers that add most noise of their own: {listed}.")


def ranked_layers(score: Mapping[str, Any]) -> "list[Ranked[int]]":
    """The decoder layers by `rank_layers`. Argument as for `print_scores`."""
    from msquant.evaluation.ranking import rank_layers

    return rank_layers(own_snr(score))


def own_snr(score: Mapping[str, Any]) -> dict[int, float | None]:
    """Signal-to-noise in dB of each decoder layer's own, by its number. Argument as for `print_scores`."""
    return {layer["index"]: layer["own_snr"] for layer in score["layers"]}


def decibels(value: float | None) -> str:
    """A signal-to-noise ratio; `exact` where there is no noise."""
    return "exact" if value is None else f"{value:.1f}"


def change(score: Mapping[str, Any]) -> str:
    """What a text's perplexity rose by."""
    return f"{score['perplexity'] / score['baseline_perplexity'] - 1:+.1%}"


def _row(score: Mapping[str, Any], compared: bool) -> list[Any]:
    row = [score["text"], score["tokens"], f"{score['perplexity']:.3f}"]
    if not compared:
        return row
    return [
        *row,
        f"{score['baseline_perplexity']:.3f}",
        change(score),
        f"{score['kl']:.4f}",
        f"{score['top1']:.1%}",
        f"{score['top5']:.1%}",
        f"{score['logit_error']:.1e}",
    ]


def _note(layers: "Sequence[LayerScore]") -> str:
    return ", ".join(f"{decibels(layer.snr)} dB" for layer in layers)


def _model_json(model: "ComparedModel") -> dict[str, Any]:
    phase = {"phase": model.phase} if model.phase else {}
    return {"folder": str(model.folder), **phase, "bytes": model.nbytes, **model.score.as_dict()}
