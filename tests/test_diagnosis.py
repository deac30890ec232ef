"""`msquant doctor`: each look on a machine, or a part of one, that has what it looks for."""

import platform
import socket
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from msquant.flows.diagnosis import (
    disk_check,
    hub_check,
    memory_check,
    mindspore_check,
    python_check,
    required_packages,
)
from tests.inference.packages import write_package

NAMES = {"huggingface": "HF_ENDPOINT", "modelers": "OPENMIND_HUB_ENDPOINT"}


class Answers(BaseHTTPRequestHandler):
    """A hub's front page, with the status that the server was given."""

    def do_GET(self) -> None:
        self.send_response(self.server.status)  # type: ignore[attr-defined]
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        server.status = 200  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


@pytest.fixture
def hub(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub's name, with no proxy in between."""
    for variable in ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.lower(), raising=False)
    return str(request.param)


def at(monkeypatch: pytest.MonkeyPatch, name: str, endpoint: str) -> None:
    """Put a hub at an address; huggingface_hub has read its variable when it was imported."""
    monkeypatch.setenv(NAMES[name], endpoint)
    if name == "huggingface":
        from huggingface_hub import constants

        monkeypatch.setattr(constants, "ENDPOINT", endpoint)


def test_this_python_and_its_packages_are_fine() -> None:
    assert python_check().status == "ok"
    [check] = required_packages()
    assert check.status == "ok"


def test_an_old_package_and_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_package(tmp_path, "numpy", "2.1.0")
    write_package(tmp_path, "mindspore", "2.6.0")
    monkeypatch.syspath_prepend(tmp_path)
    checks = {check.subject: check for check in required_packages()}
    assert set(checks) == {"numpy", "mindspore"}
    assert checks["numpy"].detail.startswith("2.1.0; numpy<2,>=1.26 is needed")
    pins = {"3.11": "2.7.1.post1", "3.12": "2.10.0"}
    python = ".".join(platform.python_version_tuple()[:2])
    assert checks["mindspore"].remedy == f"pip install 'mindspore=={pins[python]}'"
    assert {check.status for check in checks.values()} == {"error"}


def test_little_memory_is_a_warning() -> None:
    assert memory_check(0).status == "ok"
    assert memory_check(10**18).status == "warning"


def test_disk(tmp_path: Path) -> None:
    assert disk_check("cache", tmp_path / "not" / "there" / "yet", 0).status == "ok"
    assert not (tmp_path / "not").exists()
    full = disk_check("cache", tmp_path, 10**18)
    assert (full.status, "MSQUANT_CACHE" in str(full.remedy)) == ("warning", True)


def test_a_disk_that_cannot_be_written_to() -> None:
    # /proc takes no file from anybody, root included.
    check = disk_check("this folder", Path("/proc/self/cache"))
    assert check.status == "error"
    assert "cannot be written to" in check.detail
    assert check.remedy == "go to another folder"


def test_mindspore_that_does_not_start(tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    broken.chmod(0o755)
    (tmp_path / "mindspore.py").write_text("raise ImportError('libmindspore_core.so: no such file')")
    check = mindspore_check(str(broken))
    assert check.status == "error"
    assert "libmindspore_core.so: no such file" in check.detail
    assert "pip install" in str(check.remedy)
    assert mindspore_check(str(tmp_path / "none")).status == "error"


@pytest.mark.parametrize("hub", NAMES, indirect=True)
def test_a_hub_that_answers(hub: str, server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, hub, f"http://127.0.0.1:{server.server_port}")
    assert hub_check(hub).status == "ok"
    server.status = 503  # type: ignore[attr-defined]
    check = hub_check(hub)
    assert (check.status, "answers with 503" in check.detail) == ("warning", True)


@pytest.mark.parametrize("hub", NAMES, indirect=True)
def test_a_hub_that_cannot_be_reached(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    at(monkeypatch, hub, f"http://127.0.0.1:{port}")
    check = hub_check(hub)
    assert (check.status, "connection refused" in check.detail) == ("warning", True)
    assert NAMES[hub] in str(check.remedy)


@pytest.mark.parametrize("hub", NAMES, indirect=True)
def test_a_hub_that_keeps_silent(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        at(monkeypatch, hub, f"http://127.0.0.1:{silent.getsockname()[1]}")
        check = hub_check(hub, seconds=0.3)
    assert (check.status, "no answer in time" in check.detail) == ("warning", True)


@pytest.mark.parametrize("hub", NAMES, indirect=True)
def test_offline_is_a_note(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    check = hub_check(hub)
    assert (check.status, "HF_HUB_OFFLINE is set" in check.detail) == ("note", True)


@pytest.mark.parametrize("hub", ["modelers"], indirect=True)
def test_an_address_that_is_none(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at(monkeypatch, hub, "ftp://user:password@modelers.cn")
    check = hub_check(hub)
    assert check.status == "warning"
    assert "password" not in check.detail
