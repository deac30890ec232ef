"""Who sees a token when the environment names a proxy, or an address without TLS."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from msquant.errors import HubError
from msquant.hub.choose import make_hub
from msquant.hub.folder_upload import upload
from msquant.hub.huggingface import HuggingFaceHub
from msquant.hub.modelers import ModelersHub
from msquant.hub.reach import ask_hub
from tests.fixtures.hub_faults import Fault
from tests.fixtures.hub_server import Hub, serve
from tests.hub.conftest import QUICK, REPOSITORY

TOKEN = Hub().token


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The proxy of the environment for everything; for plain HTTP it answers as a hub itself."""
    with serve(hub := Hub()) as address:
        for variable in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(variable, raising=False)
        for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(variable, address)
            monkeypatch.setenv(variable.lower(), address)
        hub.repository(REPOSITORY).push({"config.json": b"{}"})
        yield hub


@pytest.fixture
def server() -> Iterator[tuple[Hub, str]]:
    """A hub on this machine, without TLS, and its address."""
    with serve(hub := Hub()) as address:
        hub.repository(REPOSITORY).push({"config.json": b"{}"})
        hub.repository(REPOSITORY).private = True
        yield hub, address


@pytest.mark.parametrize("kind", [HuggingFaceHub, ModelersHub])
@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_hub_on_this_machine_is_asked_without_the_proxy(
    kind: type[HuggingFaceHub] | type[ModelersHub], name: str, proxy: Hub, server: tuple[Hub, str]
) -> None:
    address = server[1].replace("127.0.0.1", name)
    assert kind(address, TOKEN, QUICK).snapshot(REPOSITORY, "main").files
    assert proxy.requests == []


def test_a_redirect_to_this_machine_is_followed_without_the_proxy(
    proxy: Hub, server: tuple[Hub, str]
) -> None:
    """The hub is asked through the proxy, without a token; where it redirects to is not."""
    hub = HuggingFaceHub("http://mirror.example", None, QUICK)
    snapshot = hub.snapshot(REPOSITORY, "main")
    proxy.faults.always("config.json", Fault(redirect=f"{server[1]}/{REPOSITORY}/resolve/main/config.json"))
    with pytest.raises(HubError), hub.client.open(hub.file_url(snapshot, "config.json")):
        pass
    assert {host for _, host, _, _ in proxy.requests} == {"mirror.example"}
    assert len(server[0].requests) == 1


@pytest.mark.parametrize("address", ["http://mirror.example", "http://10.0.0.1:8080", "http://modelers.cn"])
@pytest.mark.parametrize("name", ["huggingface", "modelers"])
def test_a_token_without_tls_is_refused(
    name: str, address: str, proxy: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setenv("OPENMIND_HUB_ENDPOINT", address)
    for variable in ("HF_TOKEN", "MODELERS_TOKEN"):
        monkeypatch.setenv(variable, TOKEN)
    with pytest.raises(HubError, match=f"{address} is not encrypted") as caught:
        make_hub(name)
    assert "https://" in str(caught.value.remedy)
    assert TOKEN not in str(caught.value)
    assert proxy.requests == []
    for variable in ("HF_TOKEN", "MODELERS_TOKEN"):
        monkeypatch.delenv(variable)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    assert make_hub(name).snapshot(REPOSITORY, "main").files, "without the token the proxy may see all"
    assert {headers.get("Authorization") for *_, headers in proxy.requests} == {None}


def test_the_question_whether_a_hub_answers(
    proxy: Hub, server: tuple[Hub, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("default login me password word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("OPENMIND_HUB_ENDPOINT", server[1])
    monkeypatch.delenv("MODELERS_TOKEN", raising=False)
    assert ask_hub("modelers", 5).reached
    assert proxy.requests == []
    assert "Authorization" not in server[0].requests[0][3]


def test_an_upload_by_the_hub_s_own_client(
    proxy: Hub, server: tuple[Hub, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server[1])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    (tmp_path / "a.safetensors").write_bytes(b"x" * 100_000)
    files: dict[str, Path | bytes] = {"a.safetensors": tmp_path / "a.safetensors", "b.json": b"{}"}
    hub = HuggingFaceHub(server[1], TOKEN, QUICK)
    assert upload(hub, REPOSITORY, files, digests={}).sent == sorted(files)
    assert proxy.requests == []
    from huggingface_hub import constants

    assert constants.HF_HUB_DISABLE_XET, "its client would use the proxy"
