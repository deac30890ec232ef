"""Text that neither calibration nor any choice sees: what a promised accuracy is measured on.

Six domains of the same kinds as calibration's and evaluation's, which share no document with them:

- documentation: docstrings of modules of the standard library, technical English. PSF licence.
- code: modules of the standard library that no other text is made of, Python source. PSF licence.
- chinese, dialogue, fiction, math: written for msquant (`texts/README.md`), on other subjects.

They were fixed before the first measurement on them. Nothing in the code was chosen by them: neither a
threshold nor a grid nor a default.
"""

import ast
from collections.abc import Iterator, Sequence

from msquant.calibration.builtin import module_source, shipped_dialogue, shipped_text
from msquant.calibration.domains import Domain
from msquant.calibration.rows import RowText, Template
from msquant.calibration.sources import Reading, load_texts

CODE_MODULES = ("locale", "pstats", "smtplib", "uuid")
DOCUMENTED_MODULES = ("doctest", "imaplib", "logging", "optparse", "socketserver")

# Of each text, from its beginning: more is not looked at.
_MAX_CHARACTERS = 1_000_000


def verdict_domains(texts: Sequence[str] = (), template: str | None = None) -> list[Domain]:
    """The texts that a promise is judged by.

    Args:
        texts: sources of the user's own, as `parse_source` takes them; they take the place of the builtin
            ones.
        template: how a row of theirs becomes text, with columns in braces.

    Raises:
        CalibrationError: a source is missing or unreadable, or a part of the Python installation is.
    """
    if texts:
        rows = None if template is None else Template(template)
        reading = Reading(template=rows, characters=_MAX_CHARACTERS, offline=True)
        return [domain for text in texts for domain in load_texts(text, reading)]
    return [
        Domain("documentation", 1, [text for name in DOCUMENTED_MODULES for text in _docstrings(name)]),
        Domain("code", 1, [module_source(name) for name in CODE_MODULES]),
        Domain("chinese", 1, [shipped_text("verdict", "chinese.txt")]),
        Domain("dialogue", 1, shipped_dialogue("verdict", RowText())[0]),
        Domain("fiction", 1, [shipped_text("verdict", "fiction.txt")]),
        Domain("math", 1, [shipped_text("verdict", "mathematics.txt")]),
    ]


def require_texts(texts: Sequence[str]) -> None:
    """Refuse files that are not there, before any work. Raises CalibrationError."""
    from msquant.calibration.sources import parse_source

    for text in texts:
        source = parse_source(text)
        source.place.require(source.word)


def _docstrings(module: str) -> Iterator[str]:
    """The docstrings of a module of the standard library that are longer than a line, in its order."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(ast.parse(module_source(module))):
        if isinstance(node, documented) and "\n" in (text := ast.get_docstring(node) or ""):
            yield text
