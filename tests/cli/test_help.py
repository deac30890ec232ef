"""`--help`, shell completion, and what is said of a wrong command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from msquant.cli import options
from msquant.cli.app import app, main
from tests.test_storage import write_result

ROOT = typer.main.get_command(app)
COMMANDS = sorted(ROOT.commands)  # type: ignore[attr-defined]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["msquant", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def test_commands_are_in_groups_and_no_summary_is_cut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, "-h") == 0
    shown = capsys.readouterr().out
    assert all(len(line) <= 80 for line in shown.splitlines())
    assert "..." not in shown.replace("[ARGS]...", "")
    sections = shown.split("\n\n")
    of = {name: text.split(":")[0] for name in COMMANDS for text in sections if f"\n  {name} " in text}
    assert sorted(of) == COMMANDS
    assert of["plan"] == of["recipes"] == "Quantize"
    assert of["serve"] == of["engine"] == "Run and serve"
    assert of["evaluate"] == of["report"] == "Judge"
    assert of["list"] == of["remove"] == of["download"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help_with_an_example_that_fits(
    command: str, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(monkeypatch, command, option) == 0
    shown = capsys.readouterr().out
    assert f"Usage: msquant {command} " in shown
    assert f"Example: msquant {command}" in shown
    assert all(len(line) <= 80 for line in shown.splitlines())


def test_choices_are_listed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from msquant.algorithms import algorithm_names
    from msquant.flows.engines import engine_names
    from msquant.formats.registry import format_names
    from msquant.formats.servers import SERVER_NAMES
    from msquant.models.device import DEVICES

    for command, names in (
        ("quantize", [*algorithm_names(), *format_names(), *DEVICES]),
        ("serve", [*engine_names(), *DEVICES]),
        ("inspect", SERVER_NAMES),
    ):
        run(monkeypatch, command, "-h")
        shown = capsys.readouterr().out
        assert [name for name in names if name not in shown] == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantise"], ["No such command 'quantise'", "'quantize'"]),
        (["quantize", "a", "--jsn"], ["--jsn", "--json"]),
        (["recipes", "shw"], ["'shw'", "'show'"]),
        (["run", "--max-tokens", "many"], ["--max-tokens", "valid integer"]),
        (["serve", "--port", "100000"], ["--port", "65535"]),
        (["quantize"], ["model"]),
    ],
)
def test_wrong_usage_is_named_and_json_under_json(
    arguments: list[str],
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert run(monkeypatch, *arguments, "--json") == 2
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["remedy"].startswith("see: msquant")
    for word in words:
        assert word in printed.err
        assert word in error["what"]


def complete(*words: str, **environment: str) -> list[str]:
    """What bash would be offered for the last of these words."""
    settings = {
        "_MSQUANT_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["msquant", *words]),
        "COMP_CWORD": str(len(words)),
    }
    command = [sys.executable, "-m", "msquant"]
    done = subprocess.run(
        command, env={**os.environ, **settings, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_the_shell_completes_commands_options_and_choices() -> None:
    assert complete("qua") == ["quantize"]
    assert complete("quantize", "smol") == ["smollm2-135m"]
    assert "--calibration" in complete("quantize", "smollm2-135m", "--cal")
    assert complete("quantize", "smollm2-135m", "--algo", "osl") == ["osl", "osl-golden-stick"]
    assert complete("remove", "re", MSQUANT_CACHE="/nowhere") == []


def test_what_the_shell_completes_is_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from msquant.checkpoint.results import remember_result

    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    remember_result(write_result(tmp_path / "first"))
    assert options.complete_stored("f") == options.complete_folders("f") == ["first"]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert options.complete_folders("") == [str(tmp_path / "first")]
    assert options.complete_formats("") == ["golden-stick", "compressed-tensors", "ascend"]
    assert options.complete_formats("ascend,") == ["ascend,golden-stick", "ascend,compressed-tensors"]
    assert options.complete_devices("a") == ["ascend"]
    assert options.complete_engines("vllm") == ["vllm", "vllm-mindspore"]
    assert options.complete_servers("vllm-a") == ["vllm-ascend"]


def test_completion_installs_for_a_shell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # The shell is found among the parents; with a single command bash would make way for it.
    shown = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m msquant --show-completion; exit $?"],
        capture_output=True,
        text=True,
        env=os.environ | {"HOME": str(tmp_path)},
    )
    assert shown.returncode == 0, shown.stderr
    assert "_MSQUANT_COMPLETE=complete_bash" in shown.stdout
