"""Connections that wait for no client for ever."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from msquant.server.api_errors import ApiError


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 connection, with time limits where it has none, and JSON for what is not HTTP.

    uvicorn itself ends only connections that are idle between two requests.

    Attributes:
        header_seconds: time for a client to send the headers of a request.
        stall_seconds: a client that reads nothing for so long is disconnected.
        read_bytes: so much is read of a connection at a time.
    """

    header_seconds = 10.0
    stall_seconds = 30.0
    read_bytes = 32_768
    _header_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected; its first request must come soon."""
        super().connection_made(transport)
        # What asyncio asks the system for at a time, 256 kB of its own accord. A turn of the loop reads from
        # every connection before any of it is looked at, and each read is in memory three times then: as it
        # comes, in h11, in uvicorn.
        transport.max_size = self.read_bytes  # type: ignore[attr-defined]
        self._watch_headers()

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        super().data_received(data)
        self._watch_headers()

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.stall_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        _cancel(self._stall_timer)

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        super().connection_lost(exc)
        _cancel(self._header_timer)
        _cancel(self._stall_timer)

    def on_response_complete(self) -> None:
        """A response was written, if not yet sent."""
        super().on_response_complete()
        if self.transport.is_closing():
            self._abort_later()

    def timeout_keep_alive_handler(self) -> None:
        """No further request has come."""
        super().timeout_keep_alive_handler()
        self._abort_later()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, unless an answer has begun already."""
        error = ApiError(400, "this is not an HTTP/1.1 request", code="invalid_http")
        headers = [*error.raw_headers(), (b"connection", b"close")]
        events: list[Any] = [
            h11.Response(status_code=error.status, headers=headers, reason=b"Bad Request"),
            h11.Data(data=error.body()),
            h11.EndOfMessage(),
        ]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()
        self._abort_later()

    def _watch_headers(self) -> None:
        """Run the timer while a request's headers are awaited, and only then."""
        waiting = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if not waiting:
            _cancel(self._header_timer)
            self._header_timer = None
        elif self._header_timer is None and self.timeout_keep_alive_task is None:
            self._header_timer = self.loop.call_later(self.header_seconds, self.transport.abort)

    def _abort_later(self) -> None:
        """A closed transport waits for its client to read what is left; not for ever."""
        self.loop.call_later(self.stall_seconds, self.transport.abort)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
