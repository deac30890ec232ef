"""What the server allows, what it does when a client goes away or is slow, and when its engine fails."""

import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from msquant.inference.embedded import EmbeddedEngine
from msquant.server.address import accepted_hosts
from msquant.server.steps import RequestLimits
from tests.server.running import MODEL, RunningServer, open_files, running, wait_for

LONG: dict[str, Any] = {
    "model": MODEL,
    "prompt": ["I am"] * 100,
    "max_tokens": 200,
    "extra_body": {"ignore_eos": True},
}
SHORT: dict[str, Any] = {"model": MODEL, "prompt": "I am", "max_tokens": 2}


class Scripted:
    """Takes the place of an `Answer`: what a model with other texts than the tiny one's would do."""

    def __init__(self, *steps: Any) -> None:
        self._steps = steps
        self.token_ids: list[int] = []
        self.finish_reason = None

    def __iter__(self) -> Iterator[str]:
        for step in self._steps:
            if isinstance(step, BaseException):
                raise step
            self.token_ids.append(0)
            yield step


def raw(server: RunningServer, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    connection.sendall(data)
    return connection


def read_all(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(65536), b""))


def test_one_more_than_the_limit_is_refused(engine: EmbeddedEngine) -> None:
    with running(engine, max_requests=2) as server:
        client = server.client()
        streams = [client.completions.create(stream=True, **LONG) for _ in range(2)]
        for stream in streams:
            next(stream)
        for stream in (True, False):
            with pytest.raises(openai.RateLimitError, match="works on 2 requests already") as caught:
                client.completions.create(stream=stream, **SHORT)  # type: ignore[call-overload]
            assert caught.value.response.headers["retry-after"] == "1"
            assert caught.value.type == "rate_limit_error"
        assert len(list(client.models.list())) == 1, "what needs no engine goes on"
        streams[0].close()
        wait_for(lambda: server.server.worker.active == 1)
        short = client.completions.create(extra_body={"ignore_eos": True}, **SHORT)
        assert short.choices[0].finish_reason == "length"
        streams[1].close()
        client.close()
        server.wait_until_idle()


def test_the_work_ends_when_the_client_goes_away(server: RunningServer, engine: EmbeddedEngine) -> None:
    files = open_files()
    for stream in (True, False):
        body = httpx.Request("POST", server.url, json={**LONG, "extra_body": None, "stream": stream}).read()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        body = body.replace(b'"extra_body":null,', b"")
        connection = raw(server, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        wait_for(lambda: server.server.worker.active == 1)
        connection.close()
        server.wait_until_idle()
    assert open_files() == files


def test_limits_of_tokens(engine: EmbeddedEngine) -> None:
    with running(engine, limits=RequestLimits(prompt_tokens=8, max_tokens=4)) as server:
        client = server.client()
        with pytest.raises(openai.BadRequestError, match="max_tokens is 5, the server's limit is 4"):
            client.completions.create(model=MODEL, prompt="I am", max_tokens=5)
        with pytest.raises(openai.BadRequestError, match=r"a prompt has \d+ tokens, .* limit is 8") as caught:
            client.completions.create(model=MODEL, prompt="I am " * 9, max_tokens=4)
        assert caught.value.code == "context_length_exceeded"
        answer = client.completions.create(
            model=MODEL, prompt="I am", max_tokens=4, extra_body={"ignore_eos": True}
        )
        assert answer.usage
        assert answer.usage.completion_tokens == 4
        # Sixteen are the default of clients, not what this one asked for.
        assert client.completions.create(model=MODEL, prompt="I am").usage.completion_tokens <= 4  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("path", "name", "prompt"),
    [
        ("completions", "max_tokens", {"prompt": "I am"}),
        ("chat/completions", "max_completion_tokens", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_more_tokens_than_the_model_has_room_for(
    server: RunningServer, path: str, name: str, prompt: dict[str, Any]
) -> None:
    room = 256
    response = server.post(f"/v1/{path}", json=prompt | {name: 10**9})
    assert response.status_code == 400
    assert f"max_tokens is 1000000000, the server's limit is {room}" in response.json()["error"]["message"]
    assert server.post(f"/v1/{path}", json=prompt | {name: room}).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": ["I am", "x" * 70_000]}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x" * 7000}] * 10}),
    ],
)
def test_a_long_prompt_is_refused_before_it_is_tokenized(
    server: RunningServer,
    engine: EmbeddedEngine,
    path: str,
    body: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts: list[str] = []
    encode = engine.tokenizer.encode
    monkeypatch.setattr(
        engine.tokenizer, "encode", lambda text, **options: (texts.append(text), encode(text, **options))[1]
    )
    response = server.post(f"/v1/{path}", json=body)
    assert response.status_code == 400
    error = response.json()["error"]
    assert "a prompt has 70000 bytes, the server's limit is 65536 bytes for 256 tokens" in error["message"]
    assert error["code"] == "context_length_exceeded"
    assert texts == body.get("prompt", [])[:1]


def unfinished(size: int) -> bytes:
    """A request of which the last byte is missing."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return head + b"Content-Length: %d\r\n\r\n" % size + b" " * (size - 1)


def test_unfinished_bodies_are_bounded_in_sum(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of thirty bodies of 200 kB, which end nowhere, sixteen are kept; small ones pass all the while."""
    monkeypatch.setattr("msquant.server.guard.FREE_BYTES", 1000)
    size = 200_000
    with running(engine, max_body=size, body_seconds=30) as server:
        pool = server.server.config.app.app.pool  # type: ignore[union-attr]
        connections = [raw(server, unfinished(size)) for _ in range(30)]
        wait_for(lambda: pool.held > pool.limit - size)
        assert server.post("/v1/completions", json=SHORT).status_code == 200
        answers = []
        for connection in connections:
            connection.sendall(b"}")
            answers.append(connection.recv(20).split()[1])
            assert pool.held <= pool.limit == 16 * size
        assert set(answers) == {b"400", b"429"}
        assert answers.count(b"400") == 16
        for connection in connections:
            connection.close()
        server.wait_until_idle()
        assert pool.held == 0


def test_nothing_of_a_body_is_kept_when_all_places_are_taken(engine: EmbeddedEngine) -> None:
    with running(engine, max_requests=1, body_seconds=30) as server:
        client = server.client()
        stream = client.completions.create(stream=True, **LONG)
        next(stream)
        connection = raw(server, unfinished(1_000_000))
        assert server.post("/v1/completions", json=SHORT).status_code == 429
        assert server.server.config.app.app.pool.held == 0  # type: ignore[union-attr]
        connection.sendall(b"}")
        assert connection.recv(100).startswith(b"HTTP/1.1 429 ")
        connection.close()
        stream.close()
        client.close()


def test_body_too_large(engine: EmbeddedEngine) -> None:
    with running(engine, max_body=1000) as server:
        client = server.client()
        for size in (1001, 15_000):
            with pytest.raises(openai.APIStatusError, match="limit of 1000 bytes") as caught:
                client.completions.create(model=MODEL, prompt="x" * size)
            assert caught.value.status_code == 413
        huge = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n"
        start = time.monotonic()
        assert b" 413 " in read_all(raw(server, huge))
        assert time.monotonic() - start < 10
        chunk = b"1000\r\n" + b"x" * 4096 + b"\r\n"
        endless = (
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            + chunk * 5
        )
        assert b" 413 " in read_all(raw(server, endless))
        client.close()
        server.wait_until_idle()


def test_key(engine: EmbeddedEngine) -> None:
    with running(engine, api_key="s3cret") as server:
        for key in ("none", "s3cre", "s3cret2", "s\u00e9cret"):
            headers = {"Authorization": f"Bearer {key}".encode()}
            response = httpx.get(f"{server.url}/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
            assert "s3cret" not in response.text
        with pytest.raises(openai.AuthenticationError):
            server.client().completions.create(**SHORT)
        assert server.client(api_key="s3cret").completions.create(**SHORT).usage
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_names_that_are_not_the_server_s(engine: EmbeddedEngine) -> None:
    """What a page in a browser sends that lets its own name lead to this machine."""
    with running(engine, hosts=accepted_hosts("127.0.0.1", "127.0.0.1", ["gpu-box"])) as server:
        for name, status in (("evil.example", 403), (f"evil.example:{server.port}", 403), ("gpu-box:1", 200)):
            response = server.post("/v1/completions", json=SHORT, headers={"Host": name})
            assert response.status_code == status
            assert (response.json().get("error") or {"code": ""})["code"] in ("", "host_not_allowed")
        response = server.post("/v1/completions", json=SHORT, headers={"Host": "evil.example"})
        message = response.json()["error"]["message"]
        assert "does not answer to the name 'evil.example'" in message
        assert "--allow-host" in message


def test_slow_senders(engine: EmbeddedEngine) -> None:
    with running(engine, header_seconds=0.3, body_seconds=0.3) as server:
        for begun in (b"", b"GET /health HTTP/1.1\r\nHost:"):
            assert read_all(raw(server, begun)) == b""
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n"
        answer = read_all(raw(server, head + b'{"a'))
        assert b" 408 " in answer
        assert b'"type": "invalid_request_error"' in answer
        # After a first answer the time for headers counts again.
        connection = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200" in connection.recv(1000)
        connection.sendall(b"GET /health")
        assert read_all(connection).count(b"HTTP/1.1") <= 1
        server.wait_until_idle()


def test_a_client_that_does_not_read(engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "answer", lambda *_: Scripted(*["x" * 1_000_000] * 60))
    with running(engine, stall_seconds=0.5) as server:
        body = b'{"prompt": "I am", "stream": true}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection = raw(server, head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: server.server.worker.active == 1)
        server.wait_until_idle()
        connection.close()
        # A client that reads gets all of it.
        pieces = server.client().completions.create(model=MODEL, prompt="I am", stream=True)
        assert sum(len(chunk.choices[0].text) for chunk in pieces) == 60_000_000


def test_the_engine_fails_in_the_middle(
    server: RunningServer, engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = server.client()
    with monkeypatch.context() as patch:
        patch.setattr(
            engine, "answer", lambda *_: Scripted("so far", RuntimeError("Traceback: /secret/path"))
        )
        with pytest.raises(openai.InternalServerError, match="the server failed: RuntimeError") as caught:
            client.completions.create(**SHORT)
        assert "secret" not in caught.value.response.text
        stream = client.completions.create(stream=True, **SHORT)
        assert next(stream).choices[0].text == "so far"
        with pytest.raises(openai.APIError, match="the server failed: RuntimeError"):
            list(stream)
    assert client.completions.create(**SHORT).usage, "other requests go on"


def test_the_engine_dies(engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    # What ends a thread is no Exception; a thread's own report of it would be an error of the test.
    monkeypatch.setattr("threading.excepthook", lambda _: None)
    with running(engine) as server:
        client = server.client()
        with monkeypatch.context() as patch:
            patch.setattr(engine, "answer", lambda *_: Scripted(SystemExit()))
            with pytest.raises(openai.InternalServerError, match="its engine has died") as caught:
                client.completions.create(**SHORT)
            assert caught.value.status_code == 503
        with pytest.raises(openai.InternalServerError, match="its engine has died"):
            client.completions.create(**SHORT)
        assert httpx.get(f"{server.url}/health").status_code == 503


def test_requests_under_way_end_with_the_server(
    engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("msquant.server.http_server.GRACE_SECONDS", 0.5)
    with running(engine) as server:
        stream = server.client().completions.create(stream=True, **LONG)
        next(stream)
        start = time.monotonic()
        server.server.should_exit = True
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
        assert time.monotonic() - start < 8
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)


@pytest.mark.slow
def test_a_hundred_and_fifty_unfinished_bodies_take_little_memory(engine: EmbeddedEngine) -> None:
    import psutil

    process = psutil.Process()
    with running(engine, body_seconds=60) as server:
        before = process.memory_info().rss
        data = unfinished(3_900_000)
        connections = []
        for _ in range(150):
            connections.append(raw(server, data))
        pool = server.server.config.app.app.pool  # type: ignore[union-attr]
        wait_for(lambda: pool.held > pool.limit - len(data))
        grown = 0
        # All the rest of what was sent is read, and dropped, within this time.
        until = time.monotonic() + 2
        while time.monotonic() < until:
            grown = max(grown, process.memory_info().rss - before)
            time.sleep(0.01)
        assert grown < 150_000_000, grown
        assert server.post("/v1/completions", json=SHORT).status_code == 200
        for connection in connections:
            connection.close()
