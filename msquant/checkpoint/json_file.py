"""JSON files of a checkpoint folder, read with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from msquant.errors import CheckpointError

MAX_BYTES = 256 * 2**20
"""The index of a 61-layer model with 256 experts a layer is about 10 MB; more than this is no such file."""


def read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        CheckpointError: the file is missing, unreadable, too large, not JSON or not an object.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CheckpointError(f"{size} bytes are too many for a JSON file of a checkpoint", where=path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            "the file is missing", where=path, remedy="copy or download the whole checkpoint folder again"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(
            f"cannot be read as JSON: {error}", where=path, remedy="copy or download the file again"
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"holds a {type(value).__name__} where an object is expected", where=path)
    return value
