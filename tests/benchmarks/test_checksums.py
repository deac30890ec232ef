"""The table of checksums: what it holds, and that a change shows in it."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import checksums
from benchmarks.checksums import Plan


@pytest.fixture
def one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round to nearest, in two formats, so that the table takes seconds."""
    plan = Plan({"lm_head": "FLOAT"}, ("golden-stick", "ascend"))
    monkeypatch.setattr(checksums, "ALGORITHMS", {"rtn": "rtn"})
    monkeypatch.setattr(checksums, "MODELS", {"qwen2": ((plan,), {"layers": 1})})
    # `measure` sets it for good.
    monkeypatch.setenv("MSQUANT_CACHE", "")


@pytest.mark.usefixtures("one_plan")
def test_a_table_says_what_differs_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.json"
    monkeypatch.setattr(sys, "argv", ["checksums", "--output", str(table)])
    assert checksums.main() == 0
    known = json.loads(table.read_text())
    assert {name.rsplit("/", 1)[0] for name in known} == {
        "qwen2/source",
        "qwen2/rtn/0/golden-stick",
        "qwen2/rtn/0/ascend",
    }
    assert {len(value) for value in known.values()} == {64}
    assert len(set(known.values())) > 3

    monkeypatch.setattr(sys, "argv", ["checksums", "--compare", str(table)])
    assert checksums.main() == 0
    assert "all as before" in capsys.readouterr().out

    name = next(name for name in known if "ascend" in name)
    changed = known | {name: "0" * 64, "qwen2/rtn/0/ascend/gone": "1", "llama/source/other": "2"}
    table.write_text(json.dumps(changed))
    assert checksums.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == sorted([f"{name}: has other bytes", "qwen2/rtn/0/ascend/gone: is gone"])


def test_files_that_are_new_are_told_and_other_models_asked_for_are_not_known(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert checksums.differences({"a": "1"}, {"a": "1", "b": "2"}) == ["b: is new"]
    monkeypatch.setattr(sys, "argv", ["checksums", "gpt2"])
    with pytest.raises(SystemExit):
        checksums.main()
    assert "unknown: gpt2; known: llama, qwen2" in capsys.readouterr().err
