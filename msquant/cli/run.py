"""`msquant run`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from msquant.cli import console

_LIVE_CHARACTERS = 1000


def run(
    prompts: Annotated[
        list[str], typer.Option("--prompt", help="Text to continue; repeat it for more prompts.")
    ],
    model: Annotated[
        Path | None,
        typer.Option(
            help="Model folder. Without it: the newest result of `quantize`; if there is none, "
            "DeepSeek-R1-W8A8 in the current folder."
        ),
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Generate at most so many tokens a prompt.")] = 16,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most probable token; higher values vary more.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most probable tokens that reach this probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the sampling; the same seed gives the same text.")] = 0,
    engine: Annotated[
        str,
        typer.Option(
            help="auto, embedded, vllm or vllm-mindspore; auto takes vllm-mindspore where it and an NPU are "
            "there, else embedded."
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="Where the embedded engine computes: cpu or ascend.")] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Of activations, for the engine vllm: auto, float32, bfloat16 or float16.")
    ] = "auto",
    verify: Annotated[
        bool | None,
        typer.Option(
            "--verify/--no-verify",
            help="Compare the sha256 of all shards with msquant.json; without either: up to 1 GB of them.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="For the engine vllm-mindspore: take the serving section of this recipe."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the process that the engine would start, and end.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show MindSpore's own warnings.")] = False,
) -> None:
    """Continue prompts with a quantized, or any other, model folder.

    Example: msquant run --prompt "I am" --prompt "Today is" --max-tokens 32
    """
    from msquant.generation import generate
    from msquant.inference.engine import Sampling
    from msquant.models.device import silence_libraries

    if not verbose:
        silence_libraries()
    if dry_run:
        _print_dry_run(model, engine, dtype, recipe, as_json)
        return
    sampling = Sampling(max_tokens, temperature, top_p, seed)
    live = _LiveText(prompts)
    with console.stderr.status("loading the model") as status:
        result = generate(
            model,
            prompts,
            sampling,
            engine=engine,
            device=device,
            dtype=dtype,
            verify=verify,
            recipe=recipe,
            on_ready=lambda folder, name: status.update(f"{name} runs {folder}"),
            on_text=lambda index, piece: status.update(live.add(index, piece)),
        )
    if as_json:
        console.print_json(_document(result))
        return
    for completion in result.completions:
        console.print_line(f"Prompt: {completion.prompt!r}. Generated text: {completion.text!r}")


def _print_dry_run(model: Path | None, engine: str, dtype: str, recipe: str | None, as_json: bool) -> None:
    from msquant import generation

    launch = generation.dry_run(model, engine=engine, dtype=dtype, recipe=recipe)
    if as_json:
        console.print_json(None if launch is None else launch.document())
    elif launch is None:
        console.print_line("# the embedded engine runs in this process; nothing is started")
    else:
        console.print_line(launch.shell())


class _LiveText:
    """The text of the prompt that is being continued, for a terminal."""

    def __init__(self, prompts: list[str]) -> None:
        self._prompts = prompts
        self._texts = [""] * len(prompts)

    def add(self, index: int, piece: str) -> Any:
        from rich.text import Text

        self._texts[index] += piece
        return Text((self._prompts[index] + self._texts[index])[-_LIVE_CHARACTERS:])


def _document(result: Any) -> dict[str, Any]:
    return {
        "model": str(result.model),
        "engine": result.engine,
        "load_seconds": round(result.load_seconds, 3),
        "completions": [
            {
                "prompt": completion.prompt,
                "text": completion.text,
                "token_ids": list(completion.token_ids),
                "finish_reason": completion.finish_reason,
                "tokens_per_second": round(completion.tokens_per_second, 2),
            }
            for completion in result.completions
        ],
    }
