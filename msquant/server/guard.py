"""What stands before the application: names, the key, size and pace of bodies, and the last resort."""

import asyncio
import hmac
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from msquant.server.address import AcceptedHosts
from msquant.server.api_errors import ApiError, busy

OPEN_PATHS = frozenset({"/", "/docs", "/openapi.json", "/health", "/metrics"})
"""Without a key too, as vLLM has it: a browser's address line, a load balancer and Prometheus send none."""
HELD_BODIES = 16
"""So many of the largest bodies may be in memory at once; of what comes beyond, nothing is kept."""
FREE_BYTES = 65_536
"""Of each body, which do not count for that: slow senders of large bodies do not keep small ones out."""
# So much more than is allowed is read and dropped: a client that is still sending does not read our answer.
_DRAINED = 16
_CLOSE = {"Connection": "close"}
# Of a client's own words in a message.
_SHOWN = 100


@dataclass
class Pool:
    """What the bodies of all requests together take.

    Attributes:
        limit: in bytes.
        held: bytes now, without the free ones of each body.
    """

    limit: int
    held: int = 0


class _Share:
    """What one body takes of the pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool, self._held = pool, 0

    def grow(self, size: int) -> bool:
        """Let the body become so large; False if there is no room for it."""
        more = max(0, size - FREE_BYTES) - self._held
        if self._pool.held + more > self._pool.limit:
            return False
        self._pool.held += more
        self._held += more
        return True

    def free(self) -> None:
        """Nothing of the body is in memory any more."""
        self._pool.held -= self._held
        self._held = 0


class _Body:
    """What has come of a body, in pieces of one size.

    One buffer that grows with each chunk would be moved again and again, and among hundreds of bodies the
    places it has left take more memory than the bodies themselves.
    """

    def __init__(self) -> None:
        self._pieces: list[bytearray] = []

    def add(self, chunk: bytes) -> None:
        """Keep what came."""
        if not self._pieces or len(self._pieces[-1]) + len(chunk) > FREE_BYTES:
            self._pieces.append(bytearray())
        self._pieces[-1] += chunk

    def clear(self) -> None:
        """Keep nothing."""
        self._pieces.clear()

    def whole(self) -> bytes:
        """All that came, in one."""
        return b"".join(self._pieces)


@dataclass(frozen=True)
class Guard:
    """An ASGI application around another one, which gets its requests with the whole body.

    Attributes:
        app: what is guarded.
        max_body: bytes of a request's body.
        body_seconds: time to send it.
        api_key: clients must send it as `Authorization: Bearer KEY` to every path but `OPEN_PATHS`; None
            lets everybody in.
        hosts: what clients may call the server.
        refusal: why no further request is taken now, or None; asked before a body is read.
    """

    app: ASGIApp
    max_body: int
    body_seconds: float
    api_key: str | None = None
    hosts: AcceptedHosts = field(default_factory=AcceptedHosts)
    refusal: Callable[[], ApiError | None] = lambda: None
    pool: Pool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pool", Pool(HELD_BODIES * self.max_body))

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

        share = _Share(self.pool)
        try:
            try:
                headers = dict(scope["headers"])
                self._check_host(headers)
                self._check_key(scope["path"], headers)
                refusal = self.refusal() if scope["method"] == "POST" else None
                body = await self._body(headers, receive, share, refusal)
            except ApiError as error:
                await _refuse(watched, error)
                return
            if body is not None:
                await self.app(scope, _replay(body, receive), watched)
        except Exception:
            logging.getLogger("msquant.serve").exception("a request failed")
            if not started:
                await _refuse(send, ApiError(500, "the server failed; its own log says more"))
        finally:
            share.free()

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        given = headers.get(b"host", b"")
        if not self.hosts.accepts(given):
            raise ApiError(
                403,
                f"this server does not answer to the name {given[:_SHOWN].decode('latin-1')!r}, only to "
                f"{self.hosts.shown()}; start it with --allow-host NAME for another",
                code="host_not_allowed",
                headers=_CLOSE,
            )

    def _check_key(self, path: str, headers: dict[bytes, bytes]) -> None:
        if self.api_key is None or path in OPEN_PATHS:
            return
        given = headers.get(b"authorization", b"")
        if not hmac.compare_digest(given, b"Bearer " + self.api_key.encode()):
            raise ApiError(
                401,
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer", **_CLOSE},
            )

    async def _body(
        self, headers: dict[bytes, bytes], receive: Receive, share: _Share, refusal: ApiError | None
    ) -> bytes | None:
        """The whole body; None if the client has gone away. With a refusal, nothing of it is kept."""
        too_large = ApiError(
            413, f"the body is larger than the server's limit of {self.max_body} bytes", headers=_CLOSE
        )
        # h11 has checked that the length is a number.
        declared = int(headers.get(b"content-length", b"0"))
        if declared > self.max_body:
            refusal = too_large
        if refusal and (b"expect" in headers or declared > _DRAINED * self.max_body):
            raise refusal
        body = _Body()
        size = 0
        try:
            async with asyncio.timeout(self.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > self.max_body:
                        refusal = too_large
                    elif refusal is None and not share.grow(size):
                        refusal = busy("the server holds as many large requests as it may; try again later")
                    if refusal is None:
                        body.add(chunk)
                    else:
                        body.clear()
                        share.free()
                    if size > _DRAINED * self.max_body:
                        raise too_large
                    if not message.get("more_body"):
                        break
        except TimeoutError as error:
            raise ApiError(
                408, f"the body did not arrive within {self.body_seconds:g} seconds", headers=_CLOSE
            ) from error
        if refusal is not None:
            raise refusal
        return body.whole()


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
