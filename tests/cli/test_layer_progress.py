"""Progress over decoder layers: two lines that fit a terminal, and the time to the end of the whole run."""

import io

import pytest

from msquant.cli import console, layer_progress, transfer_progress
from msquant.cli.two_lines import State, fit, lines
from msquant.hub.transfer_events import TransferState

NOTE = "qkv 0.55 o 0.50 gate_up 0.60 down 0.50 shared_experts_gate_up 0.50 experts_down 0.45"


def shown(state: State | None, width: int) -> list[str]:
    """What a terminal of so many columns holds of a state; a line that wraps is two."""
    assert state is not None
    terminal = console.PlainConsole(
        width=width, file=io.StringIO(), force_terminal=True, color_system=None, record=True
    )
    terminal.print(lines(state, width))
    return terminal.export_text().splitlines()


def words(line: str) -> list[str]:
    return [word for word in line.split() if not word.startswith(("━", "╸"))]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to set."""
    now = [100.0]
    monkeypatch.setattr(layer_progress.time, "monotonic", lambda: now[0])
    return now


def test_a_flow_that_knows_what_is_left_says_so(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    with layer_progress.LayerProgress() as display:
        flow = display.flow(lambda record: "done")
        flow.layers(2, 0)
        flow.layer({"index": 0})
        flow.left(150)
        flow.layer({"index": 1})
    # Without it, by the layers that are done; with it, even after the last of them.
    assert capsys.readouterr().err.splitlines() == [
        "1 of 2 decoder layers  layer 0: done  ETA 0 s",
        "2 of 2 decoder layers  layer 1: done  ETA 2 min",
    ]


def test_a_continued_run_counts_what_is_done_and_goes_by_its_own_pace(
    capsys: pytest.CaptureFixture[str], clock: list[float]
) -> None:
    display = layer_progress.LayerProgress()
    flow = display.flow(lambda record: "ok")
    flow.layers(30, 10)
    clock[0] += 60
    flow.layer({"index": 10})
    assert capsys.readouterr().err.splitlines() == [
        "continuing: 10 of 30 decoder layers are done",
        "11 of 30 decoder layers  layer 10: ok  ETA 19 min",
    ]


def test_few_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    display = layer_progress.LayerProgress("answer", 3)
    display.start(10)
    for _ in range(10):
        display.advance("")
    counts = [line.split("  ")[0] for line in capsys.readouterr().err.splitlines()]
    assert counts == ["4 of 10 answers", "8 of 10 answers", "10 of 10 answers"]


@pytest.mark.parametrize("width", [80, 120, 40])
def test_two_lines_fit_the_terminal_in_every_phase(width: int, clock: list[float]) -> None:
    display = layer_progress.LayerProgress()
    flow = display.flow(lambda record: NOTE)
    assert display._state() is None
    seen = {}

    def look(name: str) -> None:
        clock[0] += 3_000
        seen[name] = both = shown(display._state(), width)
        assert len(both) <= 2
        assert all(len(line.rstrip()) <= width for line in both)
        whole = f"{display._state()}".replace("'", " ").replace(",", " , ").split()
        for word in words(" ".join(both).replace(",", " , ")):
            assert word == "…" or word in whole, word

    phases = ("start", "ends", "layers", "evaluation", "formats")
    flow.phases(phases)
    for phase in phases:
        flow.phase(phase)
        if phase == "start":
            flow.step("tokenizing 43% of 12.5 million characters")
        if phase == "layers":
            flow.layers(61, 0)
            flow.step("searching")
            look("first layer")
            flow.left(72_000)
            flow.layer({"index": 0})
            look("between layers")
            flow.step("quantizing expert 200/256")
        if phase == "evaluation":
            flow.step("evaluated decoder layer 60")
        look(phase)
    if width == 80:
        first, second = seen["layers"]
        assert first.startswith("phase 3 of 5, 1 of 61 decoder layers ━")
        assert first.rstrip().endswith("4 h 10 min gone, ETA 18 h 20 min")
        assert second.startswith("layer 1: quantizing expert 200/256; layer 0: qkv 0.55 o 0.50 ")
        assert second.rstrip().endswith("…")
        # Before the first layer is done, nobody can tell.
        assert "ETA" not in seen["first layer"][0]
        assert seen["first layer"][1].rstrip() == "layer 0: searching"
        assert seen["evaluation"][0].startswith("phase 4 of 5, evaluation ━")
        assert seen["evaluation"][1].rstrip() == "evaluated decoder layer 60"


@pytest.mark.parametrize("width", [80, 120])
def test_a_transfer_fits_the_terminal(width: int) -> None:
    display = transfer_progress.TransferProgress()
    assert display._state() is None
    display.update(TransferState("downloading", 312_300_000_000, 688_600_000_000, 74, 163, 115.2e6, 98 * 60))
    first, second = shown(display._state(), width)
    assert words(first) == ["downloading", "312.3", "GB", "of", "688.6", "GB,", "98", "min", "left"]
    assert "━" in first
    assert second.rstrip() == "74 of 163 files, 115.2 MB/s"


def test_a_line_ends_with_a_whole_word() -> None:
    assert fit("one two three", 13) == "one two three"
    assert fit("one two three", 12) == "one two …"
    assert fit("one two three", 8) == "one …"
    assert fit("unbreakable", 5) == "…"
    assert fit("量化 模型", 8) == "量化 …"
