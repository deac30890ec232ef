"""The names that files have, and which of those that come from outside are safe to have in a folder."""

import unicodedata

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

STATE_FOLDER = ".msquant"
"""Holds the marker, the lock and what is not complete yet, inside of a downloaded folder."""

SOURCE_RECORD = "msquant-source.json"
"""What the bundled model was converted from, in its folder in msquant's cache; written last."""

DOWNLOAD_LOCK = "lock"
"""Within `STATE_FOLDER`, locked while a process downloads into the folder."""

_MAX_NAME_BYTES = 255
_MAX_PATH_BYTES = 2000
_RESERVED = {STATE_FOLDER, ".git"}
# Unicode's control and format characters, and its separators of lines and paragraphs.
_UNSEEN = {"Cc", "Cf", "Zl", "Zp"}


def path_problem(path: str) -> str | None:
    """What is wrong with a path, its parts separated by `/`, as a file's in a folder; None if nothing."""
    parts = path.split("/")
    if not path or path.startswith("/"):
        return "it is absolute or empty"
    if any(unicodedata.category(character) in _UNSEEN for character in path):
        return "it holds control characters"
    if "\\" in path or (len(parts[0]) > 1 and parts[0][1] == ":"):
        return "it is a path of another system"
    if any(part in ("", ".", "..") for part in parts):
        return "it leaves its folder"
    if any(part.lower() in _RESERVED for part in parts):
        return "that place is reserved"
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        return "it is no valid text"
    if len(encoded) > _MAX_PATH_BYTES or any(len(part.encode()) > _MAX_NAME_BYTES for part in parts):
        return "it is too long"
    return None


def is_file_name(name: str) -> bool:
    """Whether a name is that of a file in a folder itself, and in none below."""
    return "/" not in name and path_problem(name) is None
