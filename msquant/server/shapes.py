"""The documents that OpenAI's clients read: a whole answer, and the chunks of a streamed one."""

import json
import secrets
import time
from typing import Any

from msquant.server.steps import Piece

DONE = b"data: [DONE]\n\n"


def dumps(document: dict[str, Any]) -> bytes:
    """A document as ASCII JSON, which can hold whatever a client has sent, half a surrogate pair as well."""
    return json.dumps(document).encode("ascii")


def event(document: dict[str, Any]) -> bytes:
    """A document as a server-sent event."""
    return b"data: " + dumps(document) + b"\n\n"


class Shape:
    """A text completion, of one request.

    Args:
        model: the id of the model.
    """

    _prefix = "cmpl-"
    _object = _chunk = "text_completion"

    def __init__(self, model: str) -> None:
        self._head = {
            "id": self._prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: list[str], reasons: list[str], usage: dict[str, int]) -> dict[str, Any]:
        """The whole answer; a text and a reason for each choice."""
        choices = [
            {"index": i, **self._choice(text), "logprobs": None, "finish_reason": reason}
            for i, (text, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return {**self._head, "object": self._object, "choices": choices, "usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece of a stream."""
        delta = self._delta(piece.text)
        choice = {"index": piece.choice, **delta, "logprobs": None, "finish_reason": piece.finish_reason}
        return {**self._head, "object": self._chunk, "choices": [choice]}

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk with the number of tokens."""
        return {**self._head, "object": self._chunk, "choices": [], "usage": usage}

    def _choice(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}


class ChatShape(Shape):
    """A chat completion."""

    _prefix = "chatcmpl-"
    _object = "chat.completion"
    _chunk = "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        """The role comes first, as OpenAI sends it."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        return [{**self._head, "object": self._chunk, "choices": [choice]}]

    def _choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The numbers of tokens of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
