"""What hubs and networks do wrong, and what is said and kept then."""

import email.utils
import hashlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from msquant.checkpoint.disk import shown_sizes
from msquant.checkpoint.download_marker import require_complete
from msquant.errors import CheckpointError, HubError, OutputError
from msquant.hub import partial
from msquant.hub.folder_download import DownloadResult, download
from msquant.hub.job import Job
from msquant.hub.listing import RemoteFile
from msquant.hub.partial import PartialFile
from msquant.hub.retry import Limits, Stopped
from tests.fixtures.hub_content import Blob
from tests.fixtures.hub_faults import Fault
from tests.fixtures.hub_server import Hub, serve
from tests.hub.conftest import QUICK, REPOSITORY, connect

SHARD, SEGMENT = "model.safetensors", 1 << 18
WEIGHTS = os.urandom(4 * SEGMENT + 1000)
FILES: dict[str, bytes | Path | Blob] = {"config.json": b"{}", "notes.txt": b"plain " * 100, SHARD: WEIGHTS}

Fetch = Callable[..., DownloadResult]


@pytest.fixture(autouse=True)
def small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "MIN_SEGMENT", SEGMENT)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "tiny"


@pytest.fixture
def fetch(protocol: str, endpoint: str, server: Hub, target: Path) -> Fetch:
    server.repository(REPOSITORY).push(FILES)

    def run(token: str | None = None, limits: Limits = QUICK, **options: object) -> DownloadResult:
        snapshot = connect(protocol, endpoint, token, limits).snapshot(REPOSITORY, "main")
        return download(snapshot, snapshot.files, target, **options)  # type: ignore[arg-type]

    return run


def right(target: Path) -> bool:
    return {name: (target / name).read_bytes() for name in FILES} == FILES


def partial_bytes(target: Path) -> int:
    """What the progress files say is there of unfinished files."""
    folder = target / ".msquant" / "partial"
    done = 0
    for path in folder.glob("*.progress"):
        raw = path.read_bytes()
        done += sum(int.from_bytes(raw[i : i + 8], "little") for i in range(8, len(raw), 8))
    return done


@pytest.mark.parametrize(
    "fault",
    [
        Fault(drop_after=100_000),
        Fault(stall=1.2),
        Fault(status=500),
        Fault(status=503),
        Fault(status=429, headers={"Retry-After": "0"}),
        Fault(status=408),
    ],
    ids=["drop", "timeout", "500", "503", "429", "408"],
)
def test_what_passes_is_tried_again_in_the_same_call(
    fault: Fault, fetch: Fetch, target: Path, server: Hub
) -> None:
    server.faults.once(SHARD, fault, fault)
    server.faults.once("config.json", fault)
    result = fetch()
    assert right(target)
    assert result.received_bytes == result.nbytes


def test_a_dropped_connection_loses_nothing_that_came(fetch: Fetch, target: Path, server: Hub) -> None:
    server.faults.once(SHARD, *[Fault(drop_after=50_000)] * 12)
    result = fetch(workers=1)
    assert right(target)
    assert result.received_bytes == result.nbytes
    ranges = [headers["Range"] for _, _, path, headers in server.requests if path.endswith(SHARD)]
    assert ranges[:3] == ["bytes=0-262143", "bytes=50000-262143", "bytes=100000-262143"]


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_kept(form: str, fetch: Fetch, server: Hub) -> None:
    wait = "1" if form == "seconds" else email.utils.formatdate(time.time() + 2, usegmt=True)
    server.faults.once(SHARD, Fault(status=429, headers={"Retry-After": wait}))
    started = time.monotonic()
    fetch(workers=1)
    assert time.monotonic() - started >= 0.9


def test_a_wait_of_hours_is_not_waited_for(fetch: Fetch, server: Hub, target: Path) -> None:
    server.faults.once(SHARD, Fault(status=429, headers={"Retry-After": "7200"}))
    with pytest.raises(HubError, match="asks to wait 7200 s"):
        fetch()
    with pytest.raises(CheckpointError, match="not complete"):
        require_complete(target)


@pytest.mark.parametrize("what", ["revision", "tree"])
def test_the_listing_is_tried_again_too(what: str, fetch: Fetch, target: Path, server: Hub) -> None:
    server.faults.once(what, Fault(status=503), Fault(status=429, headers={"Retry-After": "0"}))
    fetch()
    assert right(target)


def test_a_server_that_ignores_ranges(fetch: Fetch, target: Path, server: Hub) -> None:
    server.faults.always(SHARD, Fault(ignore_range=True))
    fetch()
    assert right(target)


def test_a_server_that_ignores_ranges_and_drops_is_begun_again(
    fetch: Fetch, target: Path, server: Hub
) -> None:
    server.faults.once(SHARD, *[Fault(ignore_range=True)] * 8, Fault(ignore_range=True, drop_after=900_000))
    server.faults.always(SHARD, Fault(ignore_range=True))
    fetch(workers=1)
    assert right(target)


def test_one_that_always_does_so_is_given_up(fetch: Fetch, target: Path, server: Hub) -> None:
    server.faults.always(SHARD, Fault(ignore_range=True, drop_after=900_000))
    with pytest.raises(HubError, match="sends no ranges"):
        fetch()


@pytest.mark.parametrize(
    "fault", [Fault(flip=SEGMENT + 5), Fault(shift_range=1), Fault(cut=5000)], ids=["flip", "range", "size"]
)
def test_wrong_bytes_are_fetched_again(fault: Fault, fetch: Fetch, target: Path, server: Hub) -> None:
    server.faults.once(SHARD, fault, fault)
    fetch(workers=1)
    assert right(target)


@pytest.mark.parametrize("name", [SHARD, "notes.txt"])
def test_a_file_that_stays_wrong_is_named_after_three_attempts(
    name: str, fetch: Fetch, target: Path, server: Hub
) -> None:
    server.faults.always(name, Fault(flip=10))
    # On a busy machine an answer may take longer than a quick client waits, which would ask again for it.
    patient = replace(QUICK, read_seconds=60, connect_seconds=60)
    with pytest.raises(HubError, match=rf"in 3 attempts: {name}") as caught:
        fetch(limits=patient)
    assert caught.value.where == REPOSITORY
    segments = -(-len(FILES[name]) // SEGMENT)  # type: ignore[arg-type]
    assert server.fetched().count(name) == 3 * segments
    assert not (target / name).exists()
    # What is whole is kept, and what makes a folder look complete is not there.
    assert (target / ({SHARD, "notes.txt"} - {name}).pop()).exists()
    assert not (target / "config.json").exists()
    with pytest.raises(CheckpointError, match="not complete"):
        require_complete(target)

    server.faults.clear()
    assert sorted(fetch().fetched) == sorted(["config.json", name])
    assert right(target)


@pytest.mark.parametrize("status", [401, 403, 404, 410])
def test_a_refused_file_ends_it_at_once(status: int, fetch: Fetch, server: Hub) -> None:
    server.faults.always(SHARD, Fault(status=status))
    with pytest.raises(HubError) as caught:
        fetch(workers=1)
    assert server.fetched().count(SHARD) == 1
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("change", "token", "words"),
    [
        ({"private": True}, None, "token"),
        ({"private": True}, "wrong", "token is not valid"),
        ({"gated": True}, None, "access|token"),
    ],
)
def test_what_one_may_not_read_is_said_at_once(
    change: dict[str, bool], token: str | None, words: str, fetch: Fetch, server: Hub
) -> None:
    for name, value in change.items():
        setattr(server.repository(REPOSITORY), name, value)
    with pytest.raises(HubError, match=words) as caught:
        fetch(token)
    assert len(server.requests) == 1
    assert "token" in str(caught.value.remedy)
    assert "wrong" not in str(caught.value)


def test_the_right_token_opens_a_private_repository(fetch: Fetch, server: Hub, target: Path) -> None:
    server.repository(REPOSITORY).private = True
    fetch(server.token)
    assert right(target)


def test_a_repository_and_a_revision_that_are_not_there(protocol: str, endpoint: str, server: Hub) -> None:
    with pytest.raises(HubError, match="no such repository"):
        connect(protocol, endpoint).snapshot("some-org/nothing", "main")
    server.repository(REPOSITORY).push(FILES)
    with pytest.raises(HubError, match="no such revision"):
        connect(protocol, endpoint).snapshot(REPOSITORY, "nothing")


def test_a_hub_that_stops_answering(fetch: Fetch, target: Path, server: Hub) -> None:
    server.faults.once(SHARD, Fault(drop_after=200_000))
    server.faults.always(SHARD, Fault(status=503))
    with pytest.raises(HubError, match="does not answer: status 503") as caught:
        fetch(workers=1)
    assert any("same command continues" in note for note in caught.value.__notes__)
    kept = partial_bytes(target)
    assert kept == 200_000
    server.faults.clear()
    result = fetch()
    assert right(target)
    assert result.received_bytes == result.nbytes - kept


def test_an_oversized_partial_file_is_discarded(fetch: Fetch, target: Path, server: Hub) -> None:
    server.faults.once(SHARD, Fault(drop_after=200_000))
    server.faults.always(SHARD, Fault(status=404))
    with pytest.raises(HubError):
        fetch(workers=1)
    (data,) = (target / ".msquant" / "partial").glob("*.data")
    with data.open("ab") as file:
        file.write(b"x" * 10_000_000)
    server.faults.clear()
    fetch()
    assert right(target)


@pytest.mark.parametrize("damage", ["data", "progress"])
def test_damaged_partial_files_do_no_harm(damage: str, fetch: Fetch, target: Path, server: Hub) -> None:
    server.faults.once(SHARD, Fault(drop_after=200_000))
    server.faults.always(SHARD, Fault(status=404))
    with pytest.raises(HubError):
        fetch(workers=1)
    (path,) = (target / ".msquant" / "partial").glob(f"*.{damage}")
    raw = bytearray(path.read_bytes())
    raw[8:30] = os.urandom(22)
    path.write_bytes(raw)
    server.faults.clear()
    fetch()
    assert right(target)


def test_a_disk_that_is_too_small_is_refused_with_both_numbers(
    fetch: Fetch, small_disk: Path, server: Hub, protocol: str, endpoint: str
) -> None:
    snapshot = connect(protocol, endpoint).snapshot(REPOSITORY, "main")
    with pytest.raises(OutputError, match=rf"B are free .*, {shown_sizes(len(WEIGHTS) + 602)[0]} are needed"):
        download(snapshot, snapshot.files, small_disk / "tiny")
    assert server.fetched() == []
    assert list(small_disk.iterdir()) == []


@pytest.mark.parametrize("verified", [True, False])
def test_a_disk_that_fills_on_the_way_leaves_what_came(
    verified: bool,
    small_disk: Path,
    server: Hub,
    protocol: str,
    endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, filler, placed = small_disk / "tiny", small_disk / "filler", threading.Event()
    files: dict[str, bytes | Path | Blob] = {f"{number}.bin": os.urandom(60_000) for number in range(3)}
    server.repository(REPOSITORY).push(files)
    snapshot = connect(protocol, endpoint).snapshot(REPOSITORY, "main")
    publish = Job.publish

    def publish_then(job: Job, stop: threading.Event) -> int:
        """Come to the first file before the disk is full, or only after everything is stopped."""
        if not verified:
            placed.set()
            stop.wait(60)
        modified = publish(job, stop)
        placed.set()
        return modified

    def fill() -> None:
        placed.wait(60)
        filler.write_bytes(bytes(small_disk_free(small_disk)))

    with monkeypatch.context() as patch:
        patch.setattr(Job, "publish", publish_then)
        server.faults.once("1.bin", Fault(before=fill))
        with pytest.raises(OutputError, match="disk is full") as caught:
            download(snapshot, snapshot.files, target, workers=1)
    assert any("same command continues" in note for note in caught.value.__notes__)
    assert (target / "0.bin").exists() == verified
    filler.unlink()
    server.requests.clear()
    snapshot = connect(protocol, endpoint).snapshot(REPOSITORY, "main")
    assert "0.bin" not in download(snapshot, snapshot.files, target).fetched
    assert "0.bin" not in server.fetched()
    assert {name: (target / name).read_bytes() for name in files} == files


def test_a_thread_that_was_not_waited_for_gives_no_file_its_name(tmp_path: Path) -> None:
    file = RemoteFile("a.bin", 4, "sha256", hashlib.sha256(b"abcd").hexdigest())
    job = Job(file, PartialFile(tmp_path / "partial", file), tmp_path / "a.bin")
    syncing, closed = threading.Event(), threading.Event()

    def sync(stop: threading.Event) -> bool:
        syncing.set()
        return closed.wait(60)

    assert job.missing_range(0, 0) == (0, 4)
    job.write(0, 0, b"abcd")
    job.partial.sync = sync  # type: ignore[method-assign]
    with ThreadPoolExecutor(1) as pool:
        placing = pool.submit(job.publish, threading.Event())
        syncing.wait(60)
        job.close()
        closed.set()
        with pytest.raises(Stopped):
            placing.result(60)
    assert not (tmp_path / "a.bin").exists()


def small_disk_free(disk: Path) -> int:
    state = os.statvfs(disk)
    return state.f_bavail * state.f_frsize


def test_redirects_are_not_followed_into_the_open(
    protocol: str, endpoint: str, fetch: Fetch, server: Hub
) -> None:
    with serve(Hub(), host="localhost") as plain:
        server.faults.always(
            SHARD, Fault(redirect=f"{plain}/x" if protocol == "modelers" else "file:///etc/passwd")
        )
        with pytest.raises(HubError, match="not safe to follow"):
            fetch()
    snapshot = connect(protocol, endpoint).snapshot(REPOSITORY, "main")
    server.faults.always(SHARD, Fault(redirect=snapshot.hub.file_url(snapshot, SHARD)))
    with pytest.raises(HubError, match="in a circle"):
        fetch()


def test_the_signature_of_a_redirect_is_never_shown(
    protocol: str, endpoint: str, fetch: Fetch, server: Hub
) -> None:
    server.faults.always(SHARD, Fault(redirect=f"{endpoint}/nowhere?signature=secret"))
    with pytest.raises(HubError) as caught:
        fetch()
    assert "secret" not in str(caught.value)


def test_a_certificate_that_is_not_trusted(
    protocol: str, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if protocol == "huggingface":
        pytest.skip("without TLS here")
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    with pytest.raises(HubError, match="not trusted") as caught:
        connect(protocol, endpoint).snapshot(REPOSITORY, "main")
    assert "REQUESTS_CA_BUNDLE" in str(caught.value.remedy)


@pytest.mark.parametrize(
    "body", [b"<html>log in</html>", b"[1]", b'{"sha": "../x"}', b'{"data": {}}', b"[" * 100_000]
)
def test_an_answer_that_is_no_listing(body: bytes, fetch: Fetch, server: Hub, protocol: str) -> None:
    server.faults.always("revision" if protocol == "huggingface" else "tree", Fault(status=200, body=body))
    with pytest.raises(HubError):
        fetch()


def test_nobody_listens(protocol: str) -> None:
    started = time.monotonic()
    with pytest.raises(HubError, match="cannot be reached: the connection was refused") as caught:
        connect(protocol, "https://127.0.0.1:9").snapshot(REPOSITORY, "main")
    assert time.monotonic() - started < 2
    assert "HTTPS_PROXY" in str(caught.value.remedy)
