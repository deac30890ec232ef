"""`msquant evaluate`: what quantization cost a model, in numbers."""

from pathlib import Path
from typing import Annotated

import typer

from msquant.cli import console, options, scores, task_scores


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            help="A folder, quantized or not; or a recipe or a model's name, for its float model.",
            show_default=False,
            autocompletion=options.complete_folders,
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
    template: options.Template = None,
    sequences: scores.Sequences = 4,
    sequence_length: scores.SequenceLength = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Ask the questions of these tasks of lm_eval instead, separated by commas: gsm8k,mmlu. "
            "Needs the packages of the extra `eval`."
        ),
    ] = None,
    task_data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the questions: TASK.jsonl, or TASK/test.jsonl and TASK/dev.jsonl. "
            " [default: the hub's]",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="So many questions of each task at most.")] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Examples before each question.  [default: as the task says]"),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="Ask an OpenAI-compatible server of the model: http://127.0.0.1:8000/v1. MODEL is the "
            "folder that it serves."
        ),
    ] = None,
    device: options.Device = "cpu",
    memory_budget: options.MemoryBudget = options.MEMORY_BUDGET,
    workers: options.WorkerCount = None,
    ray_address: options.RayAddress = None,
    allow_different_arithmetic: options.DifferentArithmetic = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    verbose: options.Verbose = False,
) -> None:
    """Measure what quantization cost: perplexity, and how far predictions are from the float model's.

    Both models go layer by layer over the same texts, with one decoder layer in memory at a time; quantized
    layers compute in exact integers. Without the float model, perplexity alone is measured.

    Example: msquant evaluate smollm2-135m-osl

    Example: msquant evaluate ./Llama-W8A8 --baseline ./Llama-3.1-8B --text mine.jsonl

    Example: msquant evaluate smollm2-135m-osl --tasks gsm8k,mmlu --task-data questions --limit 50
    """
    if tasks is not None:
        text_options = {"--text": text, "--no-builtin": no_builtin or None, "--template": template}
        worker_options = {"--workers": workers, "--ray-address": ray_address}
        task_scores.refuse(
            text_options | worker_options | {"--sequence-length": sequence_length}, "leave out --tasks"
        )
        task_scores.show(
            task_scores.run(
                model,
                tasks.split(","),
                verbose=verbose,
                baseline=baseline,
                endpoint=endpoint,
                task_data=task_data,
                limit=limit,
                num_fewshot=num_fewshot,
                device=device,
            ),
            as_json=as_json,
        )
        return
    task_options = {"--task-data": task_data, "--limit": limit, "--num-fewshot": num_fewshot}
    task_scores.refuse({**task_options, "--endpoint": endpoint}, "name tasks with --tasks")
    result = scores.run_comparison(
        [model],
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
    if result.baseline is None:
        console.print_warning(
            f"perplexity alone was measured: {result.notes[-1]}; name the float model with --baseline to see "
            "what quantization cost"
        )
    against = f" against {result.baseline.folder}" if result.baseline else ""
    for scored in result.models:
        phase = f", in {scored.phase}" if scored.phase else ""
        scores.print_scores(f"{scored.folder}{phase}{against}", scored.score.as_dict())
    scores.print_notes(result)
