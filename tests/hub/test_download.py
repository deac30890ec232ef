"""A download of either hub: from one commit, verified, resumed, and nothing outside of its folder."""

import os
import ssl
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from msquant.checkpoint.download_marker import DownloadMarker, require_complete
from msquant.checkpoint.weight_map import find_weights
from msquant.errors import CheckpointError, HubError, OutputError
from msquant.hub import partial
from msquant.hub.folder_download import DownloadResult, download
from msquant.hub.target import TargetFolder
from msquant.hub.transfer_events import HubProgress, TransferState
from tests.fixtures.hub_content import Blob
from tests.fixtures.hub_faults import Fault
from tests.fixtures.hub_server import Hub, serve
from tests.hub.conftest import QUICK, REPOSITORY, connect

SHARD = "model-00001-of-00002.safetensors"
WEIGHTS = os.urandom(3_000_000)
FILES: dict[str, bytes | Path | Blob] = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors.index.json": b"{}",
    SHARD: WEIGHTS,
    "model-00002-of-00002.safetensors": os.urandom(700_000),
    "tokenizer/special tokens+ä.json": b"[1]",
    "empty.txt": b"",
}

Fetch = Callable[..., DownloadResult]


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of 256 kB, so that small files have several."""
    monkeypatch.setattr(partial, "MIN_SEGMENT", 1 << 18)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "there" / "tiny"


@pytest.fixture
def fetch(protocol: str, endpoint: str, server: Hub, target: Path) -> Fetch:
    """Downloads the whole repository, which holds FILES, with a new client."""
    server.repository(REPOSITORY).push(FILES)

    def run(revision: str = "main", **options: object) -> DownloadResult:
        hub = connect(protocol, endpoint, limits=QUICK)
        snapshot = hub.snapshot(REPOSITORY, revision)
        return download(snapshot, snapshot.files, target, **options)  # type: ignore[arg-type]

    return run


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a download without its marker."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(".msquant/")}


def test_every_file_is_there_and_nothing_else(fetch: Fetch, target: Path, server: Hub) -> None:
    result = fetch()
    assert contents(target) == FILES
    assert result.nbytes == result.received_bytes == sum(map(len, contents(target).values()))
    assert result.commit == server.repository(REPOSITORY).branches["main"]
    assert sorted(result.fetched) == sorted(FILES)
    assert [path.name for path in (target / ".msquant").iterdir()] == ["download.json"]
    marker = DownloadMarker.read(target)
    assert marker is not None
    assert marker.complete
    assert marker.commit == result.commit
    require_complete(target)


def test_a_second_call_transfers_nothing(fetch: Fetch, server: Hub) -> None:
    server.repository(REPOSITORY).push(FILES | {f"{number}.json": b"{}" for number in range(200)})
    fetch()
    server.requests.clear()
    started = time.monotonic()
    result = fetch()
    assert time.monotonic() - started < 1
    assert result.fetched == []
    assert result.received_bytes == 0
    assert server.fetched() == []


def test_a_push_during_the_download_changes_nothing(fetch: Fetch, target: Path, server: Hub) -> None:
    repository = server.repository(REPOSITORY)
    before = repository.branches["main"]

    def push() -> None:
        repository.push({"other.json": b"{}", SHARD: b"another"})

    server.faults.once("empty.txt", Fault(before=push))
    server.faults.once("config.json", Fault(before=push))
    assert fetch().commit == before
    assert contents(target) == FILES


def test_a_hub_that_knows_no_commits_is_held_to_one_listing(
    protocol: str, endpoint: str, server: Hub, fetch: Fetch, target: Path
) -> None:
    if protocol != "modelers":
        pytest.skip("the Hugging Face Hub takes commits")
    server.commit_references = False
    repository = server.repository(REPOSITORY)
    assert fetch().commit == repository.branches["main"]

    changed = FILES | {SHARD: os.urandom(len(WEIGHTS))}
    hub = connect(protocol, endpoint)
    snapshot = hub.snapshot(REPOSITORY, "main")
    other = target.with_name("other")
    server.faults.once("config.json", Fault(before=lambda: repository.push(changed) and None))
    with pytest.raises(HubError, match="main moved from") as caught:
        download(snapshot, snapshot.files, other)
    assert "same command" in str(caught.value.remedy)
    assert not (other / "config.json").exists()
    assert sorted(fetch().fetched) == [SHARD]
    assert contents(target) == changed


def test_a_tag_and_a_commit_can_be_asked_for(fetch: Fetch, target: Path, server: Hub) -> None:
    repository = server.repository(REPOSITORY)
    first = repository.branches["main"]
    repository.branches["v1"] = first
    repository.push({"config.json": b"other"})
    assert fetch("v1").commit == fetch(first).commit == first
    assert contents(target) == FILES


def test_a_snapshot_may_be_used_twice(protocol: str, endpoint: str, server: Hub, target: Path) -> None:
    server.repository(REPOSITORY).push(FILES)
    snapshot = connect(protocol, endpoint).snapshot(REPOSITORY, "main")
    for folder in (target, target.with_name("other")):
        download(snapshot, snapshot.files, folder)
        assert contents(folder) == FILES


def test_a_new_commit_fetches_what_changed(fetch: Fetch, target: Path, server: Hub) -> None:
    fetch()
    server.repository(REPOSITORY).push(FILES | {"config.json": b"new"})
    assert fetch().fetched == ["config.json"]
    assert contents(target) == FILES | {"config.json": b"new"}


SINGLE: dict[str, bytes | Path | Blob] = {
    "config.json": FILES["config.json"],
    "model.safetensors": os.urandom(1_000_000),
}


def test_a_new_commit_removes_what_it_no_longer_lists(fetch: Fetch, target: Path, server: Hub) -> None:
    fetch()
    (target / "mine.txt").write_bytes(b"mine")
    server.repository(REPOSITORY).push(SINGLE)
    assert fetch().fetched == ["model.safetensors"]
    assert contents(target) == SINGLE | {"mine.txt": b"mine"}
    assert not (target / "tokenizer").exists()
    marker = DownloadMarker.read(target)
    assert marker is not None
    assert marker.complete
    assert (set(marker.files), marker.obsolete) == (set(SINGLE), {})
    assert find_weights(target) == target / "model.safetensors"


def test_nothing_is_removed_before_the_new_files_are_complete(
    fetch: Fetch, target: Path, server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch()
    server.repository(REPOSITORY).push(SINGLE)
    server.faults.always("model.safetensors", Fault(status=403))
    with pytest.raises(HubError):
        fetch()
    # Without config.json no engine takes the folder for a model.
    assert contents(target) == {name: FILES[name] for name in FILES if name != "config.json"}
    with pytest.raises(CheckpointError, match="not complete"):
        require_complete(target)

    server.faults.clear()
    with monkeypatch.context() as patch:
        patch.setattr(TargetFolder, "remove_obsolete", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch()
    assert contents(target) == FILES | SINGLE
    with pytest.raises(CheckpointError, match="not complete"):
        require_complete(target)

    assert fetch().fetched == []
    assert contents(target) == SINGLE


def test_what_is_no_part_of_the_download_is_named(fetch: Fetch, target: Path) -> None:
    fetch()
    (target / "model.safetensors").write_bytes(b"mine")
    lines: list[str] = []
    fetch(verify=True, progress=HubProgress(stage=lines.append))
    assert lines[-1].startswith(f"{target / 'model.safetensors'} does not belong to this model")
    assert (target / "model.safetensors").read_bytes() == b"mine"


def interrupt(*arguments: object) -> None:
    raise KeyboardInterrupt


def test_two_commits_are_never_mixed(
    protocol: str, endpoint: str, fetch: Fetch, target: Path, server: Hub
) -> None:
    fetch()
    changed = FILES | {SHARD: b"another", "config.json": b"new"}
    server.repository(REPOSITORY).push(changed)
    snapshot = connect(protocol, endpoint, limits=QUICK).snapshot(REPOSITORY, "main")
    wanted = [file for file in snapshot.files if file.path == "config.json"]
    with pytest.raises(OutputError, match=f"holds {SHARD} of an earlier commit") as caught:
        download(snapshot, wanted, target)
    assert "--include" in (caught.value.remedy or "")
    assert contents(target) == FILES
    (target / SHARD).unlink()
    assert download(snapshot, wanted, target).fetched == ["config.json"]
    assert sorted(fetch().fetched) == [SHARD]
    assert contents(target) == changed


def test_a_flipped_bit_on_disk_is_found_and_mended(fetch: Fetch, target: Path) -> None:
    fetch()
    state = (target / SHARD).stat()
    with (target / SHARD).open("r+b") as file:
        file.seek(1_000_000)
        file.write(bytes([WEIGHTS[1_000_000] ^ 1]))
    os.utime(target / SHARD, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert fetch().fetched == []
    assert fetch(verify=True).fetched == [SHARD]
    assert contents(target) == FILES


def test_a_changed_time_is_enough_to_look_again(fetch: Fetch, target: Path) -> None:
    fetch()
    os.utime(target / SHARD)
    assert fetch().fetched == []
    (target / SHARD).write_bytes(b"x" * len(WEIGHTS))
    assert fetch().fetched == [SHARD]


def test_files_of_another_tool_are_taken_over_once_they_are_hashed(fetch: Fetch, target: Path) -> None:
    target.mkdir(parents=True)
    (target / SHARD).write_bytes(WEIGHTS)
    assert SHARD not in fetch().fetched
    assert contents(target) == FILES


def test_what_a_person_put_there_is_never_replaced(fetch: Fetch, target: Path, server: Hub) -> None:
    target.mkdir(parents=True)
    (target / SHARD).write_bytes(b"mine")
    with pytest.raises(OutputError, match=f"holds another {SHARD}"):
        fetch()
    assert contents(target) == {SHARD: b"mine"}
    assert list(target.iterdir()) == [target / SHARD]
    assert server.fetched() == []


def test_a_download_of_another_repository_is_left_alone(fetch: Fetch, target: Path) -> None:
    fetch()
    marker = DownloadMarker.read(target)
    assert marker is not None
    marker.repository = "some-org/other"
    marker.write(target)
    with pytest.raises(OutputError, match="holds a download of some-org/other"):
        fetch()


def test_a_damaged_marker_is_mended_without_the_network(fetch: Fetch, target: Path) -> None:
    fetch()
    (target / ".msquant" / "download.json").write_text('{"version": 1')
    with pytest.raises(CheckpointError, match="damaged"):
        require_complete(target)
    assert fetch().received_bytes == 0
    require_complete(target)


@pytest.mark.parametrize("name", [".msquant", ".msquant/partial", ".msquant/held", "tokenizer"])
def test_links_in_the_target_lead_nowhere(fetch: Fetch, target: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (target / name).parent.mkdir(parents=True)
    (target / name).symlink_to(outside)
    with pytest.raises(OutputError, match="a link"):
        fetch()
    assert list(outside.iterdir()) == []


def test_a_link_in_the_place_of_a_file_is_not_followed(fetch: Fetch, target: Path, tmp_path: Path) -> None:
    fetch()
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    (target / SHARD).unlink()
    (target / SHARD).symlink_to(outside)
    assert fetch().fetched == [SHARD]
    assert outside.read_bytes() == b"mine"
    assert contents(target) == FILES


def test_a_file_as_the_target_is_refused(fetch: Fetch, target: Path) -> None:
    target.parent.mkdir()
    target.write_text("x")
    with pytest.raises(OutputError, match="not a folder"):
        fetch()


def test_what_is_done_never_goes_back(fetch: Fetch, server: Hub) -> None:
    server.faults.once(SHARD, Fault(flip=2_500_000), *[Fault(drop_after=100_000)] * 4)
    states: list[TransferState] = []
    fetch(progress=HubProgress(update=states.append))
    done = [state.done_bytes for state in states]
    assert done == sorted(done)
    assert [state.done_files for state in states] == sorted(state.done_files for state in states)
    assert states[-1].done_bytes == states[-1].total_bytes == sum(len(file) for file in contents_of(FILES))
    assert states[-1].done_files == states[-1].total_files == len(FILES)


def contents_of(files: dict[str, bytes | Path | Blob]) -> list[bytes]:
    return [file for file in files.values() if isinstance(file, bytes)]


def test_large_files_come_over_other_hosts_without_the_token(
    protocol: str,
    server: Hub,
    endpoint: str,
    target: Path,
    authority: tuple[ssl.SSLContext, Path],
) -> None:
    """Another name and port is another host."""
    repository = server.repository(REPOSITORY)
    repository.push(FILES)
    repository.private = True
    cdn = Hub(repositories=server.repositories)
    with serve(cdn, authority[0] if protocol == "modelers" else None, host="localhost") as server.cdn:
        hub = connect(protocol, endpoint, server.token)
        snapshot = hub.snapshot(REPOSITORY, "main")
        download(snapshot, snapshot.files, target)
    assert contents(target) == FILES
    assert all(headers["Authorization"] == "Bearer the-right-token" for *_, headers in server.requests)
    assert len(cdn.requests) > len(WEIGHTS) // (1 << 18)
    assert not any("Authorization" in headers for *_, headers in cdn.requests)
