"""Names that could leave the folder are refused before the first byte; patterns choose among the rest."""

from pathlib import Path

import pytest

from msquant.errors import HubError
from msquant.hub.folder_download import download
from msquant.hub.listing import RemoteFile
from msquant.hub.names import check_names, select_files
from tests.fixtures.hub_content import Blob
from tests.fixtures.hub_server import Hub
from tests.hub.conftest import REPOSITORY, connect

EVIL = [
    "../evil",
    "a/../../evil",
    "a/..",
    "/etc/evil",
    "//evil",
    "..\\evil",
    "a\\b",
    "C:/evil",
    "C:evil",
    "a//b",
    "./a",
    "a/",
    "",
    ".",
    "a\nb",
    "a\0b",
    "a\x7fb",
    "a\x80b",
    "a\x9b31mb",
    ".msquant/download.json",
    ".git/hooks/post-checkout",
    "sub/.GIT/config",
    "x" * 256,
    "y/" * 1200 + "z",
    "\ud800",
]


def files(*paths: str) -> list[RemoteFile]:
    return [RemoteFile(path, 1, "git-sha1", "0" * 40) for path in paths]


@pytest.mark.parametrize("path", EVIL)
def test_an_unsafe_name_is_refused(path: str) -> None:
    with pytest.raises(HubError, match="not safe to write") as caught:
        check_names(files("config.json", path), REPOSITORY)
    assert repr(path) in caught.value.what


@pytest.mark.parametrize(
    "path", ["a..b", "...", "a/.hidden", "~", "-rf", "nul", "ü/日本.json", ".gitattributes"]
)
def test_an_odd_name_is_no_unsafe_one(path: str) -> None:
    check_names(files("config.json", path), REPOSITORY)


@pytest.mark.parametrize("paths", [("a", "a"), ("a", "a/b"), ("a/b/c", "a/b")])
def test_names_that_would_meet_are_refused(paths: tuple[str, ...]) -> None:
    with pytest.raises(HubError, match=r"twice|both as a file and as a folder"):
        check_names(files(*paths), REPOSITORY)


@pytest.mark.parametrize("path", ["../evil", "/tmp/evil", "..\\evil", "sub/../../evil"])
def test_a_hub_that_lists_one_is_asked_for_no_byte(
    path: str, protocol: str, endpoint: str, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from msquant.hub.choose import find_snapshot

    monkeypatch.setenv("OPENMIND_HUB_ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    server.repository(REPOSITORY).push({"config.json": b"{}", path: b"evil"})
    with pytest.raises(HubError, match="not safe to write"):
        find_snapshot(REPOSITORY, hub=protocol)
    assert server.fetched() == []


@pytest.mark.parametrize("kind", ["symlink", "submodule", "commit", None])
def test_only_plain_files_are_taken(kind: str, protocol: str, endpoint: str, server: Hub) -> None:
    server.repository(REPOSITORY).push({"a": b"x", "link": Blob(b"/etc/passwd", False, kind)})
    with pytest.raises(HubError, match=f"lists 'link' as a {kind}"):
        connect(protocol, endpoint).snapshot(REPOSITORY, "main")


def test_a_file_without_a_hash_cannot_be_verified(protocol: str, endpoint: str, server: Hub) -> None:
    server.repository(REPOSITORY).push({"a": b"x"})
    hub = connect(protocol, endpoint)
    body = b'[{"type": "file", "path": "a", "size": 1, "oid": "short"}]'
    if protocol == "modelers":
        commit = '{"data": {"last_commit": {"commit": {"commit_sha": "%s"}}, "tree": %s}}'
        body = (commit % ("0" * 40, body.decode().replace("oid", "etag"))).encode()
    from tests.fixtures.hub_faults import Fault

    server.faults.always("tree", Fault(status=200, body=body))
    with pytest.raises(HubError, match="no hash that could be verified"):
        hub.snapshot(REPOSITORY, "main")


NAMES = ("config.json", "a.safetensors", "b.safetensors", "original/c.pth", "original/deep/d.json")


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        ([], [], NAMES),
        (["*.safetensors"], [], ("a.safetensors", "b.safetensors")),
        (["*.json"], ["original/"], ("config.json",)),
        ([], ["original/*", "b.*"], ("config.json", "a.safetensors")),
        (["config.json", "a.*"], [], ("config.json", "a.safetensors")),
    ],
)
def test_patterns_choose_files(include: list[str], exclude: list[str], chosen: tuple[str, ...]) -> None:
    assert [file.path for file in select_files(files(*NAMES), include, exclude, REPOSITORY)] == list(chosen)


@pytest.mark.parametrize(
    ("include", "exclude", "words"),
    [
        (["*.gguf"], [], "--include '[*].gguf' matches none of its 5 files"),
        (["*.json", "*.Json"], [], "--include '[*].Json'"),
        ([], ["*.bin"], "--exclude '[*].bin' matches none"),
        (["*.json"], ["*.json"], "no file is left"),
    ],
)
def test_patterns_that_match_nothing_are_an_error(include: list[str], exclude: list[str], words: str) -> None:
    with pytest.raises(HubError, match=words):
        select_files(files(*NAMES), include, exclude, REPOSITORY)


def test_an_empty_repository_is_an_error() -> None:
    with pytest.raises(HubError, match="empty"):
        select_files([], [], [], REPOSITORY)


def test_a_listing_comes_in_pages_and_folders(
    protocol: str, endpoint: str, server: Hub, tmp_path: Path
) -> None:
    content = {f"{n % 7}/{n % 3}/{n}.json": str(n).encode() for n in range(50)}
    server.page_size = 9
    server.repository(REPOSITORY).push(dict(content))
    snapshot = connect(protocol, endpoint).snapshot(REPOSITORY, "main")
    download(snapshot, snapshot.files, tmp_path / "x")
    assert {name: (tmp_path / "x" / name).read_bytes() for name in content} == content
