"""What stands before the application: the key, the size and the pace of bodies, and the last resort."""

import asyncio
import hmac
import logging
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from msquant.server.errors import ApiError

# So much more than is allowed is read and dropped: a client that is still sending does not read our answer.
_DRAINED = 16
_CLOSE = {"Connection": "close"}


@dataclass(frozen=True)
class Guard:
    """An ASGI application around another one, which gets its requests with the whole body.

    Attributes:
        app: what is guarded.
        max_body: bytes of a request's body.
        body_seconds: time to send it.
        api_key: clients must send it as `Authorization: Bearer KEY` to every path but `/health`; None lets
            everybody in.
    """

    app: ASGIApp
    max_body: int
    body_seconds: float
    api_key: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection event as ASGI has it; nothing that goes wrong inside comes out."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            try:
                headers = dict(scope["headers"])
                self._check_key(scope["path"], headers)
                body = await self._body(headers, receive)
            except ApiError as error:
                await _refuse(watched, error)
                return
            if body is not None:
                await self.app(scope, _replay(body, receive), watched)
        except Exception:
            logging.getLogger("msquant.serve").exception("a request failed")
            if not started:
                await _refuse(send, ApiError(500, "the server failed; its own log says more"))

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.api_key is None or path == "/health":
            return
        given = headers.get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self.api_key.encode()):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer", **_CLOSE},
            )

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body; None if the client has gone away."""
        too_large = ApiError(
            413, f"the body is larger than the server's limit of {self.max_body} bytes", headers=_CLOSE
        )
        # h11 has checked that the length is a number.
        declared = int(headers.get(b"content-length", b"0"))
        if declared > self.max_body and (b"expect" in headers or declared > _DRAINED * self.max_body):
            raise too_large
        body = bytearray()
        size = 0
        try:
            async with asyncio.timeout(self.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size <= self.max_body:
                        body += chunk
                    if size > _DRAINED * self.max_body:
                        raise too_large
                    if not message.get("more_body"):
                        break
        except TimeoutError as error:
            raise ApiError(
                408, f"the body did not arrive within {self.body_seconds:g} seconds", headers=_CLOSE
            ) from error
        if size > self.max_body:
            raise too_large
        return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that begins with the body that was read already."""
    unread = True

    async def replay() -> Message:
        nonlocal unread
        if unread:
            unread = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay


async def _refuse(send: Send, error: ApiError) -> None:
    await send({"type": "http.response.start", "status": error.status, "headers": error.raw_headers()})
    await send({"type": "http.response.body", "body": error.body()})
