"""Which of the published quantized models are in a layout that msquant reads, as pages of the documentation.

    python -m tools.published_layouts    # writes docs/published-layouts.md in both languages

Each layout that the pages name is made, and read or refused, by `tests/formats/test_published_layouts.py`.
"""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Part:
    """What a part of a name says of a folder.

    Attributes:
        key: how tests call it.
        pattern: the part, as a regular expression.
        reads: whether msquant reads it.
        alone: whether nothing else is said of a folder that is so.
        text: what it is, or why it is not read, by language.
    """

    key: str
    pattern: str
    reads: bool
    alone: bool
    text: dict[str, str]


@cache
def _content() -> dict[str, Any]:
    found = yaml.safe_load((_HERE / "published_layouts.yaml").read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def parts() -> list[Part]:
    """All of them, in order."""
    fields = ("key", "pattern", "reads", "alone")
    return [
        Part(*(one.get(name, False) for name in fields), {k: v for k, v in one.items() if k not in fields})
        for one in _content()["parts"]
    ]


def names() -> list[str]:
    """The repositories."""
    return (_HERE / "published_ascend.txt").read_text(encoding="utf-8").split()


def parts_of(name: str) -> list[Part]:
    """What the name of a repository says of its folder."""
    found = [part for part in parts() if re.search(part.pattern, name)]
    return next(([part] for part in found if part.alone), found)


def reads(name: str) -> bool:
    """Whether msquant reads everything that a name says."""
    found = parts_of(name)
    return bool(found) and all(part.reads for part in found)


def pages() -> dict[Path, str]:
    """Every page by its path."""
    made = {}
    for language, page in _content()["pages"].items():
        text = page["text"].format(count=len(names()), read=sum(map(reads, names())))
        for name in names():
            said = [part.text[language] for part in parts_of(name) if reads(name) or not part.reads]
            text += f"| {name} | {page['between'].join(said)} | {page['answers'][not reads(name)]} |\n"
        made[_HERE.parent / page["file"]] = text
    return made


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
