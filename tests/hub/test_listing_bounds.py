"""Listings without an end and with sizes that no disk has: refused before memory or time is spent on them."""

import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from msquant.errors import HubError, OutputError
from msquant.hub import bounds
from msquant.hub.folder_download import download
from msquant.hub.huggingface import HuggingFaceHub
from msquant.hub.listing import Hub as Client
from msquant.hub.listing import RemoteFile, Snapshot
from msquant.hub.modelers import ModelersHub
from tests.fixtures.hub_faults import Fault
from tests.fixtures.hub_server import Hub
from tests.hub.conftest import QUICK, REPOSITORY, connect

COMMIT, SHA1 = "c" * 40, "a" * 40


class Pages:
    """In place of a hub's answers: what it would say, as JSON, for ever."""

    def __init__(self, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
        self.client, self.asked = client, 0
        monkeypatch.setattr(client.client, "json", self.json)

    def json(self, url: str, params: dict[str, str] | None = None) -> tuple[Any, str | None]:
        raise NotImplementedError


class EndlessPages(Pages):
    """The Hugging Face Hub; `following` makes the address of the next page, `entries` what is on one."""

    entries: Sequence[dict[str, Any]] = ()

    def following(self) -> str:
        return f"{self.client.client.endpoint}/api?cursor={self.asked}"

    def json(self, url: str, params: dict[str, str] | None = None) -> tuple[Any, str | None]:
        if "/revision/" in url:
            return {"sha": COMMIT}, None
        self.asked += 1
        return list(self.entries), self.following()


class EndlessFolders(Pages):
    """Modelers: every folder holds `wide` others."""

    wide = 1

    def json(self, url: str, params: dict[str, str] | None = None) -> tuple[Any, str | None]:
        assert params is not None
        self.asked += 1
        prefix = f"{params['path']}/" if params["path"] else ""
        tree = [{"type": "dir", "path": f"{prefix}{number}"} for number in range(self.wide)]
        return {"data": {"last_commit": {"commit": {"commit_sha": COMMIT}}, "tree": tree}}, None


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> EndlessPages:
    return EndlessPages(HuggingFaceHub("https://127.0.0.1:9", None, QUICK), monkeypatch)


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> EndlessFolders:
    return EndlessFolders(ModelersHub("https://127.0.0.1:9", None, QUICK), monkeypatch)


def refused(pages: Pages, words: str) -> None:
    with pytest.raises(HubError, match=words) as caught:
        pages.client.snapshot(REPOSITORY, "main")
    assert caught.value.where == REPOSITORY
    assert caught.value.remedy


def test_pages_without_an_end(pages: EndlessPages) -> None:
    refused(pages, f"more than {bounds.MAX_ANSWERS} pages or folders")
    assert pages.asked == bounds.MAX_ANSWERS


def test_a_page_that_leads_back(pages: EndlessPages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "following", lambda: f"{pages.client.client.endpoint}/api?cursor=1")
    refused(pages, "lead back")
    assert pages.asked == 2


def test_entries_without_an_end(pages: EndlessPages, monkeypatch: pytest.MonkeyPatch) -> None:
    pages.entries = [{"type": "directory", "path": "x"}] * 1000
    refused(pages, f"more than {bounds.MAX_ENTRIES} entries")
    assert pages.asked == bounds.MAX_ENTRIES // 1000 + 1


def test_names_without_an_end(pages: EndlessPages) -> None:
    pages.entries = [{"type": "directory", "path": "x" * 1_000_000}]
    refused(pages, f"more than {bounds.MAX_NAME_CHARACTERS} characters")


def test_folders_in_folders_without_an_end(folders: EndlessFolders) -> None:
    refused(folders, f"more than {bounds.MAX_DEPTH} deep")
    assert folders.asked < 100


def test_folders_without_an_end(folders: EndlessFolders) -> None:
    folders.wide = 40
    refused(folders, f"more than {bounds.MAX_ANSWERS} pages or folders")
    assert folders.asked < 100


def test_a_deep_name(pages: EndlessPages) -> None:
    pages.entries = [{"type": "file", "path": "a/" * 40 + "b", "size": 1, "oid": SHA1}]
    refused(pages, f"more than {bounds.MAX_DEPTH} deep")


def test_a_file_larger_than_any(pages: EndlessPages) -> None:
    pages.entries = [{"type": "file", "path": "model.safetensors", "size": 10**17, "oid": SHA1}]
    with pytest.raises(HubError, match=r"'model.safetensors' with 100\.0 PB, .* has 4\.4 TB"):
        pages.client.snapshot(REPOSITORY, "main")


@pytest.fixture
def measured() -> Iterator[None]:
    """The test may take 100 MB of Python's memory at most."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000_000


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"[" + b"[]," * 1_500_000 + b"[]]", "more than 1000000 values"),
        (b"[" + b'"a",' * 1_100_000 + b'"a"]', "more than 1000000 values"),
        (b'"' + b"x" * (9 << 20) + b'"', "larger than 8.4 MB"),
    ],
    ids=["lists", "texts", "bytes"],
)
def test_an_answer_larger_than_any(
    body: bytes, words: str, protocol: str, endpoint: str, server: Hub, measured: None
) -> None:
    server.repository(REPOSITORY).push({"config.json": b"{}"})
    server.faults.always("revision" if protocol == "huggingface" else "tree", Fault(status=200, body=body))
    with pytest.raises(HubError, match=words):
        connect(protocol, endpoint).snapshot(REPOSITORY, "main")


def test_sizes_beyond_the_disk_take_no_memory(protocol: str, tmp_path: Path, measured: None) -> None:
    """A thousand files of 4 TiB would be eight million segments."""
    hub = connect(protocol, "https://127.0.0.1:9")
    files = tuple(RemoteFile(f"{i}.bin", bounds.MAX_FILE_BYTES, "git-sha1", SHA1) for i in range(1000))
    snapshot = Snapshot(hub, REPOSITORY, "main", COMMIT, COMMIT, files)
    with pytest.raises(OutputError, match="are needed"):
        download(snapshot, files, tmp_path / "tiny")
    assert list(tmp_path.iterdir()) == []


def test_a_listing_within_the_bounds(protocol: str, endpoint: str, server: Hub) -> None:
    """Several pages, or folders: all is there."""
    server.page_size = 7
    server.repository(REPOSITORY).push({f"{i % 5}/{i % 3}/{i}.txt": b"x" for i in range(60)})
    snapshot = connect(protocol, endpoint).snapshot(REPOSITORY, "main")
    assert len({file.path for file in snapshot.files}) == 60
