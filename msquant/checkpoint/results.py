"""Which folders msquant finished, newest last, so that `msquant run` finds them without being told."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

from msquant.checkpoint.cache import cache_folder
from msquant.checkpoint.json_file import MAX_BYTES, decode_json
from msquant.checkpoint.regular_file import read_regular

RESULTS_NAME = "results.jsonl"
MANIFEST_NAME = "msquant.json"


def is_result(folder: Path) -> bool:
    """Whether a folder holds a finished result: `config.json` and the manifest, which is written last."""
    return (folder / "config.json").is_file() and (folder / MANIFEST_NAME).is_file()


def remember_result(folder: Path) -> bool:
    """Note that `folder` was finished now.

    Returns:
        Whether it could be noted. A cache that cannot be written is no reason to fail a finished job.
    """
    line = json.dumps(
        {"folder": str(folder.resolve()), "time": datetime.now(UTC).isoformat(timespec="seconds")}
    )
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        # One write of one line with O_APPEND: two processes that finish together do not mix their lines.
        descriptor = os.open(cache_folder() / RESULTS_NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, (line + "\n").encode())
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True


def newest_result() -> Path | None:
    """The folder remembered last that still holds a finished result, or None."""
    try:
        lines = read_regular(cache_folder() / RESULTS_NAME, MAX_BYTES).splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            folder = Path(decode_json(line)["folder"])
        except (ValueError, TypeError, KeyError):
            continue
        if is_result(folder):
            return folder
    return None
