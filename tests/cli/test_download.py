"""`msquant download` as its user runs it: a process, its two outputs, its exit code, and its end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from msquant.checkpoint.download_marker import DownloadMarker
from tests.fixtures.hub_content import Blob
from tests.fixtures.hub_faults import Fault
from tests.fixtures.hub_server import Hub, serve

pytestmark = pytest.mark.e2e

REPOSITORY = "MindSpore-Lab/Tiny-W8A8"
WEIGHTS = os.urandom(40_000_000)
FILES: dict[str, bytes | Path | Blob] = {
    "config.json": b"{}",
    "a.safetensors": WEIGHTS,
    "b.safetensors": os.urandom(1000),
}
NOWHERE = "http://127.0.0.1:9"
# Seconds to end after Ctrl-C: one on a quiet machine, and far fewer than what is interrupted would take.
PROMPT = 5
SLOW = Fault(bytes_per_second=4_000_000)

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(hub := Hub()) as address:
        hub.cdn = None
        hub.repository(REPOSITORY).push(FILES)
        os.environ["TEST_ENDPOINT"] = address
        yield hub


@pytest.fixture
def start(hub: Hub, tmp_path: Path) -> Iterator[Start]:
    """Starts `msquant download`; what still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []
    drop = ("HF_", "HTTP", "http", "MODELERS_", "ALL_PROXY", "all_proxy")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(drop)}
    environment |= {"HF_ENDPOINT": NOWHERE, "OPENMIND_HUB_ENDPOINT": os.environ["TEST_ENDPOINT"]}
    environment["HF_HOME"] = str(tmp_path / "home")

    def run(*arguments: object, **variables: str) -> subprocess.Popen[str]:
        # A background job of a shell starts with Ctrl-C ignored.
        code = (
            "import signal, msquant.cli.app as app; "
            "signal.signal(signal.SIGINT, signal.default_int_handler); app.main()"
        )
        started.append(
            subprocess.Popen(
                [sys.executable, "-c", code, "download", *map(str, arguments)],
                cwd=tmp_path,
                env=environment | variables,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(process: "subprocess.Popen[str]", code: int = 0) -> tuple[str, str]:
    out, errors = process.communicate(timeout=60)
    assert process.returncode == code, out + errors
    assert "Traceback" not in errors
    return out, errors


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def progress_bytes(target: Path) -> int:
    """What the progress files of unfinished files say."""
    total = 0
    for path in (target / ".msquant" / "partial").glob("*.progress"):
        try:
            raw = path.read_bytes()
        except FileNotFoundError:
            # Its file was finished since the folder was listed.
            continue
        total += sum(int.from_bytes(raw[i : i + 8], "little") for i in range(8, len(raw), 8))
    return total


def whole(target: Path) -> bool:
    return {name: (target / name).read_bytes() for name in FILES} == FILES


def test_a_person_sees_what_was_taken_and_what_is_next(start: Start, tmp_path: Path) -> None:
    out, errors = finish(start(REPOSITORY))
    target = tmp_path / "Tiny-W8A8"
    assert whole(target)
    assert "3 files, 40.0 MB, of commit" in errors
    assert "on Modelers" in errors
    assert "verified" in out
    assert "Next: msquant inspect" in out
    assert "nothing was fetched" in finish(start(REPOSITORY))[0]


def test_the_fallback_is_said(start: Start, hub: Hub) -> None:
    variables = {"HF_ENDPOINT": os.environ["TEST_ENDPOINT"], "OPENMIND_HUB_ENDPOINT": NOWHERE}
    _, errors = finish(start(REPOSITORY, **variables))
    assert "taken from Hugging Face Hub" in errors
    assert "Modelers cannot be reached" in errors


def test_a_script_reads_json(start: Start, tmp_path: Path, hub: Hub) -> None:
    document = json.loads(finish(start(REPOSITORY, "--output", "x", "--json"))[0])
    assert document["folder"] == str(tmp_path / "x")
    assert document["hub"] == "modelers"
    assert document["commit"] == hub.repository(REPOSITORY).branches["main"]
    assert document["bytes"] == document["received_bytes"] == 40_001_002
    process = start(REPOSITORY, "--output", "x", "--include", "*.gguf", "--json")
    error = json.loads(finish(process, 1)[0])["error"]
    assert "*.gguf" in error["what"]
    assert error["remedy"]


def test_a_dry_run_lists_and_fetches_nothing(start: Start, tmp_path: Path, hub: Hub) -> None:
    out, _ = finish(start(REPOSITORY, "--dry-run", "--exclude", "b.*"))
    assert "a.safetensors" in out
    assert "b.safetensors" not in out
    assert "2 files, 40.0 MB" in out
    document = json.loads(finish(start(REPOSITORY, "--dry-run", "--json"))[0])
    assert [file["path"] for file in document["files"]] == list(FILES)
    assert document["files"][1]["sha256"] == Blob(WEIGHTS, True).sha256
    assert document["bytes"] == 40_001_002
    assert hub.fetched() == []
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_there_is_one_error_soon(start: Start, tmp_path: Path) -> None:
    started = time.monotonic()
    process = start("MindSpore-Lab/DeepSeek-R1-W8A8", OPENMIND_HUB_ENDPOINT=NOWHERE)
    _, errors = finish(process, 1)
    assert time.monotonic() - started < 10
    assert errors.count("error:") == errors.count("try:") == 1
    assert "HTTPS_PROXY" in errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("repository", ["DeepSeek-R1", "../evil", "a/b/c"])
def test_a_name_that_is_none(repository: str, start: Start, hub: Hub) -> None:
    assert "organisation/name" in finish(start(repository), 1)[1]
    assert hub.requests == []


def test_ctrl_c_stops_within_a_second_and_the_next_call_continues(
    start: Start, hub: Hub, tmp_path: Path
) -> None:
    hub.faults.always("a.safetensors", SLOW)
    target = tmp_path / "Tiny-W8A8"
    process = start(REPOSITORY)
    wait_for(lambda: progress_bytes(target) > 1_000_000)
    process.send_signal(signal.SIGINT)
    pressed = time.monotonic()
    _, errors = finish(process, 130)
    assert time.monotonic() - pressed < PROMPT
    assert "interrupted" in errors
    assert "the same command continues" in errors
    marker = DownloadMarker.read(target)
    assert marker is not None
    assert not marker.complete
    kept = progress_bytes(target)
    hub.faults.clear()
    document = json.loads(finish(start(REPOSITORY, "--json"))[0])
    assert document["received_bytes"] <= 40_001_002 - kept
    assert whole(target)


def test_ctrl_c_while_the_hub_is_silent(start: Start, hub: Hub) -> None:
    hub.faults.always("tree", Fault(stall=20))
    process = start(REPOSITORY)
    wait_for(lambda: hub.requests)
    process.send_signal(signal.SIGINT)
    pressed = time.monotonic()
    finish(process, 130)
    assert time.monotonic() - pressed < PROMPT


def test_kill_9_loses_at_most_what_was_in_flight(start: Start, hub: Hub, tmp_path: Path) -> None:
    hub.faults.always("a.safetensors", SLOW)
    target = tmp_path / "Tiny-W8A8"
    for least in (1_000_000, 4_000_000):
        process = start(REPOSITORY, "--workers", 2)
        wait_for(lambda least=least: progress_bytes(target) > least)
        process.kill()
        process.communicate()
    kept = progress_bytes(target)
    assert not (target / "config.json").exists()
    hub.faults.clear()
    document = json.loads(finish(start(REPOSITORY, "--json"))[0])
    assert document["received_bytes"] <= 40_001_002 - kept
    assert whole(target)


def test_a_second_process_waits_and_fetches_nothing(start: Start, hub: Hub, tmp_path: Path) -> None:
    hub.faults.once("a.safetensors", SLOW)
    first = start(REPOSITORY)
    wait_for(lambda: progress_bytes(tmp_path / "Tiny-W8A8") > 500_000)
    second = start(REPOSITORY, "--json")
    document = json.loads(finish(first)[0] and finish(second)[0])
    assert document["fetched"] == []
    assert whole(tmp_path / "Tiny-W8A8")


def test_the_second_process_says_whom_it_waits_for(start: Start, hub: Hub, tmp_path: Path) -> None:
    hub.faults.always("a.safetensors", SLOW)
    first = start(REPOSITORY)
    wait_for(lambda: progress_bytes(tmp_path / "Tiny-W8A8") > 500_000)
    second = start(REPOSITORY)
    assert second.stderr is not None
    lines = iter(second.stderr.readline, "")
    assert any(f"process {first.pid} on " in line and "waiting" in line for line in lines)
    second.send_signal(signal.SIGINT)
    finish(second, 130)


def test_a_token_is_taken_from_a_file_and_shown_nowhere(start: Start, hub: Hub, tmp_path: Path) -> None:
    hub.repository(REPOSITORY).private = True
    (tmp_path / "token").write_text("not-the-right-one\n")
    process = start(REPOSITORY, "--hub", "modelers", "--token-file", "token")
    out, errors = finish(process, 1)
    assert "not-the-right-one" not in out + errors
    (tmp_path / "token").write_text(hub.token)
    out, errors = finish(start(REPOSITORY, "--hub", "modelers", "--token-file", "token"))
    marker = (tmp_path / "Tiny-W8A8" / ".msquant" / "download.json").read_text()
    assert hub.token not in out + errors + marker
