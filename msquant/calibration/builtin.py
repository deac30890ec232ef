"""Calibration text that is on every machine msquant is installed on, so that the default needs no download.

Five domains, so that the activation ranges are not those of one kind of text:

- documentation (1/2): every second entry of the standard library's `pydoc_data.topics`, technical English.
  The other entries are kept for evaluation; some repeat sections of these, so a paragraph that is in both is
  left out here.
- code (3/16): modules of the standard library, Python source.
- readme (3/16): the READMEs of mindspore and transformers, Markdown and HTML with links and shell commands.
- legal (1/16): the Apache License 2.0 in transformers and the Mulan PSL v2 in openmind-hub, formal English.
- chinese (1/16): the README of openmind-hub and the same license's Chinese text.

The packages are dependencies with pinned versions, and their text is read from their installed metadata
without importing them, so it is the same on every machine. The standard library's differs a little from one
3.11 patch release to the next.
"""

import importlib.metadata
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from msquant.errors import CalibrationError


@dataclass(frozen=True)
class Domain:
    """Texts of one kind.

    Attributes:
        name: of the kind, for messages and the manifest.
        weight: its share of the samples, relative to the other domains' weights.
        texts: the documents, in a fixed order.
    """

    name: str
    weight: float
    texts: list[str]


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


def calibration_domains() -> list[Domain]:
    """Return the builtin calibration text; see the module's docstring for what it is made of.

    Raises:
        CalibrationError: a part of the Python installation that holds some of it is missing.
    """
    mulan_chinese, _, mulan_english = _license("openmind-hub").partition("Mulan Permissive Software License")
    return [
        Domain("documentation", 8, _documentation()),
        Domain("code", 3, [module_source(name) for name in CODE_MODULES]),
        Domain("readme", 3, [_readme("mindspore"), _readme("transformers")]),
        Domain("legal", 1, [_license("transformers"), mulan_english]),
        Domain("chinese", 1, [_readme("openmind-hub"), mulan_chinese]),
    ]


def evaluation_texts() -> list[str]:
    """Return the entries of `pydoc_data.topics` that builtin calibration does not use, sorted by name."""
    return _topics(first=1)


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


def installed_file(package: str, name: str) -> str:
    """A text file of an installed package, read without importing it.

    Args:
        package: its name on PyPI.
        name: the file, from the folder that packages are installed into.

    Raises:
        CalibrationError: the package or the file is not installed.
    """
    path = Path(str(_distribution(package).locate_file(name)))
    if not path.is_file():
        raise _missing(f"{name} of the package {package}")
    return path.read_text(encoding="utf-8")


def _readme(package: str) -> str:
    text = _distribution(package).metadata.json.get("description")
    if not isinstance(text, str) or not text.strip():
        raise _missing(f"the README of the package {package}")
    return text


def _license(package: str) -> str:
    text = _distribution(package).read_text("licenses/LICENSE")
    if not text:
        raise _missing(f"the license of the package {package}")
    return text


def _distribution(package: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError as error:
        raise _missing(f"the package {package}") from error


def _missing(what: str) -> CalibrationError:
    return CalibrationError(
        f"{what} is not installed, so the builtin text is incomplete",
        where="builtin",
        remedy="Install msquant again with its dependencies, or give a .txt, .jsonl or .parquet file.",
    )
