"""Requests to a hub: which host gets the token, what is worth trying again, and how to stop at once."""

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urljoin, urlsplit

import requests
from requests.auth import AuthBase
from urllib3.exceptions import HTTPError as TransportError

from msquant.errors import HubError
from msquant.hub.addresses import is_endpoint, is_private, origin, shown
from msquant.hub.retry import (
    WORTH_RETRYING,
    Limits,
    Stopped,
    Transient,
    UnreachableError,
    WrongFile,
    reason_of,
    retry_after,
)

MAX_JSON_BYTES = 64 << 20
"""The listing of a repository with 100,000 files is about 25 MB; more than this is no listing."""

_MAX_REDIRECTS = 5
_REDIRECTS = {301, 302, 303, 307, 308}


Explain = Callable[[int, Mapping[str, str], Any], HubError]
"""From status, headers and the body as JSON (or None) to the error a person gets."""


class _NoAuth(AuthBase):
    """Keeps requests from sending what ~/.netrc says in place of the token."""

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        return request


class HttpClient:
    """Requests to one hub and to wherever it redirects; to be used by many threads at once.

    Proxies and certificates are those of the environment (`HTTPS_PROXY`, `NO_PROXY`, `REQUESTS_CA_BUNDLE`).

    Args:
        title: the hub's name for people.
        endpoint: its address; the token goes nowhere else, and only through TLS or to this machine.
        variable: the environment variable that names another address.
        token: the person's token, or None.
        explain: turns a refusal of the hub into an error.
        limits: patience.

    Attributes:
        stop: set it, or call `abort`, to end everything.

    Raises:
        HubError: the endpoint is no http(s) address.
    """

    def __init__(
        self,
        title: str,
        endpoint: str,
        variable: str,
        token: str | None,
        explain: Explain,
        limits: Limits | None = None,
    ) -> None:
        if not is_endpoint(endpoint):
            raise HubError(
                f"the address of {title} is not one of the form https://host",
                where=variable,
                remedy="correct or unset it",
            )
        self.title = title
        self.variable = variable
        self.endpoint = endpoint.rstrip("/")
        self.limits = limits or Limits()
        self.stop = threading.Event()
        self.token = token
        self._origin = origin(self.endpoint)
        self._private = is_private(endpoint)
        self.explain = explain
        self._local = threading.local()
        self._open: set[requests.Response] = set()
        self._lock = threading.Lock()

    @contextmanager
    def open(self, url: str, headers: Mapping[str, str] | None = None) -> Iterator[requests.Response]:
        """Begin a GET; the body is to be read by `read_piece`.

        Args:
            url: at the endpoint; redirects are followed, without the token to other hosts.
            headers: further ones.

        Raises:
            HubError: the hub refuses, or redirects where we do not follow.
            Transient: it may work later.
            Stopped: `stop` is set.
        """
        response = self._follow(url, dict(headers or {}))
        with self._lock:
            self._open.add(response)
        try:
            if self.stop.is_set():
                raise Stopped
            yield response
        finally:
            with self._lock:
                self._open.discard(response)
            response.close()

    def read_piece(self, response: requests.Response, size: int) -> bytes:
        """At most `size` bytes of the body as they were sent; empty at its end. Raises Transient, Stopped."""
        try:
            piece: bytes = response.raw.read(size, decode_content=False)
        except (requests.RequestException, TransportError, OSError) as error:
            if self.stop.is_set():
                raise Stopped from error
            raise Transient(reason_of(error)) from error
        if self.stop.is_set():
            raise Stopped
        return piece

    def json(self, url: str, params: Mapping[str, str] | None = None) -> tuple[Any, str | None]:
        """GET a JSON document, trying again where that may help.

        Args:
            url: at the endpoint.
            params: the query.

        Returns:
            The document, and the address of its next page at the endpoint, or None.

        Raises:
            HubError: the hub refuses, cannot be reached, or sends no JSON.
            Stopped: `stop` is set.
        """
        if params:
            url = str(requests.Request("GET", url, params=params).prepare().url)
        failures = 0
        while True:
            try:
                return self._json(url)
            except Transient as error:
                failures += 1
                if failures >= (self.limits.attempts if error.reached else self.limits.first_attempts):
                    raise self.unreachable(error) from error
                self.pause(error, failures)

    def pause(self, error: Transient, failures: int) -> None:
        """Wait before the next attempt. Raises Stopped if `stop` is set, HubError if it would be too long."""
        if error.wait is not None and error.wait > self.limits.max_retry_after_seconds:
            raise HubError(
                f"{self.title} asks to wait {error.wait:.0f} s before the next request",
                where=self.endpoint,
                remedy="run the same command again then; what is downloaded is kept",
            )
        wait = self.limits.backoff(failures) if error.wait is None else error.wait
        if self.stop.wait(wait):
            raise Stopped

    def unreachable(self, error: Transient) -> "UnreachableError":
        """The error that a person gets when all attempts were in vain."""
        if error.reached:
            remedy = "run the same command again later; what is downloaded is kept"
        else:
            remedy = f"check the network and the proxy (HTTPS_PROXY), or name a mirror in {self.variable}"
        return UnreachableError(
            f"{self.title} {'does not answer' if error.reached else 'cannot be reached'}: {error}",
            where=self.endpoint,
            remedy=remedy,
        )

    def abort(self) -> None:
        """Stop every request that waits for data, from any thread."""
        self.stop.set()
        with self._lock:
            for response in self._open:
                # One that is done just now cannot be shut down, and needs not.
                with suppress(OSError, ValueError, RuntimeError, TransportError):
                    response.raw.shutdown()

    def _json(self, url: str) -> tuple[Any, str | None]:
        with self.open(url, {"Accept": "application/json"}) as response:
            body = bytearray()
            while piece := self.read_piece(response, 1 << 20):
                body += piece
                if len(body) > MAX_JSON_BYTES:
                    raise HubError("the listing is larger than any real one", where=shown(url))
            expected = response.headers.get("Content-Length")
            if expected is not None and expected.isdecimal() and len(body) < int(expected):
                raise Transient("the connection was closed within the answer")
            following = response.links.get("next", {}).get("url")
        try:
            document = json.loads(bytes(body))
        except (ValueError, RecursionError):
            raise HubError(
                f"{self.title} sent something else than JSON",
                where=shown(url),
                remedy="check the address, and whether a proxy asks to log in",
            ) from None
        if following is not None:
            following = urljoin(url, following)
            if origin(following) != self._origin:
                raise HubError("the next page of the listing is on another host", where=shown(following))
        return document, following

    def _follow(self, url: str, headers: dict[str, str]) -> requests.Response:
        first = url
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._request(url, headers)
            if response.status_code not in _REDIRECTS:
                self._check(response, url)
                return response
            location = response.headers.get("Location", "")
            response.close()
            url, before = urljoin(url, location), url
            parts = urlsplit(url)
            downgrade = urlsplit(before).scheme == "https" and parts.scheme != "https"
            if not location or parts.scheme not in ("http", "https") or not parts.hostname or downgrade:
                raise HubError(
                    "redirects to an address that is not safe to follow", where=shown(before)
                ) from None
        raise HubError("redirects in a circle", where=shown(first))

    def _request(self, url: str, headers: dict[str, str]) -> requests.Response:
        if self.stop.is_set():
            raise Stopped
        # Identity: a compressed answer has neither the listed size nor ranges of the file.
        sent = {"Accept-Encoding": "identity", "User-Agent": "msquant", **headers}
        if self.token is not None and self._private and origin(url) == self._origin:
            sent["Authorization"] = f"Bearer {self.token}"
        try:
            return self._session().get(
                url,
                headers=sent,
                stream=True,
                allow_redirects=False,
                timeout=(self.limits.connect_seconds, self.limits.read_seconds),
            )
        except requests.exceptions.SSLError as error:
            raise HubError(
                f"the certificate of {urlsplit(url).hostname} is not trusted",
                where=shown(url),
                remedy="if a proxy of your own signs it, name its certificate in REQUESTS_CA_BUNDLE",
            ) from error
        except (
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
        ) as error:
            raise Transient(reason_of(error), reached=False) from error
        except (requests.RequestException, TransportError, UnicodeError) as error:
            raise HubError(
                f"not a request that can be made ({type(error).__name__})", where=shown(url)
            ) from error

    def _check(self, response: requests.Response, url: str) -> None:
        status = response.status_code
        if status < 400:
            return
        if status in WORTH_RETRYING:
            wait = retry_after(response.headers.get("Retry-After"))
            response.close()
            raise Transient(f"status {status} from {urlsplit(url).hostname}", wait)
        if status == 416:
            response.close()
            raise WrongFile("it is shorter than listed")
        try:
            body = json.loads(response.raw.read(1 << 16, decode_content=False))
        except (ValueError, RecursionError, requests.RequestException, TransportError, OSError):
            body = None
        headers = response.headers
        response.close()
        if origin(url) != self._origin:
            raise HubError(
                f"{self.title} redirects to a host that refuses (status {status})",
                where=shown(url),
                remedy="try again later; if it stays so, the file is broken or the host is blocked",
            )
        raise self.explain(status, headers, body)

    def _session(self) -> requests.Session:
        session: requests.Session | None = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            session.auth = _NoAuth()
        return session
