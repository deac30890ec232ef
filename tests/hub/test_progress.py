"""What a person is shown never goes back, whatever happens to the files."""

import itertools

import pytest

from msquant.cli.transfer_progress import describe
from msquant.hub.transfer_events import Meter, TransferState


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(steps: list[tuple[float, int, int]], total: int = 10_000) -> list[TransferState]:
    """The states after steps of seconds, bytes present and bytes moved."""
    clock = Clock()
    meter = Meter("downloading", total, 2, clock)
    states = []
    for seconds, present, moved in steps:
        clock.now += seconds
        states.append(meter.state(present, 0, moved))
    return states


def test_speed_and_time_left_of_a_steady_stream() -> None:
    state = run([(0.1, 100 * n, 100 * n) for n in range(1, 51)])[-1]
    assert state.bytes_per_second == pytest.approx(1000)
    assert state.seconds_left == pytest.approx(5)
    assert state.done_bytes == 5000


def test_a_file_that_is_begun_again_moves_nothing_back() -> None:
    before = [(0.1, 100 * n, 100 * n) for n in range(1, 51)]
    again = [(0.1, 1000 + 100 * n, 5000 + 100 * n) for n in range(1, 91)]
    states = run(before + again)
    for first, second in itertools.pairwise(states[5:]):
        assert second.done_bytes >= first.done_bytes
        assert first.seconds_left is not None
        assert second.seconds_left is not None
        assert second.seconds_left <= first.seconds_left + 1e-6
    assert states[-1].done_bytes == 10_000


def test_a_pause_before_another_attempt_is_no_slow_network() -> None:
    before = [(0.1, 100 * n, 100 * n) for n in range(1, 51)]
    states = run([*before, *[(0.1, 5000, 5000)] * 30, (0.1, 5100, 5100), (0.1, 5200, 5200)])
    times = [state.seconds_left for state in states[48:]]
    # Counted in full, the three seconds would make it 8.
    assert all(time is not None and time <= 6.5 for time in times)


def test_after_some_seconds_without_a_byte_no_time_is_promised() -> None:
    before = [(0.1, 100 * n, 100 * n) for n in range(1, 51)]
    state = run([*before, (6.0, 5000, 5000)])[-1]
    assert state.bytes_per_second is None
    assert state.seconds_left is None
    assert describe(state) == "5.0 kB of 10.0 kB, 0 of 2 files"


def test_a_line_for_people() -> None:
    state = TransferState("downloading", 12_300_000_000, 688_600_000_000, 4, 163, 115_200_000, 5870)
    assert describe(state) == "12.3 GB of 688.6 GB, 4 of 163 files, 115.2 MB/s, 98 min left"
