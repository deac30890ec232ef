"""The ETA of a flow over decoder layers."""

import pytest

from msquant.cli import layer_progress


def test_a_flow_that_knows_what_is_left_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_progress.time, "monotonic", lambda: 100.0)
    with layer_progress.LayerProgress() as display:
        flow = display.flow(lambda record: "done")
        flow.layers(2, 0)
        flow.layer({"index": 0})
        flow.left(90)
        flow.layer({"index": 1})
        bar = display._progress.tasks[0]
        assert str(layer_progress._TimeLeft().render(bar)) == "90 s"
        bar.fields["until"] = None
        assert str(layer_progress._TimeLeft().render(bar)) != "90 s"
    lines = capsys.readouterr().err.splitlines()
    # Without it, by the layers that are done; with it, even after the last of them.
    assert lines == ["decoder layer 1/2  done  ETA 0 s", "decoder layer 2/2  done  ETA 90 s"]
