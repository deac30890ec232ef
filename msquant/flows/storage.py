"""What msquant keeps on this machine, how much room each takes, and how one of them is removed.

Models and datasets lie in msquant's cache, or where `msquant download --output` put them; results where
`msquant quantize` wrote them. The cache's record of written folders says where that is, and every folder says
itself, by its manifest or its marker, which files are its own: nothing else is ever removed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from msquant.checkpoint.cache import cache_folder
from msquant.checkpoint.download_marker import MARKER_NAME, DownloadMarker
from msquant.checkpoint.file_names import DOWNLOAD_LOCK, SOURCE_RECORD, STATE_FOLDER
from msquant.checkpoint.folder_files import manifest_files
from msquant.checkpoint.journal import JOURNAL_NAME
from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.lock import LockHeld, acquire_lock
from msquant.checkpoint.output_folder import LOCK_NAME, REPLACED_NAME, remove_path
from msquant.checkpoint.results import MANIFEST_NAME, remembered_folders
from msquant.errors import CheckpointError, ModelError, OutputError, choices
from msquant.inference.environments import SPECS, environment

Kind = Literal["model", "dataset", "result", "unfinished result", "partial download", "engine"]

_BLOCK = 512
"""Bytes in what `st_blocks` counts, whatever the file system (POSIX `sys/stat.h`)."""


@dataclass(frozen=True)
class StoredItem:
    """A folder that msquant made.

    Attributes:
        name: what `find_items` knows it by: of a download in the cache its repository, of anything else the
            folder's name, or its whole path where another one is called the same.
        kind: what it is.
        scheme: the words of the schemes that it is quantized in, `W8A8, FLOAT`; None where it is not.
        folder: absolute.
        nbytes: what its files take on the disk.
        changed: when it was finished, or last worked on, in seconds since the epoch.
    """

    name: str
    kind: Kind
    scheme: str | None
    folder: Path
    nbytes: int
    changed: float


def stored_items() -> list[StoredItem]:
    """All that msquant has made and that is still there, by kind and name; nothing behind a symlink."""
    cached = dict(_in_cache())
    others = {folder: folder.name for folder in remembered_folders() if folder not in cached}
    kinds: dict[Path, Kind] = {
        folder: kind for folder in [*cached, *others] if (kind := _kind(folder)) is not None
    }
    engines = [found for spec in SPECS.values() if (found := environment(spec)).state != "not installed"]
    names = {folder: name for folder, name in (cached | others).items() if folder in kinds}
    taken = [*names.values(), *(engine.spec.name for engine in engines)]
    items = [
        StoredItem(
            name=name if taken.count(name) == 1 else str(folder),
            kind=kinds[folder],
            scheme=_scheme(folder),
            folder=folder,
            nbytes=_disk_bytes(folder),
            changed=_changed(folder),
        )
        for folder, name in names.items()
    ]
    for engine in engines:
        nbytes = _disk_bytes(engine.path) if engine.nbytes is None else engine.nbytes
        changed = engine.path.stat().st_mtime
        items.append(StoredItem(engine.spec.name, "engine", None, engine.path, nbytes, changed))
    return sorted(items, key=lambda item: (item.kind, item.name))


def find_items(names: list[str]) -> list[StoredItem]:
    """The items of these names, or at these paths, each once.

    Raises:
        ModelError: msquant has made none of that name; names the nearest.
    """
    items = stored_items()
    found: dict[Path, StoredItem] = {}
    for name in names:
        # The last part is not resolved: a symlink to a folder is not that folder.
        given = Path(name).expanduser()
        path = given.parent.resolve() / given.name
        item = next((item for item in items if name == item.name), None)
        item = item or next((item for item in items if path == item.folder), None)
        if item is None:
            raise ModelError(
                "msquant has made nothing of that name, and removes nothing else",
                where=name,
                remedy=choices(name, [item.name for item in items]) if items else "see: msquant list",
            )
        found[item.folder] = item
    return list(found.values())


def remove_item(item: StoredItem) -> int:
    """Remove a folder that msquant made, and nothing else.

    An interrupted removal can be repeated: what makes a folder a model goes first, what makes it one of
    msquant's last.

    Args:
        item: from `find_items`.

    Returns:
        The bytes of disk that it took.

    Raises:
        OutputError: a file in it is none of msquant's, another process works in it, or it cannot be removed.
        EngineError: as `msquant.deploy.engine_install.remove`.
    """
    if item.kind == "engine":
        from msquant.deploy.engine_install import remove

        remove(SPECS[item.name])
        return item.nbytes
    with _removing(item.folder):
        if _kind(item.folder) is None:
            raise OutputError("is no longer what msquant made", where=item.folder, remedy="see: msquant list")
        with _alone(item.folder):
            _require_only_ours(item.folder)
            (item.folder / "config.json").unlink(missing_ok=True)
            last = item.folder / _identity(item.folder).parts[0]
            for path in list(item.folder.iterdir()):
                if path.name not in (last.name, LOCK_NAME):
                    remove_path(path)
            remove_path(last)
            (item.folder / LOCK_NAME).unlink(missing_ok=True)
            item.folder.rmdir()
        with suppress(OSError):
            # In the cache, the folder of an organisation or of all models, when this was the last in it.
            if _cache() in item.folder.parents:
                item.folder.parent.rmdir()
    return item.nbytes


@contextmanager
def _removing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot be removed: {error.strerror or error}",
            where=error.filename or folder,
            remedy="check the rights of the folder, and run the same command again",
        ) from error


def _in_cache() -> Iterator[tuple[Path, str]]:
    """The folders of the cache that may hold a model or a dataset, and their names."""
    for room in ("models", "datasets"):
        for first in _folders(_cache() / room):
            yield first, first.name
            yield from ((second, f"{first.name}/{second.name}") for second in _folders(first))


def _folders(parent: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(parent) if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _kind(folder: Path) -> Kind | None:
    """What a folder is by what it says of itself; None for one that is not msquant's, or behind a symlink."""
    if not folder.is_dir() or folder.resolve() != folder:
        return None
    if (folder / STATE_FOLDER / MARKER_NAME).is_file():
        try:
            marker = DownloadMarker.read(folder)
        except CheckpointError:
            return "partial download"
        if marker is None or not marker.complete:
            return "partial download"
        return "model" if "config.json" in marker.files else "dataset"
    if folder.name.endswith(".partial"):
        return "unfinished result" if (folder / JOURNAL_NAME).is_file() else None
    if (folder / MANIFEST_NAME).is_file():
        return "result"
    bundled = (folder / SOURCE_RECORD).is_file() and folder.parent == _cache() / "models"
    return "model" if bundled else None


def _cache() -> Path:
    return cache_folder().resolve()


def _identity(folder: Path) -> Path:
    """The file by which a folder is msquant's, within it."""
    names = [f"{STATE_FOLDER}/{MARKER_NAME}", MANIFEST_NAME, SOURCE_RECORD]
    # A finished result may hold one still, where the run was killed before it cleared up.
    if folder.name.endswith(".partial"):
        names.insert(1, JOURNAL_NAME)
    return next(Path(name) for name in names if (folder / name).is_file())


def _scheme(folder: Path) -> str | None:
    """The schemes that a manifest's recipe names, the one of most linears first."""
    try:
        schemes = read_json(folder / MANIFEST_NAME)["recipe"]["quantization"]["schemes"]
        words = [str(word) for rule in reversed(schemes) for word in rule.values()]
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return None
    return ", ".join(dict.fromkeys(words)) or None


def _changed(folder: Path) -> float:
    with suppress(OSError, StopIteration):
        return (folder / _identity(folder)).stat().st_mtime
    return 0.0


def _disk_bytes(folder: Path) -> int:
    """What the files of a folder take, each once however many names it has; a sparse file what it holds."""
    seen: dict[tuple[int, int], int] = {}
    for parent, _, files in os.walk(folder):
        for name in files:
            with suppress(OSError):
                state = os.lstat(os.path.join(parent, name))
                seen[state.st_dev, state.st_ino] = state.st_blocks * _BLOCK
    return sum(seen.values())


def _require_only_ours(folder: Path) -> None:
    """Refuse a folder with a file that neither its marker nor its manifest lists. Raises OutputError."""
    identity = _identity(folder)
    if identity.name == JOURNAL_NAME and os.path.lexists(folder / REPLACED_NAME):
        raise OutputError(
            "holds the earlier result that a killed --overwrite was replacing, so the folder stays",
            where=folder / REPLACED_NAME,
            remedy="run the same `msquant quantize` again, which puts it back, or move it away",
        )
    if identity.name in (JOURNAL_NAME, SOURCE_RECORD):
        # Folders that only msquant writes into, and clears itself when it makes them anew.
        return
    ours = {MANIFEST_NAME, LOCK_NAME, JOURNAL_NAME}
    with suppress(CheckpointError):
        ours |= manifest_files(folder) or set()
    if (marker := DownloadMarker.read(folder)) is not None:
        ours = {*marker.files, *marker.obsolete}
    for parent, folders, files in os.walk(folder):
        inner = Path(parent).relative_to(folder)
        if inner.parts[:1] in ((STATE_FOLDER,), (REPLACED_NAME,)):
            continue
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        for name in [*files, *links]:
            if (inner / name).as_posix() not in ours:
                raise OutputError(
                    "is none of the files that msquant put into this folder, so the folder stays",
                    where=folder / inner / name,
                    remedy="move it elsewhere, or remove it yourself, and run the same command again",
                )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes of msquant out of an unfinished folder. Raises OutputError if one is in it."""
    locks = {JOURNAL_NAME: LOCK_NAME, MARKER_NAME: f"{STATE_FOLDER}/{DOWNLOAD_LOCK}"}
    lock = locks.get(_identity(folder).name)
    if lock is None:
        yield
        return
    try:
        descriptor = acquire_lock(folder / lock)
    except LockHeld as held:
        raise OutputError(
            f"{held.who} is writing it now", where=folder, remedy="wait for it, or stop it first"
        ) from None
    try:
        yield
    finally:
        os.close(descriptor)
