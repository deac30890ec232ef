"""Calibration text that comes with msquant or with Python, so that the default needs no download.

Six domains, so that the activation ranges are not those of one kind of text:

- documentation: every second entry of the standard library's `pydoc_data.topics`, technical English. The
  other entries are kept for evaluation; some repeat sections of these, so a paragraph that is in both is left
  out here. PSF licence.
- code: modules of the standard library, Python source. PSF licence.
- dialogue: conversations in English and Chinese, which go through the model's own chat template where it has
  one.
- chinese, fiction, math: prose of several kinds.

What is not the standard library's was written for msquant (`texts/README.md`). The standard library's text
differs a little from one 3.11 patch release to the next.
"""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from msquant.calibration.domains import SHIPPED, Domain
from msquant.calibration.rows import RowText
from msquant.errors import CalibrationError

CODE_MODULES = (
    "argparse",
    "ast",
    "csv",
    "dataclasses",
    "difflib",
    "fractions",
    "heapq",
    "inspect",
    "random",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "textwrap",
    "threading",
    "typing",
)

WEIGHTS = {
    "documentation": 4,
    "code": 3,
    "dialogue": 3,
    "chinese": 2,
    "fiction": 2,
    "math": 2,
}
"""Shares of the samples: sixteenths."""


def calibration_domains(rows: RowText | None = None) -> list[Domain]:
    """The builtin calibration text; see the module's docstring for what it is made of.

    Args:
        rows: makes texts of the conversations; plain text without it.

    Raises:
        CalibrationError: a part of the Python installation that holds some of it is missing, or the model's
            chat template refuses a conversation.
    """
    texts = {
        "documentation": _documentation(),
        "code": [module_source(name) for name in CODE_MODULES],
        "chinese": [shipped_text("calibration", "chinese.txt")],
        "fiction": [shipped_text("calibration", "fiction.txt")],
        "math": [shipped_text("calibration", "mathematics.txt")],
    }
    texts["dialogue"], rendered = shipped_dialogue("calibration", rows or RowText())
    return [
        Domain(name, weight, texts[name], rendered and name == "dialogue") for name, weight in WEIGHTS.items()
    ]


def evaluation_texts() -> list[str]:
    """The entries of `pydoc_data.topics` that builtin calibration does not use, sorted by name."""
    return _topics(first=1)


def shipped_text(use: str, name: str) -> str:
    """A text that comes with msquant, for `calibration` or for `evaluation`."""
    return (SHIPPED / use / name).read_text(encoding="utf-8")


def shipped_dialogue(use: str, rows: RowText) -> tuple[list[str], bool]:
    """The conversations that come with msquant as texts, and whether a chat template wrote them.

    Raises:
        CalibrationError: the chat template refuses one.
    """
    where = "builtin, dialogue"
    texts = [rows.text(row, number, where) for number, row in enumerate(_dialogue(use), 1)]
    return [text for text, _ in texts], any(rendered for _, rendered in texts)


def _dialogue(use: str) -> Iterator[dict[str, object]]:
    for line in shipped_text(use, "dialogue.jsonl").splitlines():
        yield json.loads(line)


def _documentation() -> list[str]:
    kept = {paragraph.strip() for text in evaluation_texts() for paragraph in text.split("\n\n")}
    texts = (
        "\n\n".join(paragraph for paragraph in text.split("\n\n") if paragraph.strip() not in kept)
        for text in _topics(first=0)
    )
    return [text for text in texts if text]


def _topics(first: int) -> list[str]:
    from pydoc_data.topics import topics

    return [topics[key] for key in sorted(topics)[first::2]]


def module_source(name: str) -> str:
    """The source of a module of the standard library. Raises CalibrationError if it is not installed."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise _missing(f"the source of the standard module {name!r}")
    return Path(spec.origin).read_text(encoding="utf-8")


def _missing(what: str) -> CalibrationError:
    return CalibrationError(
        f"{what} is not installed, so the builtin text is incomplete",
        where="builtin",
        remedy="install msquant again with its dependencies, or name another source",
    )
