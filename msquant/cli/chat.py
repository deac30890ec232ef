"""The chat that `msquant run` begins on a terminal when it is given no prompt."""

from typing import TYPE_CHECKING, Any

from msquant.cli import console
from msquant.errors import EngineError

if TYPE_CHECKING:
    from msquant.inference.chat import Message
    from msquant.inference.engine import Engine, Sampling

_HELP = "/reset begins anew, Ctrl-C stops an answer, Ctrl-D ends"


def chat(engine: "Engine", tokenizer: Any, sampling: "Sampling") -> None:
    """Answer what is typed, with all that was said before, until Ctrl-D or /quit.

    Raises:
        EngineError: the first message of a chat has no answer.
    """
    from msquant.inference.chat import chat_prompt

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
