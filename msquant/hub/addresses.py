"""What an address says: who gets the token, and what may be shown."""

from urllib.parse import urlsplit

_LOOPBACK = {"localhost", "127.0.0.1", "::1"}


def is_endpoint(url: str) -> bool:
    """Whether an address is that of a hub, and holds neither a name with a password nor a query."""
    parts = urlsplit(url)
    plain = not (parts.username or parts.password or parts.query)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and plain


def is_private(url: str) -> bool:
    """Whether nobody on the way can read what is sent: through TLS, or to this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or parts.hostname in _LOOPBACK


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: where these differ, it is another host."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def shown(url: str) -> str:
    """An address without its query, which may hold a signature."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
