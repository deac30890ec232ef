"""Where a server listens."""

import errno
import socket

from msquant.errors import EngineError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def base_url(host: str, port: int) -> str:
    """The URL of a server, without a path."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def reachable(host: str) -> str:
    """An address at which this machine itself reaches a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def bind(host: str, port: int) -> socket.socket:
    """Take the port before the model is loaded; clients are refused until `serve` listens.

    Args:
        host: a name or an address of this machine.
        port: 0 takes any free one.

    Raises:
        EngineError: the host is none of this machine, or the port is in use or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise EngineError(
            f"the host {host!r} is unknown ({error})", where="--host", remedy="use 127.0.0.1"
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise cannot_listen(host, port, error) from error
    return listener


def cannot_listen(host: str, port: int, error: OSError) -> EngineError:
    """The error that says why a port cannot be had, and what to do."""
    if error.errno == errno.EADDRINUSE:
        return EngineError(
            f"port {port} of {host} is in use",
            where="--port",
            remedy=f"use another one, as --port {port + 1 if port < 65535 else port - 1}, or 0 for any that "
            "is free, or end the program that has it",
        )
    return EngineError(
        f"cannot listen on port {port} of {host} ({error.strerror or error})",
        where="--host" if error.errno == errno.EADDRNOTAVAIL else "--port",
        remedy="use --host 127.0.0.1 and a port above 1023",
    )
