"""The chat of `msquant run`: on a real pseudo-terminal, and what the engine is asked."""

import contextlib
import json
import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from msquant.checkpoint.tokenizer import load_tokenizer
from msquant.cli import console
from msquant.cli import run as chat_module
from msquant.errors import EngineError
from msquant.inference.engine_protocol import Completion, OnText, Sampling


class Terminal:
    """`msquant run` on a pseudo-terminal of its own."""

    def __init__(self, *options: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "msquant", "run", *options],
            env=os.environ | {"TERM": "dumb", "COLUMNS": "100"},
            pass_fds=[slave],
            preexec_fn=lambda: os.login_tty(slave),
        )
        os.close(slave)
        self._shown = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """Read until a text is shown after what was read before; returns what came before it."""
        deadline = time.monotonic() + seconds
        while text not in self._shown:
            assert time.monotonic() < deadline, self._shown
            if select.select([self._master], [], [], 0.5)[0]:
                self._shown += os.read(self._master, 65536).decode(errors="replace")
        before, _, self._shown = self._shown.partition(text)
        return before

    def end(self) -> tuple[int, str]:
        """The exit code, and what was shown last."""
        # Reading ends with an OSError when the process has closed the terminal.
        with contextlib.suppress(OSError):
            while data := os.read(self._master, 65536):
                self._shown += data.decode(errors="replace")
        os.close(self._master)
        return self.process.wait(60), self._shown


@contextmanager
def terminal(*options: str) -> Iterator[Terminal]:
    opened = Terminal(*options)
    try:
        yield opened
    finally:
        opened.process.kill()


@pytest.mark.e2e
def test_a_chat(chat_model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(chat_model, tmp_path / "long")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 200_000}))
    with terminal("--model", str(folder), "--max-tokens", "100000") as chat:
        begun = chat.wait_for("Ctrl-D ends")
        assert f"{folder.name} answers, on the engine embedded: " in begun.replace("\r\n", " ")
        chat.wait_for("> ")
        chat.type("Who are you?\n")
        chat.wait_for("you?\r\n")
        time.sleep(0.5)
        chat.type("\x03")
        assert len(chat.wait_for("stopped").strip()) > 0, "some of the answer was shown"
        chat.wait_for("> ")
        # readline misses a Ctrl-C between its prompt and its wait for keys; nobody is quick enough for that.
        time.sleep(0.5)
        chat.type("half a line\x03")
        chat.wait_for("> ")
        chat.type("/nonsense\n")
        assert "there is no command /nonsense" in chat.wait_for("> ")
        chat.type("\x04")
        code, shown = chat.end()
        assert (code, shown.strip()) == (0, "")


@pytest.mark.e2e
def test_without_a_chat_template(tiny_llama: Path) -> None:
    with terminal("--model", str(tiny_llama)) as chat:
        code, shown = chat.end()
        assert code == 1
        assert "has no chat template" in shown


class Recorder:
    """An engine that remembers its prompts; it fails when one holds the word FAIL."""

    name = "recorder"

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def generate(
        self, prompts: Sequence[str], sampling: Sampling, on_text: OnText | None = None
    ) -> list[Completion]:
        self.prompts += prompts
        if "FAIL" in prompts[0]:
            raise EngineError("the engine died")
        assert on_text
        on_text(0, f"answer {len(self.prompts)}")
        return [Completion(prompts[0], f"answer {len(self.prompts)}", (1,), "stop", 1.0)]

    def close(self) -> None:
        pass


def converse(engine: Recorder, lines: list[str], chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "ask", lambda _: lines.pop(0) if lines else None)
    chat_module.chat(engine, load_tokenizer(chat_model), Sampling())


def test_the_history_goes_along(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Recorder()
    converse(engine, ["one", " ", "two", "/reset", "three", "/quit", "four"], chat_model, monkeypatch)
    first, second, third = engine.prompts
    assert first.count("user: ") == 1
    assert "user: one" in second
    assert "assistant: answer 1" in second
    assert "user: two" in second
    assert third == first.replace("one", "three")
    output = capsys.readouterr()
    assert output.out == "answer 1\nanswer 2\nanswer 3\n"
    assert output.err.count("1 tokens in 1.0 s, 1.0 tokens/s") == 3


def test_an_engine_that_dies(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Recorder()
    with pytest.raises(EngineError, match="the engine died"):
        converse(engine, ["one", "FAIL", "two", "/reset", "FAIL", "never"], chat_model, monkeypatch)
    assert "the engine died" in capsys.readouterr().err
    assert "one" not in engine.prompts[2], "after an error the chat begins anew"
    assert len(engine.prompts) == 4
