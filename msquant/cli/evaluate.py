"""`msquant evaluate`: what quantization cost a model, in numbers."""

from typing import Annotated

import typer

from msquant.cli import console, options, scores


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, quantized or not; or a recipe or a model's name, for its float model.",
            show_default=False,
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            help="The float model to compare with.  [default: the one that msquant.json says the folder was "
            "made from]"
        ),
    ] = None,
    text: scores.Text = None,
    no_builtin: scores.NoBuiltin = False,
    text_field: options.TextField = None,
    sequences: scores.Sequences = 4,
    sequence_length: scores.SequenceLength = None,
    device: options.Device = "cpu",
    memory_budget: options.MemoryBudget = options.MEMORY_BUDGET,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure what quantization cost: perplexity, and how far predictions are from the float model's.

    Both models go layer by layer over the same texts, with one decoder layer in memory at a time; quantized
    layers compute in exact integers. Without the float model, perplexity alone is measured.

    Example: msquant evaluate smollm2-135m-osl

    Example: msquant evaluate ./Llama-W8A8 --baseline ./Llama-3.1-8B --text mine.jsonl
    """
    result = scores.run_comparison(
        [model],
        verbose=verbose,
        memory_budget=memory_budget,
        baseline=baseline,
        texts=text or (),
        builtin=not no_builtin,
        text_field=text_field,
        sequences=sequences,
        sequence_length=sequence_length,
        device=device,
    )
    if as_json:
        console.print_json(scores.as_json(result))
        return
    (scored,) = result.models
    if result.baseline is None:
        console.print_warning(
            f"perplexity alone was measured: {result.notes[-1]}; name the float model with --baseline to see "
            "what quantization cost"
        )
    against = f" against {result.baseline.folder}" if result.baseline else ""
    scores.print_scores(f"{scored.folder}{against}", scored.score.as_dict())
    scores.print_notes(result)
