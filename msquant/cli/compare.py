"""`msquant compare`: quantized folders side by side."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from msquant.cli import console, options, scores
from msquant.errors import RecipeError

if TYPE_CHECKING:
    from msquant.flows.comparison import Comparison


def compare(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Two or more folders, quantized.",
            show_default=False,
            autocompletion=options.complete_folders,
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            help="The float model of all of them.  [default: the one that an msquant.json among them names]"
        ),
    ] = None,
    text: scores.Text = None,
    no_builtin: scores.NoBuiltin = False,
    template: options.Template = None,
    sequences: scores.Sequences = 4,
    sequence_length: scores.SequenceLength = None,
    device: options.Device = "cpu",
    memory_budget: options.MemoryBudget = options.MEMORY_BUDGET,
    workers: options.WorkerCount = None,
    ray_address: options.RayAddress = None,
    allow_different_arithmetic: options.DifferentArithmetic = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Compare quantized folders of one float model: the same texts, the same arithmetic, side by side.

    Folders may be of any format that msquant reads, whoever made them. The float model is computed once for
    all of them.

    Example: msquant compare smollm2-135m-osl smollm2-135m-rtn

    Example: msquant compare ./ours ./theirs --baseline ./Llama-3.1-8B --markdown
    """
    if not models[1:]:
        raise RecipeError(
            "one folder is nothing to compare",
            where=models[0],
            remedy="name two or more, or use msquant evaluate",
        )
    result = scores.run_comparison(
        models,
        verbose=verbose,
        memory_budget=memory_budget,
        baseline=baseline,
        texts=text or (),
        builtin=not no_builtin,
        template=template,
        sequences=sequences,
        sequence_length=sequence_length,
        device=device,
        workers=workers,
        ray_address=ray_address,
        allow_different_arithmetic=allow_different_arithmetic,
    )
    if as_json:
        console.print_json(scores.as_json(result))
        return
    columns, rows = _table(result, full=markdown)
    if markdown:
        for cells in (columns, ["---"] * len(columns), *rows):
            # A row that goes on in the next line is no Markdown.
            console.print_document(console.plain_line(f"| {' | '.join(map(str, cells))} |"))
        return
    console.print_table(
        "KL to the float model by text, in nats",
        columns,
        rows,
        caption="perplexity, top 1: over all texts",
        spare=("size", "top 1", "perplexity"),
    )
    scores.print_notes(result)


def _table(result: "Comparison", *, full: bool) -> tuple[list[str], list[list[Any]]]:
    """A row a model; `full` adds every text's perplexity, which a terminal has no room for."""
    texts = [*result.texts, "all"] if len(result.texts) > 1 else [*result.texts]
    columns = ["folder", "size"]
    for text in texts:
        columns += [f"KL {text}", f"perplexity {text}"] if full else [text]
    columns += ["top 1", "top 5"] if full else ["perplexity", "top 1"]
    rows = []
    for model in [*([result.baseline] if result.baseline else []), *result.models]:
        name = str(model.folder) if full else model.folder.name
        name += f" ({model.phase})" if model.phase else ""
        row: list[Any] = [name, console.as_bytes(model.nbytes)]
        for score in [*model.score.texts, model.score.overall][: len(texts)]:
            row.append("" if score.kl is None else f"{score.kl:.4f}")
            row += [f"{score.perplexity:.3f}"] if full else []
        overall = model.score.overall
        shares = ["" if share is None else f"{share:.1%}" for share in (overall.top1, overall.top5)]
        rows.append([*row, *shares] if full else [*row, f"{overall.perplexity:.3f}", shares[0]])
    return columns, rows
