"""The documents that OpenAI's clients read: a whole answer, and the chunks of a streamed one."""

import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from msquant.server.scored_tokens import ScoredToken
from msquant.server.steps import Piece

DONE = b"data: [DONE]\n\n"


def dumps(document: Mapping[str, Any]) -> bytes:
    """A document as ASCII JSON, which can hold whatever a client has sent, half a surrogate pair as well."""
    return json.dumps(document).encode("ascii")


def event(document: Mapping[str, Any]) -> bytes:
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

    def whole(self, pieces: list[list[Piece]], usage: dict[str, int]) -> dict[str, Any]:
        """The whole answer, of the pieces of each choice."""
        choices = [
            {
                "index": i,
                **self._choice("".join(piece.text for piece in own)),
                "logprobs": self._logprobs(own),
                "finish_reason": own[-1].finish_reason,
            }
            for i, own in enumerate(pieces)
        ]
        return {**self._head, "object": self._object, "choices": choices, "usage": usage}

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """A piece of a stream."""
        delta = self._delta(piece.text)
        logprobs = self._logprobs([piece]) if piece.scored else None
        choice = {"index": piece.choice, **delta, "logprobs": logprobs, "finish_reason": piece.finish_reason}
        return {**self._head, "object": self._chunk, "choices": [choice]}

    def usage(self, usage: dict[str, int]) -> dict[str, Any]:
        """The chunk with the number of tokens."""
        return {**self._head, "object": self._chunk, "choices": [], "usage": usage}

    def _logprobs(self, pieces: list[Piece]) -> dict[str, Any] | None:
        if pieces[0].scored is None:
            return None
        scored = [token for piece in pieces for token in piece.scored or ()]
        return {
            "tokens": [self._token(token.data) for token in scored],
            "token_logprobs": [token.logprob for token in scored],
            "top_logprobs": [self._top(token) for token in scored],
            "text_offset": [token.offset for token in scored],
        }

    def _top(self, scored: ScoredToken) -> dict[str, float] | None:
        if scored.logprob is None:
            return None
        top: dict[str, float] = {}
        # The token itself is always there. Of several that look the same, the most probable one is.
        for data, logprob in (*scored.top, (scored.data, scored.logprob)):
            top.setdefault(self._token(data), logprob)
        return top

    def _token(self, data: bytes) -> str:
        text = _readable(data)
        return text if text.encode() == data else f"bytes:{text}"

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

    def _logprobs(self, pieces: list[Piece]) -> dict[str, Any] | None:
        if pieces[0].scored is None:
            return None
        # The only token of a last piece is the one that ended the answer, no part of its content.
        scored = [token for piece in pieces if piece.finish_reason is None for token in piece.scored or ()]
        content = [
            {
                **_entry(token.data, token.logprob),
                "top_logprobs": [_entry(data, logprob) for data, logprob in token.top],
            }
            for token in scored
        ]
        return {"content": content, "refusal": None}

    def _choice(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}


def _readable(data: bytes) -> str:
    """A token's text; the bytes of a part of a character as OpenAI writes them: `\\xe4\\xb8`."""
    return data.decode(errors="backslashreplace")


def _entry(data: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _readable(data), "logprob": logprob, "bytes": list(data)}


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The numbers of tokens of a request."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
