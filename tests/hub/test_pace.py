"""Senders that never stop and never come to an end."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from msquant.errors import HubError
from msquant.hub.choose import make_hub
from msquant.hub.folder_download import download
from msquant.hub.http import Pace
from msquant.hub.retry import Limits, Transient
from tests.fixtures.hub_faults import Fault
from tests.fixtures.hub_server import Hub
from tests.fixtures.raw_server import RawServer
from tests.hub.conftest import QUICK, REPOSITORY, connect

PATIENCE = replace(QUICK, least_rate=20_000, rate_seconds=0.4, slow_attempts=2)
WEIGHTS = bytes(range(250)) * 400


@pytest.fixture
def raw() -> Iterator[RawServer]:
    server = RawServer()
    yield server
    server.close()


class Drip:
    """In place of urllib3's response: so many bytes each time, after so many seconds of its own clock."""

    def __init__(self, count: int, seconds: float) -> None:
        self.count, self.seconds, self.now = count, seconds, 0.0
        self.error: Exception | None = None

    def clock(self) -> float:
        return self.now

    def read1(self, size: int, decode_content: bool) -> bytes:
        self.now += self.seconds
        if self.error is not None:
            raise self.error
        return b"x" * min(size, self.count)


def test_a_byte_a_second_is_ended_after_the_window() -> None:
    drip = Drip(1, 1)
    pace = Pace(Limits(), drip.clock)
    for _ in range(30):
        assert pace.read(drip, 1 << 20) == b"x"
    with pytest.raises(Transient, match="1 bytes a second came over 30 s, the least is 1000") as caught:
        pace.read(drip, 1 << 20)
    assert caught.value.slow


def test_the_least_rate_is_enough() -> None:
    drip = Drip(500, 0.5)
    pace = Pace(Limits(), drip.clock)
    assert sum(len(pace.read(drip, 1 << 20)) for _ in range(300)) == 150_000


def test_time_in_which_nobody_reads_does_not_count() -> None:
    drip = Drip(1000, 1)
    pace = Pace(Limits(), drip.clock)
    for _ in range(100):
        pace.read(drip, 1 << 20)
        drip.now += 1000


def test_no_least_rate() -> None:
    drip = Drip(1, 100)
    pace = Pace(Limits(least_rate=0), drip.clock)
    for _ in range(100):
        pace.read(drip, 1 << 20)


def test_what_came_before_an_error_is_not_lost() -> None:
    drip = Drip(10, 0.1)
    pace = Pace(Limits(), drip.clock)
    drip_read = drip.read1

    def read1(size: int, decode_content: bool) -> bytes:
        if drip.now > 0.25:
            drip.error = OSError("reset")
        return drip_read(size, decode_content)

    drip.read1 = read1  # type: ignore[method-assign]
    assert len(pace.read(drip, 100)) == 30
    with pytest.raises(OSError, match="reset"):
        pace.read(drip, 100)


def test_a_slow_hub_is_named_and_the_next_call_continues(
    protocol: str, endpoint: str, server: Hub, tmp_path: Path
) -> None:
    server.repository(REPOSITORY).push({"config.json": b"{}", "model.safetensors": WEIGHTS})
    server.faults.always("model.safetensors", Fault(bytes_per_second=4000))

    def fetch(limits: Limits) -> int:
        snapshot = connect(protocol, endpoint).snapshot(REPOSITORY, "main")
        snapshot.hub.client.limits = limits
        return download(snapshot, snapshot.files, tmp_path / "tiny").received_bytes

    with pytest.raises(HubError, match=r"is too slow: \d+ bytes a second came over \d+ s") as caught:
        fetch(PATIENCE)
    assert "MSQUANT_MIN_RATE" in str(caught.value.remedy)
    assert server.fetched().count("model.safetensors") == 2
    server.faults.clear()
    assert fetch(QUICK) < len(WEIGHTS), "what came slowly is kept"
    assert (tmp_path / "tiny" / "model.safetensors").read_bytes() == WEIGHTS


def test_a_refusal_that_comes_too_slowly(raw: RawServer) -> None:
    """Its body would say more; what the status says is enough."""
    raw.answer, raw.seconds = b"HTTP/1.1 404 No\r\n\r\n" + b" " * 400, 0.05
    client = connect("modelers", raw.address, None, PATIENCE).client
    with pytest.raises(HubError, match="no such repository"):
        client.json(f"{raw.address}/x")
    assert raw.sent < len(raw.answer)


def test_a_byte_a_connection_is_no_progress(
    protocol: str, endpoint: str, server: Hub, tmp_path: Path
) -> None:
    server.repository(REPOSITORY).push({"model.safetensors": WEIGHTS})
    server.faults.always("model.safetensors", Fault(drop_after=1))
    snapshot = connect(protocol, endpoint).snapshot(REPOSITORY, "main")
    with pytest.raises(HubError, match="does not answer"):
        download(snapshot, snapshot.files, tmp_path / "tiny")
    assert len(server.fetched()) == QUICK.attempts


@pytest.mark.parametrize(("text", "rate"), [("", 1000), ("0", 0), (" 2500 ", 2500)])
def test_the_least_rate_of_the_environment(text: str, rate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSQUANT_MIN_RATE", text)
    monkeypatch.delenv("OPENMIND_HUB_ENDPOINT", raising=False)
    assert make_hub("modelers").client.limits.least_rate == rate


@pytest.mark.parametrize("text", ["-1", "1kB", "nan", "\u0663", "9" * 5000])
def test_a_least_rate_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSQUANT_MIN_RATE", text)
    with pytest.raises(HubError, match="not a number of bytes") as caught:
        make_hub("modelers")
    assert caught.value.where == "MSQUANT_MIN_RATE"
