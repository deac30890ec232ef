"""Requests that hypothesis makes up: each is answered, or refused with a 4xx in OpenAI's shape."""

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import strategies as st

from msquant.inference.embedded import EmbeddedEngine
from tests.fixtures.cases import PLAIN, SLOW, made_up
from tests.server.running import RunningServer, running

ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=20),
        st.sampled_from([10**400, "\ud800", "", 10**9, -(2**63)]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
FIELDS = {
    "max_tokens": st.one_of(st.integers(-1, 4), st.just(10**9), ANYTHING),
    "max_completion_tokens": st.one_of(st.integers(-1, 4), ANYTHING),
    "temperature": st.one_of(st.floats(0, 2), ANYTHING),
    "top_p": st.one_of(st.floats(0, 1), ANYTHING),
    "seed": st.one_of(st.integers(0, 2**63), ANYTHING),
    "stop": st.one_of(st.lists(st.text(max_size=300), max_size=20), ANYTHING),
    "stream": st.one_of(st.booleans(), ANYTHING),
    "stream_options": st.one_of(st.fixed_dictionaries({"include_usage": st.booleans()}), ANYTHING),
    "echo": st.one_of(st.booleans(), ANYTHING),
    "n": st.one_of(st.just(1), ANYTHING),
    "logit_bias": ANYTHING,
    "model": st.one_of(st.just("tiny"), ANYTHING),
    "nonsense": ANYTHING,
}
PROMPTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.text(max_size=20), max_size=4),
    st.lists(st.integers(-1, 300), max_size=10),
    st.lists(st.lists(st.integers(-1, 2**70), max_size=4), max_size=3),
    ANYTHING,
)
MESSAGES = st.one_of(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.one_of(st.sampled_from(["system", "user", "assistant", "tool"]), ANYTHING)},
            optional={"content": st.one_of(st.text(max_size=20), ANYTHING), "name": ANYTHING},
        ),
        max_size=4,
    ),
    ANYTHING,
)
COMPLETIONS = st.fixed_dictionaries({}, optional=FIELDS | {"prompt": PROMPTS})
CHATS = st.fixed_dictionaries({}, optional=FIELDS | {"messages": MESSAGES})
BODIES = st.one_of(
    st.one_of(COMPLETIONS, CHATS, ANYTHING).map(lambda value: json.dumps(value).encode()),
    COMPLETIONS.map(lambda value: json.dumps({"max_tokens": 2, "prompt": "I am"} | value).encode()),
    st.binary(max_size=50),
)
LINES = st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=30)
REQUESTS = st.fixed_dictionaries(
    {
        "method": st.one_of(st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "HEAD"]), LINES),
        "path": st.one_of(
            st.sampled_from(["/v1/completions", "/v1/chat/completions", "/v1/models/x", "/health"]), LINES
        ),
        "host": st.one_of(st.just("localhost"), st.just("127.0.0.1:1"), LINES),
        "type": st.one_of(st.just("application/json"), LINES),
        "header": st.one_of(
            st.just("X: y"), LINES, st.sampled_from(["Transfer-Encoding: chunked", "Expect: x"])
        ),
        "body": BODIES,
    }
)


@pytest.fixture(scope="module")
def fuzzed(engine: EmbeddedEngine) -> Iterator[RunningServer]:
    with running(engine, max_body=20_000, body_seconds=0.5, header_seconds=0.5) as server:
        yield server


def check_request(server: RunningServer, request: dict[str, Any]) -> None:
    head = (
        f"{request['method']} {request['path']} HTTP/1.1\r\nHost: {request['host']}\r\nConnection: close\r\n"
        f"Content-Type: {request['type']}\r\nContent-Length: {len(request['body'])}\r\n{request['header']}"
    )
    received = b""
    with (
        socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection,
        suppress(BrokenPipeError, ConnectionResetError),
    ):
        connection.sendall(head.encode("latin-1") + b"\r\n\r\n" + request["body"])
        while part := connection.recv(65536):
            received += part
    assert b"Traceback" not in received
    if not received:
        # Only what is no request, or not a whole one, is left without an answer.
        return
    status = int(received.split(b" ", 2)[1])
    assert status == 200 or 400 <= status < 500, received[:500]
    body = received.partition(b"\r\n\r\n")[2]
    if status != 200 and request["method"] != "HEAD":
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


@made_up(PLAIN, REQUESTS)
def test_any_request(fuzzed: RunningServer, case: dict[str, Any]) -> None:
    check_request(fuzzed, case)


@pytest.mark.slow
@made_up(SLOW, REQUESTS)
def test_any_request_of_many(fuzzed: RunningServer, case: dict[str, Any]) -> None:
    check_request(fuzzed, case)
