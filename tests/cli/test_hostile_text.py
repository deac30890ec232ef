"""Text that others wrote, through every command: a terminal obeys nothing of it, and no line is forged."""

import json
import re
import sys
from pathlib import Path

import pytest

from msquant.checkpoint.results import remember_result
from msquant.cli import console, layer_progress
from msquant.cli.app import app, main
from msquant.cli.console import PlainConsole, plain, plain_line
from msquant.errors import CheckpointError

# Title, clearing the screen, a colour in one character, the line's begin, direction, and a line of its own.
HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202everified\u2028[red]:x:\nValid: forged"
SHOWN = "\\x1b]0;owned\\x07\\x1b[2J\\x9b31m"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# What rich itself writes: colours, the cursor hidden and shown, a line erased, the line above.
OF_RICH = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\?25[lh]|\x1b\[2K|\x1b\[1A|\r(?=\x1b\[|\Z)")


@pytest.fixture(params=["plain", "rich"])
def terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Output to a file, and to a terminal that has colours."""
    if request.param == "rich":
        for name, is_stderr in (("stdout", False), ("stderr", True)):
            made = PlainConsole(stderr=is_stderr, force_terminal=True, color_system="truecolor", width=400)
            monkeypatch.setattr(console, name, made)
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A result whose every name is hostile: folder, architecture, tensors, manifest, recipe."""
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / HOSTILE
    folder.mkdir()
    header = json.dumps(
        {
            f"model.{HOSTILE}.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
            f"{HOSTILE}": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        }
    ).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(8)
    (folder / "model.safetensors").write_bytes(content)
    config = {"model_type": HOSTILE, "architectures": [HOSTILE], "torch_dtype": HOSTILE, HOSTILE: HOSTILE}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    manifest = {"recipe": {HOSTILE: HOSTILE}, "files": {HOSTILE: {"size": 1, "sha256": HOSTILE}}}
    (folder / "msquant.json").write_text(json.dumps(manifest))
    (folder / f"{HOSTILE}.yaml").write_text(f"model: {json.dumps(HOSTILE)}\n{json.dumps(HOSTILE)}: 1\n")
    remember_result(folder)
    return folder


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["msquant", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    code = caught.value.code
    return code if isinstance(code, int) else 0


def check(text: str) -> None:
    left = OF_RICH.sub("", text)
    assert OBEYED.findall(left) == []
    assert not [line for line in left.split("\n") if line.startswith("Valid: forged")]


MODEL, RECIPE, SELF = "{folder}", "{folder}/{name}.yaml", "{name}"
COMMANDS = {
    "inspect": ["inspect", MODEL],
    "inspect --json": ["inspect", MODEL, "--json"],
    "inspect --verify": ["inspect", MODEL, "--verify"],
    "quantize": ["quantize", MODEL, "--output", "{tmp}/out"],
    "quantize a recipe": ["quantize", RECIPE],
    "quantize --json": ["quantize", MODEL, "--output", "{tmp}/out", "--json"],
    "export": ["export", MODEL, "--format", "ascend"],
    "plan": ["plan", MODEL],
    "plan a recipe": ["plan", RECIPE],
    "analyze": ["analyze", MODEL],
    "run": ["run", "--model", MODEL, "--prompt", "I am"],
    "serve": ["serve", "--model", MODEL],
    "wrong usage": ["serve", MODEL],
    "evaluate": ["evaluate", MODEL],
    "compare": ["compare", MODEL, MODEL],
    "report": ["report", MODEL],
    "download": ["download", "org/{name}", "--output", "{tmp}/out"],
    "upload": ["upload", MODEL, "org/name", "--dry-run"],
    "doctor": ["doctor", MODEL],
    "list": ["list"],
    "list --json": ["list", "--json"],
    "remove": ["remove", SELF, "--yes"],
    "remove an unknown one": ["remove", MODEL + SELF, "--yes"],
    "recipes list": ["recipes", "list", SELF],
    "recipes show": ["recipes", "show", SELF],
    "recipes copy": ["recipes", "copy", "smollm2-135m", "{tmp}/nowhere{name}/a.yaml"],
    "recipes validate": ["recipes", "validate", RECIPE],
    "recipes validate --json": ["recipes", "validate", RECIPE, "--json"],
    "calibration show": ["calibration", "show", MODEL],
    "calibration show a source": ["calibration", "show", MODEL, "--calibration", SELF],
    "engine install": ["engine", "install", SELF],
    "engine check": ["engine", "check", SELF],
    "engine remove": ["engine", "remove", SELF],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command(
    command: str,
    folder: Path,
    tmp_path: Path,
    terminal: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    parts = {"folder": str(folder), "name": HOSTILE, "tmp": str(tmp_path)}
    code = run([argument.format(**parts) for argument in COMMANDS[command]], monkeypatch)
    output = capsys.readouterr()
    assert code in (0, 1, 2), output.err
    check(output.out)
    check(output.err)
    # A script gets it as it is, a person as Python writes it.
    shown = str(json.loads(output.out)) if "--json" in command else output.out + output.err
    assert r"\x1b]0;owned" in shown


def test_every_command_is_among_them() -> None:
    groups = {"recipes", "engine", "calibration"}
    known = {command.name for command in app.registered_commands}
    assert known <= {command.split()[0] for command in COMMANDS}
    assert {
        group.typer_instance.info.name for group in app.registered_groups if group.typer_instance
    } == groups


def test_the_filter() -> None:
    assert plain("a\tb\nc\x1b\x9b\u202e\ud800\x7f\r\u2028") == (
        "a\tb\nc\\x1b\\x9b\\u202e\\ud800\\x7f\\r\\u2028"
    )
    assert plain_line("a\tb\n") == "a\\tb\\n"
    whole = "Grüße, 世界 👩\u200d💻 שלום"
    assert plain_line(whole) == whole


def test_every_way_of_printing(terminal: str, capsys: pytest.CaptureFixture[str]) -> None:
    error = CheckpointError(HOSTILE, where=HOSTILE, remedy=HOSTILE)
    error.add_note(HOSTILE)
    console.print_line(HOSTILE)
    console.print_note(HOSTILE)
    console.print_table(HOSTILE, [HOSTILE], [[HOSTILE]], caption=HOSTILE)
    console.print_error(error)
    console.print_error(error, as_json=True)
    console.print_json_line({HOSTILE: HOSTILE})
    console.print_warning(HOSTILE)
    console.print_warning(HOSTILE, severe=True)
    try:
        raise ValueError(HOSTILE)
    except ValueError as raised:
        console.print_traceback(raised)
    with console.Working(HOSTILE) as working:
        working.update(HOSTILE)
    with layer_progress.LayerProgress() as progress:
        progress.stage(HOSTILE)
        progress.start(1)
        progress.step(HOSTILE)
        progress.advance(HOSTILE)
    output = capsys.readouterr()
    check(output.out)
    check(output.err.replace("ValueError: ", "").replace("\nValid: forged", ""))
    assert SHOWN in output.out
    assert "[red]:x:" in OF_RICH.sub("", output.out)


def test_a_models_text_is_filtered_for_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console.print_text(HOSTILE)
    assert capsys.readouterr().out == HOSTILE
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    console.print_text(HOSTILE)
    written = capsys.readouterr().out
    assert written == plain(HOSTILE)
    assert OBEYED.findall(written) == []
