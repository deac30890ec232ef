"""What the documentation's site needs beside its pages: a hook of MkDocs, and the commands to list."""

import posixpath
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.pages import Page
from typer.main import get_command

from msquant.cli.app import app

FOLDERS = {"en": "", "zh-CN": "zh-CN"}
"""Where the site in each language is in the whole; both have the same pages."""


def on_post_page(output: str, *, page: Page, config: MkDocsConfig) -> str:
    """Let the choice of a language lead to the same page in that language.

    The theme's own links to other languages in the head are left out: its script would ask beside each for a
    sitemap, and there is none beside a page.
    """
    inside = FOLDERS["en" if config.theme["language"] == "en" else "zh-CN"]
    here = posixpath.dirname(posixpath.join(inside, page.url)) or "."

    def link(match: re.Match[str]) -> str:
        there = posixpath.join(FOLDERS[match["language"]], page.url)
        return f'href="{posixpath.relpath(there, here)}" hreflang="{match["language"]}"'

    output = re.sub(r'<link rel="alternate"[^>]*>', "", output)
    return re.sub(r'href="[^"]*" hreflang="(?P<language>[^"]+)"', link, output)


def _with_examples(command: Any) -> Any:
    """The same command with the examples in its help as a block of code, not as prose."""
    together = re.sub(r"(Example: .+)\n\n(?=Example: )", r"\1\n", command.help or "")
    command.help = re.sub(r"^Example: (.+)$", r"    \1", together, flags=re.MULTILINE)
    for inner in getattr(command, "commands", {}).values():
        _with_examples(inner)
    return command


command = _with_examples(get_command(app))
"""What mkdocs-click prints in reference/cli.md."""
