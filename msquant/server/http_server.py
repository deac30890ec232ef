"""The server around the embedded engine: its socket, its connections, its end."""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.routing import Route

from msquant.inference.embedded import EmbeddedEngine
from msquant.server.address import AcceptedHosts, cannot_listen
from msquant.server.connection import Connection
from msquant.server.guard import Guard
from msquant.server.http_app import build_app
from msquant.server.observed import Metrics, Observed
from msquant.server.steps import RequestLimits
from msquant.server.worker import AnswerWorker

KEEP_ALIVE_SECONDS = 5
# After the last request: what is under way goes on for so long, then it is ended with an error.
GRACE_SECONDS = 5.0
# The engine is in the middle of a step, which cannot be interrupted.
STEP_SECONDS = 10.0


@dataclass(frozen=True)
class ServerOptions:
    """What the server allows.

    Attributes:
        max_requests: so many at once; the next one is refused with 429.
        max_body: bytes of a request's body.
        limits: of one request's tokens.
        header_seconds: time for a client to send the headers.
        body_seconds: time for it to send the body.
        stall_seconds: a client that reads nothing for so long is disconnected.
        api_key: what clients must send, or None.
        hosts: what clients may call the server.
    """

    max_requests: int = 64
    max_body: int = 4_000_000
    limits: RequestLimits = field(default_factory=RequestLimits)
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    stall_seconds: float = 30.0
    api_key: str | None = None
    hosts: AcceptedHosts = field(default_factory=AcceptedHosts)


class HttpServer(uvicorn.Server):
    """One engine behind one socket; it must run in one event loop, once.

    When it is told to end, by a signal or `should_exit`, requests under way go on for `GRACE_SECONDS` and are
    then ended with an error.

    Args:
        engine: computed with in a thread of its own from now on.
        model: the id of the model.
        options: what the server allows.
        on_ready: called when clients can connect.

    Attributes:
        worker: the thread and its requests.
    """

    def __init__(
        self,
        engine: EmbeddedEngine,
        model: str,
        options: ServerOptions,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        self.worker = AnswerWorker(options.max_requests)
        self._on_ready = on_ready
        metrics = Metrics(model)
        keyed = options.api_key is not None
        app = build_app(engine, self.worker, model, options.limits, metrics, keyed)
        guarded = Guard(
            app,
            options.max_body,
            options.body_seconds,
            options.api_key,
            options.hosts,
            self.worker.refusal,
        )
        observed = Observed(
            guarded, metrics, frozenset(route.path for route in app.routes if isinstance(route, Route))
        )
        times = {"header_seconds": options.header_seconds, "stall_seconds": options.stall_seconds}
        super().__init__(
            uvicorn.Config(
                observed,
                http=type("LimitedConnection", (Connection,), times),
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=round(GRACE_SECONDS + STEP_SECONDS),
            )
        )

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until the end, and end the worker."""
        try:
            super().run(sockets)
        finally:
            self.worker.stop(STEP_SECONDS)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        if self._on_ready is not None:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen no longer, and let requests come to their end."""
        timer = asyncio.get_running_loop().call_later(GRACE_SECONDS, self.worker.stop, 0)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def serve_engine(
    engine: EmbeddedEngine,
    model: str,
    listener: socket.socket,
    options: ServerOptions,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGTERM, after which this returns, or Ctrl-C, after which it raises KeyboardInterrupt.

    A second Ctrl-C does not wait for requests under way. See `HttpServer` for the other arguments.

    Args:
        listener: a bound socket; closed at the end.

    Raises:
        EngineError: another program has begun to listen on the port.
    """
    with closing(listener), _terminated_quietly():
        host, port = listener.getsockname()[:2]
        try:
            listener.listen()
        except OSError as error:
            raise cannot_listen(host, port, error) from error
        HttpServer(engine, model, options, on_ready).run([listener])


@contextmanager
def _terminated_quietly() -> Iterator[None]:
    """Let SIGTERM do no more than uvicorn's own handler: that one repeats the signal when all is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
