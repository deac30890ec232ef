"""Chats to prompts, by the template that the tokenizer brings along."""

from collections.abc import Mapping, Sequence
from typing import Any

from msquant.checkpoint.tokenizer import leading_tokens
from msquant.errors import EngineError

ROLES = ("system", "user", "assistant")

Message = Mapping[str, str]
"""One turn of a chat: `role`, one of `ROLES`, and `content`."""


def chat_text(tokenizer: Any, messages: Sequence[Message]) -> str:
    """Render a chat up to where the assistant's next turn begins.

    transformers renders the template in jinja's immutable sandbox.

    Args:
        tokenizer: a Hugging Face tokenizer.
        messages: at least one turn, the oldest first.

    Raises:
        EngineError: there is no message, a role is unknown, the tokenizer has no chat template, or the
            template refuses these messages.
    """
    if not messages:
        raise EngineError("the chat has no message", remedy="begin with a message of the user")
    for message in messages:
        if message["role"] not in ROLES:
            raise EngineError(
                f"the role {message['role']!r} is unknown", remedy=f"use one of: {', '.join(ROLES)}"
            )
    if not tokenizer.chat_template:
        raise EngineError(
            "the tokenizer has no chat template: this is a model for continuing texts, not for chats",
            where="tokenizer_config.json",
            remedy="continue a text instead (run --prompt, /v1/completions), or copy the chat template of "
            "the original model into the folder",
        )
    turns = [{"role": message["role"], "content": message["content"]} for message in messages]
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    # A template is a program from the model folder: it may raise anything.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EngineError(f"the chat template refuses these messages: {reason}") from error


def chat_ids(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """The tokens of `chat_text`, to which nothing is to be added: the template writes the special tokens."""
    text = chat_text(tokenizer, messages)
    return [int(token) for token in tokenizer.encode(text, add_special_tokens=False)]


def chat_prompt(tokenizer: Any, messages: Sequence[Message]) -> str:
    """`chat_text` for an engine that tokenizes it itself: without the BOS token that the tokenizer adds."""
    text = chat_text(tokenizer, messages)
    return text.removeprefix(tokenizer.bos_token) if leading_tokens(tokenizer) else text
