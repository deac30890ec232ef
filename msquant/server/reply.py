"""A request's answer over HTTP, whole or streamed, for as long as its client listens."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import closing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from msquant.errors import MsquantError
from msquant.server.api_errors import ApiError
from msquant.server.observed import Observation
from msquant.server.shapes import DONE, Shape, dumps, event, usage
from msquant.server.steps import Encoded, Piece, Started, Steps
from msquant.server.worker import AnswerJob, AnswerWorker

_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Reply(Response):
    """Submits the steps of a request and sends what comes of them.

    The status is decided when the engine has accepted the request. The work ends when the client goes away.

    Args:
        worker: runs the steps.
        steps: of the request.
        shape: makes the documents.
        stream: send every piece as it comes.
        include_usage: a stream ends with the numbers of tokens.
    """

    def __init__(
        self, worker: AnswerWorker, steps: Steps, shape: Shape, *, stream: bool, include_usage: bool
    ) -> None:
        self.status_code = 200
        self.background = None
        self._worker, self._steps, self._shape = worker, steps, shape
        self._stream, self._include_usage = stream, include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; see the class."""
        try:
            job = self._worker.submit(self._steps)
        except ApiError as error:
            await _send(send, error.status, error.raw_headers(), error.body())
            return
        observation: Observation = scope["observation"]
        observation.taken()
        try:
            with closing(job):
                await _until_first(self._reply(job, send, observation), _disconnected(receive))
        finally:
            observation.left()

    async def _reply(
        self, job: AnswerJob[Encoded | Started | Piece], send: Send, observation: Observation
    ) -> None:
        try:
            while isinstance(started := await anext(job), Encoded):
                pass
            assert isinstance(started, Started)
            observation.started(started.prompt_tokens)
            pieces = _observed(job, observation)
            if not self._stream:
                body = dumps(self._shape.whole(await _by_choice(pieces), _usage(observation)))
                await _send(send, 200, [(b"content-type", b"application/json")], body)
                return
        except Exception as error:
            refusal = _as_api_error(error)
            await _send(send, refusal.status, refusal.raw_headers(), refusal.body())
            return
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        try:
            await self._events(pieces, observation, send)
        except Exception as error:
            await _send_more(send, event(_as_api_error(error).document()))
        await send({"type": "http.response.body", "body": DONE})

    async def _events(self, pieces: AsyncIterator[Piece], observation: Observation, send: Send) -> None:
        for document in self._shape.opening():
            await _send_more(send, event(document))
        async for piece in pieces:
            if piece.text or piece.scored or piece.finish_reason is not None:
                await _send_more(send, event(self._shape.chunk(piece)))
        if self._include_usage:
            await _send_more(send, event(self._shape.usage(_usage(observation))))


async def _observed(
    job: AnswerJob[Encoded | Started | Piece], observation: Observation
) -> AsyncIterator[Piece]:
    async for piece in job:
        assert isinstance(piece, Piece)
        observation.piece(piece.choice, piece.tokens, piece.finish_reason)
        yield piece


async def _by_choice(pieces: AsyncIterator[Piece]) -> list[list[Piece]]:
    choices: list[list[Piece]] = []
    async for piece in pieces:
        if piece.choice == len(choices):
            choices.append([])
        choices[piece.choice].append(piece)
    return choices


def _usage(observation: Observation) -> dict[str, int]:
    return usage(observation.prompt_tokens or 0, observation.completion_tokens)


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, MsquantError):
        return ApiError.of(error, 500)
    logging.getLogger("msquant.serve").error("a request failed", exc_info=error)
    return ApiError(500, f"the server failed: {type(error).__name__}; its own log says more")


async def _send(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _send_more(send: Send, body: bytes) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _until_first(*ways: Coroutine[Any, Any, None]) -> None:
    """Run all, and end the others when the first is done; its exception comes out."""
    tasks = [asyncio.create_task(way) for way in ways]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
