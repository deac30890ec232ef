"""Ports that cannot be had, found out before a model is loaded."""

import os
import socket

import pytest

from msquant.errors import EngineError
from msquant.server.address import base_url, bind, reachable


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
