"""What the documentation's site needs beside its pages: a hook of MkDocs, and the command line for its reference."""

import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page
from typer.main import get_command

from msquant.cli.app import app

ENGLISH, CHINESE = "en", "zh-CN"


def on_page_context(context: dict[str, Any], *, page: Page, config: MkDocsConfig, **_: Any) -> None:
    """Let the choice of a language lead to the same page in that language; both sites have the same pages."""
    inside_chinese = config.theme["language"] != ENGLISH
    for language in config.extra["alternate"]:
        folder = "" if language["lang"] == ENGLISH else f"{CHINESE}/"
        language["link"] = ("../" if inside_chinese else "") + folder + page.url


def _with_examples(command: Any) -> Any:
    """The same command with the examples in its help as blocks of code, which Markdown would run together."""
    command.help = re.sub(r"^Example: (.+)$", r"    \1", command.help or "", flags=re.MULTILINE)
    for inner in getattr(command, "commands", {}).values():
        _with_examples(inner)
    return command


command = _with_examples(get_command(app))
"""What mkdocs-click prints in reference/cli.md."""
