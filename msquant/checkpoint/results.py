"""Which folders msquant wrote: `msquant run` takes the newest result, `msquant list` shows all."""

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from msquant.checkpoint.cache import cache_folder
from msquant.checkpoint.json_file import MAX_BYTES, decode_json
from msquant.checkpoint.regular_file import read_regular

RESULTS_NAME = "results.jsonl"
MANIFEST_NAME = "msquant.json"

Role = Literal["folder", "unfinished", "export", "download"]
"""What a folder was written as: a result, what an unfinished run keeps, a further format of a result, or a
download. Only a result is ever the newest one."""
_ROLES: tuple[Role, ...] = get_args(Role)


def is_result(folder: Path) -> bool:
    """Whether a folder holds a finished result: `config.json` and the manifest, which is written last."""
    return (folder / "config.json").is_file() and (folder / MANIFEST_NAME).is_file()


def remember_result(folder: Path) -> bool:
    """Note that a result was finished in `folder` now; see `remember_folder`."""
    return remember_folder(folder, "folder")


def remember_folder(folder: Path, role: Role) -> bool:
    """Note that `folder` was written, or begun, now.

    Returns:
        Whether it could be noted. A cache that cannot be written is no reason to fail a finished job.
    """
    line = json.dumps({role: str(folder.resolve()), "time": datetime.now(UTC).isoformat(timespec="seconds")})
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


def remembered_folders() -> list[Path]:
    """All folders that were remembered, in whatever role, the newest first; some may be there no more."""
    return list(dict.fromkeys(folder for _, folder in _records()))


def newest_result() -> Path | None:
    """The folder remembered last that still holds a finished result, or None."""
    return next((folder for role, folder in _records() if role == "folder" and is_result(folder)), None)


def _records() -> Iterator[tuple[Role, Path]]:
    """Role and folder of every line that makes sense, the newest first."""
    try:
        lines = read_regular(cache_folder() / RESULTS_NAME, MAX_BYTES).splitlines()
    except OSError:
        return
    for line in reversed(lines):
        try:
            record: dict[str, Any] = decode_json(line)
            yield from ((role, Path(record[role])) for role in _ROLES if role in record)
        except (ValueError, TypeError):
            continue
