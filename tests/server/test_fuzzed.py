"""Requests that hypothesis makes up: each is answered, or refused with a 4xx in OpenAI's shape."""

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import strategies as st

from msquant.inference.embedded import EmbeddedEngine
from tests.fixtures.fuzzing import VALUES, fuzz, within_limits
from tests.server.running import RunningServer, running

FIELDS = {
    "max_tokens": st.one_of(st.integers(-1, 4), st.just(10**9), VALUES),
    "max_completion_tokens": st.one_of(st.integers(-1, 4), VALUES),
    "temperature": st.one_of(st.floats(0, 2), VALUES),
    "top_p": st.one_of(st.floats(0, 1), VALUES),
    "seed": st.one_of(st.integers(0, 2**63), VALUES),
    "stop": st.one_of(st.lists(st.text(max_size=300), max_size=20), VALUES),
    "stream": st.one_of(st.booleans(), VALUES),
    "stream_options": st.one_of(st.fixed_dictionaries({"include_usage": st.booleans()}), VALUES),
    "echo": st.one_of(st.booleans(), VALUES),
    "logprobs": st.one_of(st.integers(-1, 6), st.booleans(), VALUES),
    "top_logprobs": st.one_of(st.integers(-1, 21), VALUES),
    "n": st.one_of(st.just(1), VALUES),
    "logit_bias": VALUES,
    "model": st.one_of(st.just("tiny"), VALUES),
    "nonsense": VALUES,
}
PROMPTS = st.one_of(
    st.text(max_size=40),
    st.lists(st.text(max_size=20), max_size=4),
    st.lists(st.integers(-1, 300), max_size=10),
    st.lists(st.lists(st.integers(-1, 2**70), max_size=4), max_size=3),
    VALUES,
)
MESSAGES = st.one_of(
    st.lists(
        st.fixed_dictionaries(
            {"role": st.one_of(st.sampled_from(["system", "user", "assistant", "tool"]), VALUES)},
            optional={"content": st.one_of(st.text(max_size=20), VALUES), "name": VALUES},
        ),
        max_size=4,
    ),
    VALUES,
)
COMPLETIONS = st.fixed_dictionaries({}, optional=FIELDS | {"prompt": PROMPTS})
CHATS = st.fixed_dictionaries({}, optional=FIELDS | {"messages": MESSAGES})
BODIES = st.one_of(
    st.one_of(COMPLETIONS, CHATS, VALUES).map(lambda value: json.dumps(value).encode()),
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


@fuzz(REQUESTS)
def test_any_request(fuzzed: RunningServer, request_made: dict[str, Any]) -> None:
    with within_limits():
        received = exchange(fuzzed.port, request_made)
    assert b"Traceback" not in received
    if not received:
        # Only what is no request, or not a whole one, is left without an answer.
        return
    status = int(received.split(b" ", 2)[1])
    assert status == 200 or 400 <= status < 500, received[:500]
    body = received.partition(b"\r\n\r\n")[2]
    if status != 200 and request_made["method"] != "HEAD":
        assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


def exchange(port: int, request: dict[str, Any]) -> bytes:
    """Send a request; returns all that comes until the connection ends."""
    head = (
        f"{request['method']} {request['path']} HTTP/1.1\r\nHost: {request['host']}\r\nConnection: close\r\n"
        f"Content-Type: {request['type']}\r\nContent-Length: {len(request['body'])}\r\n{request['header']}"
    )
    received = b""
    with (
        socket.create_connection(("127.0.0.1", port), timeout=30) as connection,
        suppress(BrokenPipeError, ConnectionResetError),
    ):
        connection.sendall(head.encode("latin-1") + b"\r\n\r\n" + request["body"])
        while part := connection.recv(65536):
            received += part
    return received
