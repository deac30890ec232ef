"""What nobody expected: a file that tells its developers all, for a short message that names the file."""

import os
import platform
import re
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from msquant import __version__
from msquant.checkpoint.cache import cache_folder
from msquant.errors import MsquantError

FOLDER_NAME = "reports"

_PACKAGES = ("mindspore", "mindspore-gs", "transformers", "safetensors", "numpy", "typer", "rich")
# Variables and options whose values are nobody's business, and what tokens look like wherever they stand.
_SECRET = re.compile(r"token|key|secret|password|credential", re.IGNORECASE)
_TOKEN = re.compile(
    r"\b(?:hf_|sk-|gh[a-z]_|github_pat_)[A-Za-z0-9_-]{8,}|(?<=[Bb]earer )\S+|(?<=://)[^/@\s]+(?=@)"
)
_HIDDEN = "[hidden]"
_SHORTEST_SECRET = 6


def explain(error: BaseException, arguments: Sequence[str]) -> MsquantError:
    """Write the report of an error, and make of it what a person gets to read.

    Args:
        error: what came up to the top.
        arguments: of the command line; the values of options that hold tokens are left out of the report.

    Returns:
        An error that names the report, which is for its owner's eyes alone (mode 0600).
    """
    what = f"{type(error).__name__}: {without_secrets(str(error).strip().partition(chr(10))[0][:300])}"
    text = report(error, arguments)
    for folder in (cache_folder() / FOLDER_NAME, Path(tempfile.gettempdir())):
        try:
            path = _write(folder, text)
        except OSError:
            continue
        remedy = "report it with that file, which holds no token, or run the command again with --debug"
        return MsquantError(f"an error that msquant did not expect ({what})", where=path, remedy=remedy)
    return MsquantError(
        f"an error that msquant did not expect ({what})",
        remedy="run the command again with --debug, and report what it prints: no report could be written",
    )


def report(error: BaseException, arguments: Sequence[str]) -> str:
    """What its developers need to know of an error, without tokens: versions, command line, traceback."""
    lines = [
        f"msquant {__version__}, Python {platform.python_version()}, {platform.platform()}",
        *(f"{name} {_version(name)}" for name in _PACKAGES),
        f"arguments: {_shown(arguments)}",
        "",
        "".join(traceback.format_exception(error)),
    ]
    return without_secrets("\n".join(lines))


def without_secrets(text: str) -> str:
    """A text without tokens: those of this process's environment, and all that looks like one."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET and not os.path.exists(value):
            text = text.replace(value, _HIDDEN)
    return _TOKEN.sub(_HIDDEN, text)


def _shown(arguments: Sequence[str]) -> list[str]:
    shown: list[str] = []
    for argument in arguments:
        option, equals, _ = argument.partition("=")
        if equals and option.startswith("-") and _SECRET.search(option):
            shown.append(f"{option}={_HIDDEN}")
        elif shown and shown[-1].startswith("-") and "=" not in shown[-1] and _SECRET.search(shown[-1]):
            shown.append(_HIDDEN)
        else:
            shown.append(argument)
    return shown


def _version(package: str) -> str:
    # Imported here because every start of the command line would pay for it.
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "is not installed"


def _write(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    stem = time.strftime(f"msquant-%Y%m%d-%H%M%S-{os.getpid()}-")
    descriptor, name = tempfile.mkstemp(".txt", stem, folder)
    with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
    return Path(name)
