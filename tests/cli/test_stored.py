"""`msquant list` and `msquant remove` as a person and a script use them."""

import io
import json
import sys
from pathlib import Path

import pytest

from msquant.checkpoint.results import remember_result
from msquant.cli import console
from msquant.cli.app import main
from tests.test_storage import write_download, write_result

GIVEN_NAME = "DeepSeek-R1-Distill-Qwen-1.5B-W8A8"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A result in the current folder and a model in an otherwise empty cache."""
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    remember_result(write_result(tmp_path / "result"))
    write_download(tmp_path / "cache/models/org" / GIVEN_NAME, "config.json", complete=False)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["msquant", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def typed(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Somebody sits at the terminal and types this."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)


@pytest.mark.parametrize("width", [80, 120])
def test_the_list_fits_the_terminal(
    width: int, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "stdout", console.PlainConsole(width=width))
    assert run(monkeypatch, "list") == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= width for line in shown.splitlines())
    for words in ("result", "partial download", f"org/{GIVEN_NAME}", "kB", "kB in all"):
        assert words in shown
    assert "…" not in shown

    # Where not even a name fits, it goes on in the next line.
    monkeypatch.setattr(console, "stdout", console.PlainConsole(width=30))
    run(monkeypatch, "list")
    cells = [line.split("│")[1] for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert f"org/{GIVEN_NAME}" in "".join(map(str.strip, cells))


def test_a_script_reads_the_list(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "list", "--json") == 0
    items = {item["name"]: item for item in json.loads(capsys.readouterr().out)}
    assert items["result"]["kind"] == "result"
    assert items["result"]["scheme"] == "W8A8, FLOAT"
    assert items["result"]["folder"] == str(here / "result")
    assert items["result"]["bytes"] > 400_000
    assert "T" in items["result"]["changed"]
    assert items[f"org/{GIVEN_NAME}"]["kind"] == "partial download"


def test_nothing_is_removed_without_a_yes(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "remove", "result") == 1
    assert "--yes" in capsys.readouterr().err
    assert run(monkeypatch, "remove", "result", "--json") == 1
    assert "--yes" in json.loads(capsys.readouterr().out)["error"]["remedy"]
    typed(monkeypatch, "n\n")
    assert run(monkeypatch, "remove", "result") == 1
    asked = capsys.readouterr()
    assert f"result {here / 'result'}, " in asked.err
    assert asked.out == ""
    assert (here / "result" / "config.json").exists()

    typed(monkeypatch, "y\n")
    assert run(monkeypatch, "remove", "result") == 0
    assert "kB are free again" in capsys.readouterr().out
    assert not (here / "result").exists()


def test_a_script_removes_several(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # One that is unknown, and none goes.
    assert run(monkeypatch, "remove", "result", "resul", "--yes") == 1
    assert "did you mean result?" in capsys.readouterr().err
    assert (here / "result").is_dir()
    assert run(monkeypatch, "remove", "result", f"org/{GIVEN_NAME}", "--yes", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert [entry["name"] for entry in document["removed"]] == ["result", f"org/{GIVEN_NAME}"]
    assert document["bytes"] == sum(entry["bytes"] for entry in document["removed"]) > 600_000
    assert run(monkeypatch, "list") == 0
    assert "There is nothing yet" in capsys.readouterr().out
