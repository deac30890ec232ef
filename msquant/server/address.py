"""Where a server listens."""

import errno
import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from msquant.errors import EngineError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_EVERYWHERE = ("0.0.0.0", "::")
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:/@]+))(?::[0-9]{0,5})?")
_NAME = re.compile(r"[A-Za-z0-9._-]+|[0-9a-fA-F:]*::[0-9a-fA-F:.]*")


@dataclass(frozen=True)
class AcceptedHosts:
    """The values of the header Host that a server answers to, with any port.

    A page in a browser can let its own name lead to this machine (DNS rebinding); it then calls the server
    by that name, and the browser takes the answers for the page's own. An address cannot be made to lead
    elsewhere, and neither can a name that the page does not own.

    Attributes:
        names: names and addresses, in lower case.
        any_address: every address is accepted, because the server listens on all of this machine's.
    """

    names: frozenset[str] = frozenset(LOOPBACK)
    any_address: bool = False

    def accepts(self, header: bytes) -> bool:
        """Whether a request with this header is meant for the server."""
        found = _HOST.fullmatch(header.decode("latin-1").lower())
        if found is None:
            return False
        name = found[1] or found[2].removesuffix(".")
        try:
            address = str(ipaddress.ip_address(name))
        except ValueError:
            return name in self.names
        return self.any_address or address in self.names

    def shown(self) -> str:
        """What a client may use instead."""
        return ", ".join(sorted(self.names) + ["any IP address of it"] * self.any_address)


def accepted_hosts(host: str, bound: str, allowed: Sequence[str] = ()) -> AcceptedHosts:
    """What a server that listens on an address answers to.

    Args:
        host: as the person gave it.
        bound: the address that it stands for.
        allowed: further names, by which a proxy or another machine calls it.

    Raises:
        EngineError: one of those is no name.
    """
    names = {host.lower(), bound}
    for name in allowed:
        if _NAME.fullmatch(name) is None:
            raise EngineError(
                f"{name!r} is not a name that clients could call the server by",
                where="--allow-host",
                remedy="give a name or an address without scheme and port, as gpu-box.example",
            )
        names.add(name.lower())
    everywhere = bound in _EVERYWHERE
    if everywhere:
        # This machine's own name: no page of a stranger has it.
        names = {*(names - set(_EVERYWHERE)), socket.gethostname().lower()}
    if everywhere or ipaddress.ip_address(bound.partition("%")[0]).is_loopback:
        names |= set(LOOPBACK)
    return AcceptedHosts(frozenset(names), any_address=everywhere)


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
