"""What an address says: who gets the token, which way a request takes, and what may be shown."""

import ipaddress
from urllib.parse import SplitResult, urljoin, urlsplit

_SCHEMES = {"http": 80, "https": 443}


def parse(url: str) -> SplitResult | None:
    """The parts of an http(s) address with a host; None for anything else, whatever a stranger wrote."""
    try:
        parts = urlsplit(url)
        # A port beyond 65535 shows itself only when it is asked for.
        valid = parts.scheme in _SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return None
    return parts if valid and url.isprintable() and " " not in url else None


def join(base: str, reference: str) -> str | None:
    """The http(s) address that a reference on a page means; None if it means none."""
    try:
        url = urljoin(base, reference)
    except ValueError:
        return None
    return None if parse(url) is None else url


def is_endpoint(url: str) -> bool:
    """Whether an address is that of a hub, and holds neither a name with a password nor a query."""
    parts = parse(url)
    return parts is not None and not (parts.username or parts.password or parts.query)


def is_loopback(url: str) -> bool:
    """Whether an address is of this machine: no proxy could reach it, and none is to see what it gets."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_private(url: str) -> bool:
    """Whether nobody on the way can read what is sent: through TLS, or to this machine."""
    return urlsplit(url).scheme == "https" or is_loopback(url)


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: where these differ, it is another host."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or _SCHEMES.get(parts.scheme)


def shown(url: str) -> str:
    """An address without its query, which may hold a signature."""
    parts = parse(url)
    if parts is None:
        return "an address that is none"
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
