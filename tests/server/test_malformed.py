"""Requests that are wrong in every way leave the server as it was; the thousand are a slow test."""

import json
import random
import socket
import struct
from collections.abc import Callable

import pytest

from msquant.inference.embedded import EmbeddedEngine
from tests.server.running import RunningServer, open_files, running

HEAD = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    b"Content-Type: application/json\r\n"
)
CHAT = HEAD.replace(b"/v1/", b"/v1/chat/")
MAX_BODY = 20_000
RESET = struct.pack("ii", 1, 0)


def post(body: bytes, head: bytes = HEAD) -> bytes:
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def with_value(**values: object) -> bytes:
    return post(json.dumps({"prompt": "I am", "max_tokens": 1} | values).encode())


# What is sent, and the statuses that are right for it; none is right where the connection may just end.
MALFORMED: list[tuple[bytes, tuple[int, ...]]] = [
    (post(b"{"), (400,)),
    (post(b""), (400, 415)),
    (post(b"[1, 2]"), (400,)),
    (post(b"null"), (400,)),
    (post(b'"text"'), (400,)),
    (post(b'{"prompt": "\xff\xfe"}'), (400,)),
    (post(b"\x00\x01\x02"), (400,)),
    (post(b'{"prompt": "\\ud800"}'), (400,)),
    (post(b'{"\\ud800": 1, "prompt": "x"}'), (400,)),
    (post(b'{"prompt": "x", "model": "\\ud800"}'), (400, 404)),
    (post(b'{"prompt": "x", "stop": "\\ud800", "max_tokens": 1}'), (400,)),
    (post(b'{"messages": [{"role": "user", "content": "\\ud800"}]}', CHAT), (400,)),
    (post(b'{"messages": {"role": "user"}}', CHAT), (400,)),
    (post(b'{"messages": [{"role": ["user"], "content": "x"}]}', CHAT), (400,)),
    (post(b'{"prompt": "x", "temperature": NaN}'), (400,)),
    (post(b'{"prompt": "x", "top_p": -Infinity}'), (400,)),
    (post(b'{"prompt": "x", "max_tokens": 1e400}'), (400,)),
    (post(b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}"), (400,)),
    (post(b'{"prompt": "x", "seed": ' + b"9" * 100 + b"}"), (400,)),
    (post(b'{"prompt": [' + b"9" * 100 + b"]}"), (400,)),
    (post(b"[" * 15_000), (400,)),
    (post(b'{"a":' * 3000), (400,)),
    (post(b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}"), (400,)),
    (with_value(prompt=None), (400,)),
    (with_value(prompt=5), (400,)),
    (with_value(max_tokens=-1), (400,)),
    (with_value(max_tokens=[1]), (400,)),
    (with_value(stop={"a": 1}), (400,)),
    (with_value(stop=[1]), (400,)),
    (with_value(stop=7), (400,)),
    (with_value(stream="yes"), (400,)),
    (with_value(stream_options=[]), (400,)),
    (with_value(model=["tiny"]), (400,)),
    (with_value(n=[]), (400,)),
    (with_value(x="y" * 1000), (400,)),
    (post(b"x" * (MAX_BODY + 1)), (413,)),
    (HEAD + b"Content-Length: 999999999999\r\n\r\n", (413,)),
    (HEAD + b"Expect: 100-continue\r\nContent-Length: 30000\r\n\r\n", (413,)),
    (post(b"{}", HEAD.replace(b"application/json", b"text/plain")), (415,)),
    (post(b"a=1", HEAD.replace(b"application/json", b"application/x-www-form-urlencoded")), (415,)),
    (post(b"\x1f\x8b\x08", HEAD + b"Content-Encoding: gzip\r\n"), (400,)),
    (HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n", (400,)),
    (HEAD + b"Transfer-Encoding: gzip\r\n\r\n{}", (400, 501)),
    (HEAD + b"Content-Length: -5\r\n\r\n{}", (400,)),
    (HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{} ", (400,)),
    (HEAD + b"Content-Length: two\r\n\r\n{}", (400,)),
    (b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n", (400,)),
    (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", (400, 404)),
    (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 300_000, (400,)),
    (b"GET /%ff%00 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", (404,)),
    (b"GET /v1/models/../../etc/passwd HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", (404,)),
    (b"GET /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", (405,)),
    (b"BREW /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", (405,)),
    (b"GET / HTTP/1\r\n\r\n", (400,)),
    (b"GET /health HTTP/1.0\r\n\r\n", (403,)),
    (b"GET /health HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n", (403,)),
    (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", (400,)),
    (post(b"{}", HEAD.replace(b"localhost", b"localhost@evil.example")), (403,)),
    (post(b'{"prompt": "x", "max_tokens": 1000000000}'), (400,)),
    (post(b'{"messages": [' + b"0," * 5000 + b"0]}", CHAT), (400,)),
    (b"PRI * HTTP/2.0\r\nConnection: close\r\n\r\nSM\r\n\r\n", (403,)),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", (400,)),
    (b"\r\n\r\n\r\n\r\n\x00", (400,)),
    (random.Random(0).randbytes(3000) + b"\n\n", (400,)),
]


def send(server: RunningServer, data: bytes) -> bytes:
    """Send bytes and return what comes back until the connection ends."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        answer = b""
        try:
            connection.sendall(data)
            while part := connection.recv(65536):
                answer += part
        except (BrokenPipeError, ConnectionResetError):
            pass
        return answer


def check(answer: bytes, statuses: tuple[int, ...]) -> None:
    """The answer has one of the statuses and OpenAI's shape, and tells nothing of the inside."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1])
    assert status in statuses, answer[:500]
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    assert b"Traceback" not in answer
    assert b".py" not in answer
    assert len(answer) < 3000


def cut(server: RunningServer, data: bytes, reset: bool) -> None:
    """Send bytes and close at once, politely or with a reset."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    if reset:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    connection.sendall(data)
    connection.close()


def storm(server: RunningServer, count: int) -> None:
    """Send so many malformed requests and cut connections, by turns, and compare the server with before."""
    rng = random.Random(1)
    valid = [with_value(max_tokens=200, stream=stream, ignore_eos=True) for stream in (True, False)]
    kinds: list[Callable[[], None]] = [
        lambda: check(*answered(rng.choice(MALFORMED))),
        lambda: cut(server, (data := rng.choice(valid))[: rng.randrange(len(data))], rng.random() < 0.5),
        lambda: cut(server, rng.choice(valid), rng.random() < 0.5),
    ]

    def answered(case: tuple[bytes, tuple[int, ...]]) -> tuple[bytes, tuple[int, ...]]:
        return send(server, case[0]), case[1]

    answer = send(server, with_value())
    assert b" 200 " in answer
    server.wait_until_idle()
    tasks, files = server.tasks(), open_files()
    for i in range(count):
        kinds[i % len(kinds)]()
    server.wait_until_idle(60)
    assert send(server, with_value()).partition(b"\r\n\r\n")[0].startswith(b"HTTP/1.1 200")
    server.wait_until_idle()
    assert server.tasks() == tasks
    # Fewer are open when the collector closes what an earlier test has left.
    assert open_files() <= files


@pytest.fixture(scope="module")
def small(engine: EmbeddedEngine):  # type: ignore[no-untyped-def]
    with running(engine, max_body=MAX_BODY, body_seconds=2, header_seconds=2) as server:
        yield server


@pytest.mark.parametrize("case", MALFORMED, ids=lambda case: repr(case[0][-40:])[:40])
def test_each_gets_its_error(small: RunningServer, case: tuple[bytes, tuple[int, ...]]) -> None:
    check(send(small, case[0]), case[1])


def test_ninety_leave_nothing_behind(small: RunningServer) -> None:
    storm(small, 90)


@pytest.mark.slow
def test_a_thousand_leave_nothing_behind(small: RunningServer) -> None:
    storm(small, 1000)
