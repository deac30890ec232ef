"""Errors that nobody expected, as a person or a script meets them: no traceback, a report, exit code 70."""

import json
import stat
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from msquant.checkpoint.cache import cache_folder
from msquant.cli import unexpected
from msquant.cli.app import main
from msquant.cli.unexpected import FOLDER_NAME
from msquant.errors import MsquantError

TOKEN, PASSWORD = "hf_abcdefghijklmnopqrstuvwxyz", "pass-word-1"


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command within which something breaks that nobody has thought of."""

    def summarize(*_: object, **__: object) -> NoReturn:
        raise ZeroDivisionError(f"\x1b[2J of {TOKEN}\nat https://me:{PASSWORD}@proxy.example/")

    monkeypatch.setattr("msquant.formats.summary.summarize", summarize)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["msquant", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def reports() -> list[Path]:
    return sorted((cache_folder() / FOLDER_NAME).glob("*.txt"))


def test_a_short_message_names_the_report(
    broken: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = reports()
    assert run(monkeypatch, "inspect", "folder") == 70
    (path,) = set(reports()) - set(before)
    output = capsys.readouterr()
    assert output.out == ""
    assert "Traceback" not in output.err
    assert str(path) in output.err
    assert "an error that msquant did not expect (ZeroDivisionError: \\x1b[2J of [hidden])" in output.err
    assert output.err.count("\n") == 2


def test_the_report_tells_all_but_tokens(
    broken: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "word-of-no-form")
    before = reports()
    # Only what stands in the command line counts here; no command has such options.
    arguments = ["inspect", "word-of-no-form", "--api-key=abc123", "--token", "def456"]
    error = ZeroDivisionError(f"{TOKEN} {PASSWORD}")
    shown = unexpected.explain(error, arguments)
    (path,) = set(reports()) - set(before)
    assert shown.where == str(path)
    text = path.read_text()
    for part in ("msquant 0.1.0", "Python 3.11", "mindspore 2.7", "ZeroDivisionError", "'inspect'"):
        assert part in text
    for secret in (TOKEN, "abc123", "def456", "word-of-no-form"):
        assert secret not in text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600

    run(monkeypatch, "inspect", "folder")
    (path,) = set(reports()) - set(before) - {path}
    text = path.read_text()
    assert "Traceback (most recent call last)" in text
    assert "in summarize" in text
    assert TOKEN not in text
    assert f"me:{PASSWORD}" not in text


def test_json_gives_json(
    broken: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "inspect", "folder", "--json") == 70
    error = json.loads(capsys.readouterr().out)["error"]
    assert "ZeroDivisionError" in error["what"]
    assert Path(error["where"]).is_file()
    assert run(monkeypatch, "inspect", "--json", "--such") == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert "--such" in error["what"]
    assert error["remedy"].endswith("inspect --help")


@pytest.mark.parametrize("place", [0, 1, 2], ids=["first", "second", "last"])
def test_debug_shows_the_traceback(
    place: int, broken: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["inspect", "folder"]
    arguments.insert(place, "--debug")
    assert run(monkeypatch, *arguments) == 70
    written = capsys.readouterr().err
    assert "Traceback (most recent call last)" in written
    assert "\x1b" not in written
    assert "did not expect" in written


def test_what_is_expected_keeps_its_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = reports()
    assert run(monkeypatch, "inspect", "/nowhere") == 1
    assert "error: /nowhere: there is no such folder" in capsys.readouterr().err
    assert run(monkeypatch, "inspect") == 2
    assert "error: Missing argument" in capsys.readouterr().err
    assert reports() == before


def test_a_report_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSQUANT_CACHE", "/dev/null/cache")
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/dev/null/tmp")
    shown = unexpected.explain(ValueError("x"), [])
    assert isinstance(shown, MsquantError)
    assert shown.where is None
    assert shown.remedy is not None
    assert "no report could be written" in shown.remedy
