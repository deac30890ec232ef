"""What a downloaded folder says of itself: where it is from, which files it has, and whether that is all."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from msquant.checkpoint.disk import writing
from msquant.checkpoint.file_names import STATE_FOLDER, path_problem
from msquant.checkpoint.json_file import MAX_BYTES, decode_json
from msquant.checkpoint.regular_file import read_regular
from msquant.checkpoint.writer import write_json
from msquant.errors import CheckpointError

MARKER_NAME = "download.json"

_VERSION = 1


@dataclass(frozen=True)
class MarkedFile:
    """One file of a download.

    Attributes:
        size: in bytes.
        algorithm: `sha256`, or `git-sha1` of a git blob.
        digest: in hexadecimal.
        mtime_ns: its modification time when it was verified; None until then.
    """

    size: int
    algorithm: str
    digest: str
    mtime_ns: int | None = None


@dataclass
class DownloadMarker:
    """The marker of a folder.

    Attributes:
        hub: `modelers` or `huggingface`.
        repository: `organisation/name`.
        revision: what was asked for, a branch, a tag or a commit.
        commit: what every file is from.
        complete: whether all files are there and verified.
        files: by their names in the folder.
        obsolete: files of earlier commits that are still there; removed when all of `files` are complete.
    """

    hub: str
    repository: str
    revision: str
    commit: str
    complete: bool = False
    files: dict[str, MarkedFile] = field(default_factory=dict)
    obsolete: dict[str, MarkedFile] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "DownloadMarker | None":
        """The marker of a folder; None if it has none.

        Raises:
            CheckpointError: it is damaged.
        """
        path = folder / STATE_FOLDER / MARKER_NAME
        try:
            raw = decode_json(read_regular(path, MAX_BYTES))
            if raw.pop("version") != _VERSION:
                raise ValueError("another version")
            files, obsolete = _files(raw.pop("files")), _files(raw.pop("obsolete", {}))
            return cls(**raw, files=files, obsolete=obsolete)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"the record of the download is damaged ({error})",
                where=path,
                remedy="run the same `msquant download` again: it verifies every file and mends the record",
            ) from error

    def write(self, folder: Path) -> None:
        """Write the marker whole or not at all. Raises OutputError if that fails."""
        raw: dict[str, Any] = {"version": _VERSION, **asdict(self)}
        path = folder / STATE_FOLDER / MARKER_NAME
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, raw)


def _files(raw: dict[str, Any]) -> dict[str, MarkedFile]:
    for name in raw:
        if problem := path_problem(name):
            raise ValueError(f"it lists {name!r}: {problem}")
    return {name: MarkedFile(**entry) for name, entry in raw.items()}


def require_complete(folder: Path) -> None:
    """Refuse a folder whose download is not complete; any other folder passes.

    Raises:
        CheckpointError: names how many files are missing, and the command that fetches them.
    """
    marker = DownloadMarker.read(folder)
    if marker is None or marker.complete:
        return
    missing = sum(entry.mtime_ns is None for entry in marker.files.values())
    raise CheckpointError(
        f"its download is not complete: {missing} of {len(marker.files)} files are missing",
        where=folder,
        remedy=f"finish it: msquant download {marker.repository} --hub {marker.hub} --output {folder}",
    )
