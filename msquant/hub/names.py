"""Which names of a listing may become files here, and which of them a person wants."""

import os
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from msquant.checkpoint.file_names import STATE_FOLDER, path_problem
from msquant.errors import HubError, OutputError
from msquant.hub.listing import RemoteFile

STATE_FOLDERS = PARTIAL, HELD = "partial", "held"
"""Below the state folder: files on their way, and those that appear last."""

_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"
_HUB_ID = re.compile(rf"{_PART}/{_PART}")


def is_hub_id(name: str) -> bool:
    """Whether a name has the form `org/name` that hubs use, so that it cannot leave a cache folder."""
    forbidden = ".." in name or "--" in name or name.endswith(".git")
    return _HUB_ID.fullmatch(name) is not None and not forbidden


def check_names(files: Sequence[RemoteFile], where: str) -> None:
    """Refuse a listing with a name that could leave the target folder, or two that could meet.

    Args:
        files: all that is listed, wanted or not.
        where: the repository.

    Raises:
        HubError: names the file and what is wrong with its name.
    """
    names: set[str] = set()
    for file in files:
        problem = "it is listed twice" if file.path in names else path_problem(file.path)
        if problem:
            raise HubError(
                f"lists {file.path!r}, which is not safe to write: {problem}",
                where=where,
                remedy="do not use this repository, and tell its hub: a real model has no such names",
            )
        names.add(file.path)
    for name in sorted(names):
        for folder in PurePosixPath(name).parents:
            if str(folder) in names:
                raise HubError(f"lists {str(folder)!r} both as a file and as a folder", where=where)


def select_files(
    files: Sequence[RemoteFile], include: Sequence[str], exclude: Sequence[str], where: str
) -> list[RemoteFile]:
    """The files that match one of `include`, if there is any, and none of `exclude`.

    Args:
        files: of a snapshot.
        include: shell patterns over whole paths, as the hubs' own clients take them; `folder/` is all in it.
        exclude: likewise.
        where: the repository.

    Raises:
        HubError: a pattern matches no file, or nothing is left.
    """
    for option, patterns in (("--include", include), ("--exclude", exclude)):
        for pattern in patterns:
            if not any(_matches(file.path, [pattern]) for file in files):
                raise HubError(
                    f"{option} {pattern!r} matches none of its {len(files)} files",
                    where=where,
                    remedy="see their names: msquant download REPO --dry-run",
                )
    chosen = [
        file
        for file in files
        if (not include or _matches(file.path, include)) and not _matches(file.path, exclude)
    ]
    if not chosen:
        raise HubError(
            "no file is left to download" if files else "the repository is empty",
            where=where,
            remedy="check --include and --exclude" if files else "check the name and --revision",
        )
    return chosen


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path, f"{each}*" if each.endswith("/") else each) for each in patterns)


def check_folders(target: Path, names: Sequence[str]) -> None:
    """Refuse to write through symbolic links below the target, which may lead anywhere.

    Raises:
        OutputError: a folder on the way to one of the names is a link, or is a file.
    """
    own = [f"{STATE_FOLDER}/{name}/x" for name in STATE_FOLDERS]
    folders = {str(folder) for name in [*names, *own] for folder in PurePosixPath(name).parents}
    for folder in sorted(folders - {"."}):
        path = target / folder
        if path.is_symlink() or (os.path.lexists(path) and not path.is_dir()):
            raise OutputError(
                "a folder is to be written here, and this is a link or a file",
                where=path,
                remedy="remove it, or name another folder with --output",
            )
