"""Ports that cannot be had, found out before a model is loaded."""

import os
import socket

import pytest

from msquant.errors import EngineError
from msquant.server.address import accepted_hosts, base_url, bind, reachable


def test_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(EngineError, match=f"port {port} of 127.0.0.1 is in use") as caught:
            bind("127.0.0.1", port)
    assert caught.value.where == "--port"
    assert f"--port {port + 1}" in str(caught.value.remedy)
    bind("127.0.0.1", port).close()


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7", "a" * 100])
def test_host_of_another_machine(host: str) -> None:
    with pytest.raises(EngineError, match=host) as caught:
        bind(host, 0)
    assert caught.value.where == "--host"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use every port")
def test_port_of_the_system() -> None:
    with pytest.raises(EngineError, match="cannot listen on port 1 "):
        bind("127.0.0.1", 1)


def test_urls() -> None:
    assert base_url("127.0.0.1", 80) == "http://127.0.0.1:80"
    assert base_url("::1", 80) == "http://[::1]:80"
    assert [reachable(host) for host in ("0.0.0.0", "::", "10.0.0.1")] == ["127.0.0.1", "::1", "10.0.0.1"]


@pytest.mark.parametrize(
    ("host", "bound", "allowed", "yes", "no"),
    [
        (
            "127.0.0.1",
            "127.0.0.1",
            ["gpu-box.example"],
            ["127.0.0.1", "127.0.0.1:8000", "LocalHost:9", "localhost.", "[::1]:80", "GPU-box.example:1"],
            ["", "evil.example", "127.0.0.1.evil.example", "x@localhost", "10.0.0.1", "0.0.0.0", "[::1"],
        ),
        ("10.0.0.5", "10.0.0.5", [], ["10.0.0.5:8000"], ["localhost", "10.0.0.6", "evil.example"]),
        ("my-box", "10.0.0.5", [], ["my-box:8000", "10.0.0.5"], ["localhost", "my-box.evil.example"]),
        ("my-box", "127.0.1.1", [], ["my-box", "localhost:8000"], ["10.0.0.5"]),
        (
            "0.0.0.0",
            "0.0.0.0",
            [],
            ["10.1.2.3:8000", "localhost", "[fe80::1]:8000", socket.gethostname()],
            ["evil.example", "1.2.3.4.evil.example", "1.2.3", "0x7f.1"],
        ),
        ("::", "::", [], ["127.0.0.1", "[2001:db8::1]:1"], ["evil.example:80"]),
    ],
)  # fmt: skip
def test_names_that_a_server_answers_to(
    host: str, bound: str, allowed: list[str], yes: list[str], no: list[str]
) -> None:
    hosts = accepted_hosts(host, bound, allowed)
    assert [name for name in yes if not hosts.accepts(name.encode())] == []
    assert [name for name in no if hosts.accepts(name.encode())] == []


@pytest.mark.parametrize("name", ["", "*", "http://x", "x:80", "a/b", "a b", "bücher.example"])
def test_names_that_are_none(name: str) -> None:
    with pytest.raises(EngineError, match="is not a name") as caught:
        accepted_hosts("127.0.0.1", "127.0.0.1", [name])
    assert caught.value.where == "--allow-host"
