"""Answers that no hub gives: whatever they say, the error is ours, and it comes soon."""

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import strategies as st

from msquant.errors import HubError, MsquantError
from msquant.hub.choose import make_hub
from msquant.hub.names import check_names
from msquant.hub.retry import Limits, Stopped, Transient, WrongFile, retry_after
from msquant.hub.transfer import _check_length
from tests.fixtures.cases import PLAIN, SLOW, made_up
from tests.fixtures.raw_server import RawServer
from tests.hub.conftest import REPOSITORY, connect

ONCE = Limits(
    connect_seconds=2,
    read_seconds=2,
    first_attempts=1,
    attempts=1,
    backoff_seconds=0,
    max_backoff_seconds=0,
    max_retry_after_seconds=0,
)


@pytest.fixture(scope="module")
def raw() -> Iterator[RawServer]:
    server = RawServer()
    yield server
    server.close()


def answer(status: int, headers: list[tuple[str, str]], body: bytes = b"") -> bytes:
    lines = [f"HTTP/1.1 {status} OK", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1", "replace") + body


@pytest.mark.parametrize(
    "location",
    [
        "http://[::1",
        "http://127.0.0.1:99999/x",
        "http://127.0.0.1:0/x",
        "http://127.0.0.1:-1/x",
        "http://[v1.x]/",
        "//[",
        "http://",
        "http:///x",
        "http://a b/",
        "http://\u0085/",
        "http://\xad/",
        "http://xn--\xff/",
        "http://user:password@[::1/",
        "http://" + "a" * 70 + ".example/",
        "javascript:alert(1)",
        "http://127.0.0.1:\u0663/",
        "",
    ],
)
def test_redirects_to_no_address(location: str, protocol: str, raw: RawServer) -> None:
    raw.answer = answer(302, [("Location", location), ("Content-Length", "0")])
    with pytest.raises(HubError) as caught:
        connect(protocol, raw.address, "secret-token", ONCE).snapshot(REPOSITORY, "main")
    assert "password" not in str(caught.value)


NINES = "9" * 5000


@pytest.mark.parametrize(
    "headers",
    [
        [("Content-Length", NINES)],
        [("Content-Length", "\xb2")],
        [("Content-Length", "-1")],
        [("Content-Length", "5"), ("Content-Length", "6")],
        [("Transfer-Encoding", "chunked")],
        [("Link", '<http://[::1>; rel="next"')],
        [("Link", "<http://127.0.0.1:99999>; rel=next")],
        [("Link", ";;;=,,<>;rel=next")],
        [("X", "y" * 70_000)],
        [(f"X{number}", "y") for number in range(300)],
        [("Retry-After", NINES)],
        [("Content-Range", f"bytes {NINES}-{NINES}/{NINES}")],
    ],
    ids=lambda headers: f"{headers[0][0]}: {headers[0][1][:20]}",
)
@pytest.mark.parametrize("status", [200, 206, 302, 404, 429])
def test_headers_that_say_nothing(
    status: int, headers: list[tuple[str, str]], protocol: str, raw: RawServer
) -> None:
    raw.answer = answer(status, headers, b'{"sha": "x"}')
    with pytest.raises(HubError):
        connect(protocol, raw.address, None, ONCE).snapshot(REPOSITORY, "main")
    read_file(protocol, raw)


def read_file(protocol: str, raw: RawServer) -> None:
    """Ask for a range of a file as a transfer does; its own reasons to try again are allowed."""
    client = connect(protocol, raw.address, None, ONCE).client
    with (
        suppress(HubError, Transient, WrongFile, Stopped),
        client.open(f"{raw.address}/x", {"Range": "bytes=0-9"}) as response,
    ):
        _check_length(response, 0, 10, 20)
        while client.read_piece(response, 10):
            pass


@pytest.mark.parametrize(
    "address", ["http://[::1", "http://127.0.0.1:99999", "https://hub:x", "http://\xa0/"]
)
def test_addresses_of_hubs_that_are_none(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENMIND_HUB_ENDPOINT", address)
    with pytest.raises(HubError, match="is not one of the form") as caught:
        make_hub("modelers")
    assert caught.value.where == "OPENMIND_HUB_ENDPOINT"


HEADERS = ["Content-Length", "Content-Range", "Content-Encoding", "Location", "Link", "Retry-After"]
HEADERS += ["Transfer-Encoding", "X-Error-Code", "X-Error-Message", "Set-Cookie", "Content-Type"]
VALUES = st.one_of(
    st.text(st.characters(min_codepoint=32, max_codepoint=255), max_size=60),
    st.sampled_from(["gzip", "chunked", "0", "10", NINES, "bytes 0-9/20", "bytes */20"]),
    st.sampled_from(["http://[::1", "/x", "/x?" * 900]),
    st.text('0123456789-:/[]@.,;=<>"% ', max_size=30),
)
STATUSES = st.sampled_from([100, 200, 204, 206, 301, 302, 304, 307, 400, 401, 403, 404, 416, 429, 500, 999])
PATHS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(["a", "../a", "/a", "a/", "a//b", "a" * 3000, "\ud800", "a\\b", ".git/x", "\x9b"]),
)
NUMBERS = st.one_of(st.integers(), st.sampled_from([0, 1, 2**42, 2**63, 10**17, 10**400, 1.5, True, None]))
DIGESTS = st.one_of(st.sampled_from(["a" * 40, "b" * 64, "g" * 40, "", None]), st.text(max_size=64))
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=10)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "type": st.one_of(st.sampled_from(["file", "dir", "directory", "submodule"]), ANYTHING),
        "path": st.one_of(PATHS, ANYTHING),
        "size": st.one_of(NUMBERS, ANYTHING),
        "oid": st.one_of(DIGESTS, ANYTHING),
        "etag": st.one_of(DIGESTS, ANYTHING),
        "lfs": st.one_of(st.fixed_dictionaries({"oid": DIGESTS, "size": NUMBERS}), ANYTHING),
    },
)
TREES = st.one_of(st.lists(ENTRIES, max_size=5), ANYTHING)
COMMITS = st.one_of(st.just("c" * 40), ANYTHING)
LAST_COMMITS = st.fixed_dictionaries({"commit": st.fixed_dictionaries({"commit_sha": COMMITS})})
FOLDERS = st.fixed_dictionaries({"last_commit": LAST_COMMITS, "tree": TREES})
LISTINGS = st.one_of(TREES, st.fixed_dictionaries({"sha": COMMITS}), st.fixed_dictionaries({"data": FOLDERS}))


def check_answer(raw: RawServer, status: int, headers: dict[str, str], body: bytes) -> None:
    raw.answer = answer(status, list(headers.items()), body)
    for protocol in ("huggingface", "modelers"):
        with suppress(MsquantError):
            connect(protocol, raw.address, None, ONCE).snapshot(REPOSITORY, "main")
        read_file(protocol, raw)


def check_listing(protocol: str, documents: list[Any]) -> None:
    """The listing is refused, or every name and size of it is harmless."""
    hub = connect(protocol, "https://127.0.0.1:9", None, ONCE)
    given = iter(documents)

    def next_document(url: str, params: Any = None) -> tuple[Any, str | None]:
        body = json.dumps(next(given, {}), ensure_ascii=True)
        return json.loads(body), f"{url}&next" if len(documents) > 2 else None

    hub.client.json = next_document  # type: ignore[method-assign]
    with suppress(MsquantError):
        snapshot = hub.snapshot(REPOSITORY, "main")
        check_names(snapshot.files, REPOSITORY)
        for file in snapshot.files:
            assert ".." not in file.path.split("/")
            assert 0 <= file.size <= 2**42


ANSWERS = (
    STATUSES,
    st.dictionaries(st.sampled_from(HEADERS), VALUES, max_size=5),
    st.one_of(st.binary(max_size=60), LISTINGS.map(lambda value: json.dumps(value).encode())),
)


@made_up(PLAIN, *ANSWERS)
def test_any_answer(raw: RawServer, status: int, headers: dict[str, str], body: bytes) -> None:
    check_answer(raw, status, headers, body)


@pytest.mark.slow
@made_up(SLOW, *ANSWERS)
def test_any_answer_of_many(raw: RawServer, status: int, headers: dict[str, str], body: bytes) -> None:
    check_answer(raw, status, headers, body)


DOCUMENTS = (
    st.sampled_from(["huggingface", "modelers"]),
    st.lists(LISTINGS, min_size=1, max_size=5),
)


@made_up(PLAIN, *DOCUMENTS)
def test_any_listing(protocol: str, documents: list[Any]) -> None:
    check_listing(protocol, documents)


@pytest.mark.slow
@made_up(SLOW, *DOCUMENTS)
def test_any_listing_of_many(protocol: str, documents: list[Any]) -> None:
    check_listing(protocol, documents)


@made_up(200, st.one_of(VALUES, st.datetimes().map(str), st.none()))
def test_any_wait(value: str | None) -> None:
    wait = retry_after(value)
    assert wait is None or wait >= 0
