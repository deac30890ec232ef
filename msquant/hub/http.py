"""Requests to a hub: which host gets the token, what is worth trying again, and how to stop at once."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError as TransportError

from msquant.errors import HubError
from msquant.hub.addresses import is_endpoint, is_private, join, origin, shown
from msquant.hub.bounds import parse_listing, require_size
from msquant.hub.retry import (
    RATE_VARIABLE,
    WORTH_RETRYING,
    Limits,
    Stopped,
    Transient,
    UnreachableError,
    WrongFile,
    reason_of,
    retry_after,
)
from msquant.hub.session import HubSession

# So long a piece is waited for to become whole; then what has come of it is used.
_PIECE_SECONDS = 0.5


class Pace:
    """The rate of one answer, over windows of time; time in which nobody reads does not count.

    Args:
        limits: the least rate and the window.
        clock: seconds.
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._bytes, self._seconds = 0, 0.0
        self._error: Exception | None = None

    def read(self, raw: Any, size: int) -> bytes:
        """At most `size` bytes as they were sent; empty at the end.

        Args:
            raw: urllib3's response.
            size: at least 1.

        Raises:
            Transient: over the last window less came than the least rate.
            Exception: what urllib3 raises. In both cases all that came was returned before.
        """
        if self._error is not None:
            raise self._error
        if self._seconds >= self._limits.rate_seconds:
            if self._bytes < self._limits.least_rate * self._seconds:
                raise Transient(
                    f"{self._bytes / self._seconds:.0f} bytes a second came over {self._seconds:.0f} s, "
                    f"the least is {self._limits.least_rate:g}",
                    slow=True,
                )
            self._bytes, self._seconds = 0, 0.0
        pieces: list[bytes] = []
        begun = before = self._clock()
        while size and before - begun < _PIECE_SECONDS:
            try:
                piece: bytes = raw.read1(size, decode_content=False)
            except Exception as error:
                if not pieces:
                    raise
                self._error = error
                break
            now = self._clock()
            self._bytes, self._seconds = self._bytes + len(piece), self._seconds + now - before
            if not piece:
                break
            pieces.append(piece)
            size, before = size - len(piece), now
        return b"".join(pieces)


_MAX_REDIRECTS = 5
_MAX_REFUSAL = 1 << 16
_BROKEN = (requests.RequestException, TransportError, HTTPException, ValueError, OSError)
_REDIRECTS = {301, 302, 303, 307, 308}


_T = TypeVar("_T")

Explain = Callable[[int, Mapping[str, str], Any], HubError]
"""From status, headers and the body as JSON (or None) to the error a person gets."""


class HttpClient:
    """Requests to one hub and to wherever it redirects; to be used by many threads at once.

    Proxies and certificates are those of the environment (`HTTPS_PROXY`, `NO_PROXY`, `REQUESTS_CA_BUNDLE`);
    this machine is never asked through a proxy.

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
        HubError: the endpoint is no http(s) address, or one where everybody on the way could read the token.
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
        if token is not None and not is_private(endpoint):
            raise HubError(
                f"{shown(endpoint)} is not encrypted: a proxy, or anybody on the way, could read the token",
                where=variable,
                remedy="use an https:// address there, or unset the token (for the Hugging Face Hub also by "
                "HF_HUB_DISABLE_IMPLICIT_TOKEN=1) to download without it",
            )
        self.title = title
        self.variable = variable
        self.endpoint = endpoint.rstrip("/")
        self.limits = limits or Limits()
        self.stop = threading.Event()
        self.token = token
        self._origin = origin(self.endpoint)
        self.explain = explain
        self._local = threading.local()
        self._open: dict[requests.Response, Pace] = {}
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
            self._open[response] = Pace(self.limits)
        try:
            if self.stop.is_set():
                raise Stopped
            yield response
        finally:
            with self._lock:
                del self._open[response]
            response.close()

    def read_piece(self, response: requests.Response, size: int) -> bytes:
        """At most `size` bytes of the body as they were sent; empty at its end. Raises Transient, Stopped."""
        try:
            piece = self._open[response].read(response.raw, size)
        except _BROKEN as error:
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
        return self.patiently(lambda: self._json(url))

    def patiently(self, work: Callable[[], _T]) -> _T:
        """What `work` returns, trying again where that may help.

        Raises:
            HubError: it stays in vain, or `work` raises it.
            Stopped: `stop` is set.
        """
        failures = 0
        while True:
            try:
                return work()
            except Transient as error:
                failures += 1
                limits = self.limits
                allowed = limits.attempts if error.reached else limits.first_attempts
                if failures >= (limits.slow_attempts if error.slow else allowed):
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
        problem = "does not answer" if error.reached else "cannot be reached"
        remedy = "run the same command again later; what is downloaded is kept"
        if error.slow:
            problem = "is too slow"
            remedy += f"; {RATE_VARIABLE}=100 takes less, and 0 anything"
        elif not error.reached:
            remedy = f"check the network and the proxy (HTTPS_PROXY), or name a mirror in {self.variable}"
        return UnreachableError(f"{self.title} {problem}: {error}", where=self.endpoint, remedy=remedy)

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
                require_size(len(body), shown(url))
            expected = response.headers.get("Content-Length", "")
            if len(body) < (int(expected) if re.fullmatch(r"[0-9]{1,18}", expected) else 0):
                raise Transient("the connection was closed within the answer")
            following = response.links.get("next", {}).get("url")
        return parse_listing(body, self.title, shown(url)), following and self._page(url, following)

    def _page(self, url: str, following: str) -> str:
        page = join(url, following)
        if page is None or origin(page) != self._origin:
            raise HubError("the next page of the listing is on another host", where=shown(page or url))
        return page

    def _follow(self, url: str, headers: dict[str, str]) -> requests.Response:
        first = url
        for _ in range(_MAX_REDIRECTS + 1):
            response = self._request(url, headers)
            if response.status_code not in _REDIRECTS:
                self._check(response, url, "Range" in headers)
                return response
            location = response.headers.get("Location", "")
            response.close()
            target = join(url, location)
            downgrade = urlsplit(url).scheme == "https" and urlsplit(target or "").scheme != "https"
            if not location or target is None or downgrade:
                raise HubError("redirects to an address that is not safe to follow", where=shown(url))
            url = target
        raise HubError("redirects in a circle", where=shown(first))

    def _request(self, url: str, headers: dict[str, str]) -> requests.Response:
        if self.stop.is_set():
            raise Stopped
        # Identity: a compressed answer has neither the listed size nor ranges of the file.
        sent = {"Accept-Encoding": "identity", "User-Agent": "msquant", **headers}
        if self.token is not None and origin(url) == self._origin:
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
        except _BROKEN as error:
            raise HubError(
                f"not a request that can be made ({type(error).__name__})", where=shown(url)
            ) from error

    def _check(self, response: requests.Response, url: str, ranged: bool) -> None:
        status = response.status_code
        if status < 400:
            return
        if status in WORTH_RETRYING:
            wait = retry_after(response.headers.get("Retry-After"))
            response.close()
            raise Transient(f"status {status} from {urlsplit(url).hostname}", wait)
        if status == 416 and ranged:
            response.close()
            raise WrongFile("it is shorter than listed")
        pace, refusal = Pace(self.limits), bytearray()
        try:
            while len(refusal) < _MAX_REFUSAL and (piece := pace.read(response.raw, _MAX_REFUSAL)):
                refusal += piece
            body = json.loads(refusal)
        except (Transient, RecursionError, *_BROKEN):
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
            session = self._local.session = HubSession()
        return session
