"""`msquant run`."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msquant.cli import console, options
from msquant.errors import EngineError

if TYPE_CHECKING:
    from msquant.inference.engine_protocol import Sampling

_LIVE_CHARACTERS = 1000
_TOKENS = 16
_CHAT_TOKENS = 512


def run(
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", help="Text to continue; repeat it for more prompts.")
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help='One prompt a line, or JSON Lines with a "prompt" each; - is standard input.'),
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Take prompts for a user's messages, by the model's chat template.")
    ] = False,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text alone, as it comes.")] = False,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Model folder. Without it: the newest result of `quantize`; if there is none, "
            "DeepSeek-R1-W8A8 in the current folder.",
            autocompletion=options.complete_folders,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Generate at most so many tokens a prompt; 16, in chats 512.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0 takes the most probable token; higher values vary more.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most probable tokens that reach this probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the sampling; the same seed gives the same text.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End the text before this string; repeat it for more.")
    ] = None,
    engine: options.EngineName = "auto",
    device: options.EngineDevice = "cpu",
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
    """Continue prompts with a quantized, or any other, model folder; on a terminal without prompts, chat.

    Example: msquant run --prompt "I am" --prompt "Today is" --max-tokens 32
    """
    from msquant.flows.generation import generate
    from msquant.inference.engine_protocol import Sampling
    from msquant.inference.prompt_file import read_prompts
    from msquant.models.device import silence_libraries

    if not verbose:
        silence_libraries()
    if dry_run:
        _print_dry_run(model, engine, dtype, recipe, as_json)
        return
    given = [*(prompts or []), *(read_prompts(prompt_file) if prompt_file else [])]
    conversation = not given and console.is_conversation() and not as_json
    _check_usage(given, conversation, stream, as_json)
    if max_tokens is None:
        max_tokens = _CHAT_TOKENS if chat or conversation else _TOKENS
    sampling = Sampling(max_tokens, temperature, top_p, seed, stop=tuple(stop or ()))
    if conversation:
        _converse(model, sampling, engine=engine, device=device, dtype=dtype, verify=verify, recipe=recipe)
        return
    live = _LiveText(given)
    with console.Working("loading the model") as status:

        def show(index: int, piece: str) -> None:
            if stream:
                status.stop()
                console.print_text(piece)
            else:
                status.update(live.add(index, piece))

        result = generate(
            model,
            given,
            sampling,
            engine=engine,
            device=device,
            dtype=dtype,
            verify=verify,
            recipe=recipe,
            chat=chat,
            on_ready=_say_who_answers,
            on_text=show,
        )
    if as_json:
        console.print_json(_document(result))
        return
    if stream:
        console.print_text("\n")
    else:
        for completion in result.completions:
            console.print_line(f"Prompt: {completion.prompt!r}. Generated text: {completion.text!r}")
    console.print_speed(result.tokens, result.seconds)


def _converse(model: Path | None, sampling: "Sampling", **chosen: Any) -> None:
    from msquant.checkpoint.tokenizer import load_tokenizer
    from msquant.cli.run import chat
    from msquant.flows.generation import find_model, load_engine
    from msquant.inference.chat_template import chat_prompt

    folder = find_model(model)
    with console.Working("loading the model"):
        tokenizer = load_tokenizer(folder)
        # Found out before the model is loaded: whether there is a chat template.
        chat_prompt(tokenizer, [{"role": "user", "content": "Hello"}])
        loaded = load_engine(folder, **chosen)
    _say_who_answers(folder, loaded.name)
    with closing(loaded):
        chat(loaded, tokenizer, sampling)


def _say_who_answers(folder: Path, engine: str) -> None:
    console.print_note(f"{folder.name} answers, on the engine {engine}: {folder}")


def _check_usage(prompts: list[str], conversation: bool, stream: bool, as_json: bool) -> None:
    if not prompts and not conversation:
        raise typer.BadParameter(
            "there is none; give --prompt or --prompt-file (without either, a chat begins on a terminal)",
            param_hint="--prompt",
        )
    if stream and as_json:
        raise typer.BadParameter("it prints text as it comes, and --json one document", param_hint="--stream")
    if stream and len(prompts) > 1:
        raise typer.BadParameter(f"it is for one prompt, there are {len(prompts)}", param_hint="--stream")


def _print_dry_run(model: Path | None, engine: str, dtype: str, recipe: str | None, as_json: bool) -> None:
    from msquant.flows import generation

    launch = generation.dry_run(model, engine=engine, dtype=dtype, recipe=recipe)
    if as_json:
        console.print_json(None if launch is None else launch.document())
    elif launch is None:
        console.print_line("# the embedded engine runs in this process; nothing is started")
    else:
        console.print_document(launch.shell())


class _LiveText:
    """The text of the prompt that is being continued, for a terminal."""

    def __init__(self, prompts: list[str]) -> None:
        self._prompts = prompts
        self._texts = [""] * len(prompts)

    def add(self, index: int, piece: str) -> str:
        self._texts[index] += piece
        return (self._prompts[index] + self._texts[index])[-_LIVE_CHARACTERS:]


def _document(result: Any) -> dict[str, Any]:
    return {
        "model": str(result.model),
        "engine": result.engine,
        "load_seconds": round(result.load_seconds, 3),
        "tokens_per_second": round(result.tokens / result.seconds, 2),
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


if TYPE_CHECKING:
    from msquant.inference.chat_template import Message
    from msquant.inference.engine_protocol import Engine, Sampling

_HELP = "/reset begins anew, Ctrl-C stops an answer, Ctrl-D ends"


def chat(engine: "Engine", tokenizer: Any, sampling: "Sampling") -> None:
    """Answer what is typed, with all that was said before, until Ctrl-D or /quit.

    Raises:
        EngineError: the first message of a chat has no answer.
    """
    from msquant.inference.chat_template import chat_prompt

    console.print_note(_HELP)
    messages: list[Message] = []
    while (line := console.ask("> ")) is not None:
        text = line.strip()
        if text == "/quit":
            return
        if text == "/reset":
            messages = []
        elif text.startswith("/"):
            console.print_note(f"there is no command {text}; {_HELP}, /quit likewise")
        elif text:
            messages.append({"role": "user", "content": text})
            try:
                answer = _answer(engine, chat_prompt(tokenizer, messages), sampling)
            except EngineError as error:
                if len(messages) == 1:
                    raise
                console.print_error(error)
                console.print_note("the chat begins anew")
                messages = []
            else:
                messages.append({"role": "assistant", "content": answer})


def _answer(engine: "Engine", prompt: str, sampling: "Sampling") -> str:
    """Show an answer as it comes; Ctrl-C ends it, and what was said so far counts."""
    from msquant.interrupts import check_interrupt, deferred_interrupts

    pieces: list[str] = []

    def show(_: int, piece: str) -> None:
        pieces.append(piece)
        console.print_text(piece)
        check_interrupt()

    try:
        with deferred_interrupts():
            (completion,) = engine.generate([prompt], sampling, show)
    except KeyboardInterrupt:
        console.print_text("\n")
        console.print_note("stopped")
    else:
        console.print_text("\n")
        console.print_speed(len(completion.token_ids), completion.seconds)
    return "".join(pieces)
