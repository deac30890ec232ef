"""What the shared options stand for, and that a wrong one is refused before any work."""

import sys
from pathlib import Path

import pytest

from msquant.checkpoint import memory
from msquant.cli import console, options
from msquant.cli.app import main
from msquant.errors import MsquantError
from msquant.recipe.recipe import Recipe, default_folder

NEEDS_NO_NPU = pytest.mark.skipif(Path("/dev/davinci_manager").exists(), reason="an NPU is here")


def refused(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> object:
    monkeypatch.setattr(sys, "argv", ["msquant", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


def test_the_memory_budget_is_the_librarys_own() -> None:
    assert console.parse_bytes(options.MEMORY_BUDGET, "--memory-budget") == memory.MEMORY_BUDGET


@pytest.mark.parametrize(
    ("model", "output"),
    [
        ("smollm2-135m", "smollm2-135m-osl"),
        ("qwen2.5-7b", "qwen2.5-7b-osl"),
        ("recipes/mine.yaml", "mine-osl"),
        ("/data/Llama-3.1-8B/", "Llama-3.1-8B-osl"),
    ],
)
def test_the_output_is_named_after_the_model(model: str, output: str) -> None:
    assert str(default_folder(model, Recipe(model=model))) == output


@pytest.mark.parametrize(
    ("width", "left"), [(60, ["text", "KL", "noise"]), (26, ["text", "KL"]), (9, ["text"])]
)
def test_a_table_drops_columns_before_it_cuts_digits(
    width: int, left: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "stdout", console.PlainConsole(width=width))
    rows = [["dialogue", "0.1234", "1.5e-03"], ["all", "0.2", "2.5e-04"]]
    console.print_table("T", ["text", "KL", "noise"], rows, spare=("noise", "KL"))
    shown = capsys.readouterr().out
    assert [name for name in ("text", "KL", "noise") if name in shown] == left
    assert ("0.1234" in shown) == ("KL" in left)


@pytest.mark.parametrize("device", ["npu", pytest.param("ascend", marks=NEEDS_NO_NPU)])
@pytest.mark.parametrize(
    "command",
    [
        ["quantize", "smollm2-135m"],
        ["analyze", "smollm2-135m"],
        ["evaluate", "smollm2-135m"],
        ["compare", "smollm2-135m", "."],
        ["run", "--prompt", "I am"],
        ["serve"],
    ],
    ids=lambda command: command[0],
)
def test_a_device_that_is_not_there_is_refused_before_anything_is_fetched_or_written(
    command: list[str],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Where the model would be fetched to, and the result written: neither is made.
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert refused(monkeypatch, *command, "--device", device) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("error: --device: ")
    assert f"device '{device}'" in printed.err
    assert "try: " in printed.err
    assert printed.out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "option", "meant"),
    [
        (["quantize", "smollm2-135m", "--algo", "ols"], "--algo", "osl"),
        (["quantize", "smollm2-135m", "--format", "golden-stick,ascnd"], "--format", "ascend"),
        (["quantize", "smollm2-135m", "--device", "CPU"], "--device", "cpu"),
        (["run", "--prompt", "I am", "--engine", "vlm"], "--engine", "vllm"),
        (["serve", "--engine", "embeded"], "--engine", "embedded"),
        (["inspect", "folder", "--for", "vlm-ascend"], "--for", "vllm-ascend"),
        (["report", "folder", "--format", "markdwn"], "--format", "markdown"),
        (["download", "org/name", "--hub", "modeler"], "--hub", "modelers"),
        (["engine", "check", "vllm-cpus"], "engine", "vllm-cpu"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_a_wrong_choice_is_named_with_the_nearest(
    arguments: list[str],
    option: str,
    meant: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert refused(monkeypatch, *arguments) in (1, 2)
    printed = capsys.readouterr().err
    assert option in printed
    assert f"did you mean {meant}? use one of: " in printed


def test_a_terminal_breaks_sentences_between_words_and_a_pipe_not_at_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = "what was found in the folder is none of what the manifest says that it is made of"
    shown = {}
    for terminal in (True, False):
        for name in ("stdout", "stderr"):
            stream = console.PlainConsole(
                width=40, stderr=name == "stderr", force_terminal=terminal, color_system=None
            )
            monkeypatch.setattr(console, name, stream)
        console.print_error(MsquantError(sentence, where="folder", remedy=sentence))
        console.print_warning(sentence)
        console.print_note(sentence)
        console.print_line(sentence)
        console.print_table(sentence, ["a"], [["b"]], caption=sentence)
        printed = capsys.readouterr()
        shown[terminal] = printed.err + printed.out
    assert all(len(line) <= 40 for line in shown[True].splitlines())
    assert shown[True].split() == shown[False].split()
    assert shown[False].count(sentence) == 7


def test_a_command_to_copy_stays_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = console.PlainConsole(width=40, force_terminal=True, color_system=None)
    monkeypatch.setattr(console, "stdout", terminal)
    command = "msquant run --model /a/folder/with/a/long/name --prompt 'I am'"
    console.print_next(command)
    assert capsys.readouterr().out == f"Next: {command}\n"
