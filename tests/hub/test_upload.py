"""An upload by the hubs' own clients: at once, resumed, and looked at afterwards."""

import os
import ssl
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from msquant.errors import CheckpointError, HubError
from msquant.hub.folder_upload import UploadResult, upload
from msquant.hub.listing import Hub as Client
from tests.fixtures.hub_content import Blob
from tests.fixtures.hub_faults import Fault
from tests.fixtures.hub_server import Hub, serve
from tests.hub.conftest import REPOSITORY, connect

FILES: dict[str, bytes] = {
    "config.json": b"{}",
    "README.md": b"---\nlicense: mit\n---\n",
    "a.safetensors": os.urandom(250_000),
    "b.safetensors": os.urandom(99_000),
    "sub/c.json": b"[]",
}

Send = Callable[..., UploadResult]


@pytest.fixture
def address(
    protocol: str,
    server: Hub,
    authority: tuple[ssl.SSLContext, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    """For openmind_hub, which takes no other host, a proxy that claims to be https://modelers.cn."""
    server.tls = authority[0]
    with serve(server) as local:
        for variable in ("NO_PROXY", "no_proxy", "http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(variable, raising=False)
        if protocol == "huggingface":
            monkeypatch.delenv("HTTPS_PROXY", raising=False)
            monkeypatch.delenv("https_proxy", raising=False)
            # What create_repo is answered is parsed with this one, whatever the endpoint is.
            monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", local)
            yield local
            return
        monkeypatch.setenv("HTTPS_PROXY", local)
        monkeypatch.setenv("https_proxy", local)
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority[1]))
        yield "https://modelers.cn"


@pytest.fixture
def send(protocol: str, address: str, server: Hub, tmp_path: Path) -> Send:
    """Uploads FILES with a new client."""
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)

    def run(token: str | None = server.token, **options: object) -> UploadResult:
        client: Client = connect(protocol, address, token)
        files: dict[str, Path | bytes] = {name: tmp_path / name for name in FILES}
        files["README.md"] = FILES["README.md"]
        options = {"digests": {}, "create": True} | options
        return upload(client, REPOSITORY, files, **options)  # type: ignore[arg-type]

    return run


def held(server: Hub) -> dict[str, bytes | Path]:
    repository = server.repository(REPOSITORY)
    files = repository.commits[repository.branches["main"]]
    return {name: blob.content for name, blob in files.items() if name != ".gitattributes"}


def puts(server: Hub) -> int:
    return sum(method == "PUT" for method, *_ in server.requests)


@pytest.mark.parametrize("private", [False, True])
def test_all_files_are_there_in_one_commit(private: bool, send: Send, server: Hub) -> None:
    result = send(private=private)
    assert held(server) == FILES
    repository = server.repository(REPOSITORY)
    assert repository.private == private
    assert len(repository.commits) == 2
    assert result.commit == repository.branches["main"]
    assert result.sent == sorted(FILES)
    assert result.nbytes == sum(map(len, FILES.values()))


def test_a_second_call_sends_nothing(send: Send, server: Hub) -> None:
    send()
    sent = puts(server)
    assert send().sent == []
    assert puts(server) == sent
    assert len(server.repository(REPOSITORY).commits) == 2


def test_what_changed_is_sent(send: Send, server: Hub, tmp_path: Path) -> None:
    send()
    (tmp_path / "b.safetensors").write_bytes(b"new" * 1000)
    assert send().sent == ["b.safetensors"]
    assert held(server)["b.safetensors"] == b"new" * 1000


def test_an_interrupted_upload_continues(send: Send, server: Hub, protocol: str) -> None:
    """The first call ends before its commit; Modelers keeps parts, the Hugging Face Hub whole files."""
    server.faults.always("POST upload" if protocol == "modelers" else "POST commit/main", Fault(status=403))
    with pytest.raises(HubError):
        send()
    assert held(server) == {}
    sent = puts(server)
    oid = Blob(FILES["a.safetensors"], lfs=True).sha256
    server.uploaded.pop(oid)
    server.parts.get(oid, {}).pop(2, None)
    server.faults.clear()
    send()
    assert held(server) == FILES
    assert puts(server) == sent + 1


def test_what_passes_is_tried_again(send: Send, server: Hub) -> None:
    server.faults.once("POST batch", Fault(status=502), Fault(status=429, headers={"Retry-After": "0"}))
    send()
    assert held(server) == FILES


def test_a_file_whose_content_was_lost_is_noticed(send: Send, server: Hub, protocol: str) -> None:
    """openmind_hub takes a 404 of a part for a success, and commits a pointer to nothing."""
    if protocol == "huggingface":
        pytest.skip("its client notices")
    server.faults.always("PUT", Fault(status=404))
    with pytest.raises(HubError, match=r"not there|no such repository"):
        send()


def test_a_file_that_is_shorter_than_sent_is_noticed(send: Send, server: Hub) -> None:
    server.faults.always("a.safetensors", Fault(cut=len(FILES["a.safetensors"])))
    with pytest.raises(HubError, match=r"a\.safetensors is not there as it was sent"):
        send()


def test_a_file_that_is_not_what_was_written_is_not_committed(send: Send, server: Hub) -> None:
    with pytest.raises(CheckpointError, match=r"another than in msquant\.json") as caught:
        send(digests={"a.safetensors": "0" * 64})
    assert "a.safetensors" in str(caught.value.where)
    assert held(server) == {}


def test_a_repository_is_made_only_when_asked_for(send: Send, server: Hub) -> None:
    with pytest.raises(HubError, match="no such repository") as caught:
        send(create=False)
    assert "--create" in str(caught.value.remedy)
    assert server.repositories == {}


@pytest.mark.parametrize("token", [None, "wrong-token-of-mine"])
def test_without_the_right_token_nothing_is_sent(token: str | None, send: Send, server: Hub) -> None:
    with pytest.raises(HubError) as caught:
        send(token=token)
    assert "token" in str(caught.value).lower()
    assert "wrong-token-of-mine" not in str(caught.value)
    assert server.repositories == {}
    assert puts(server) == 0
