"""What a run has finished, kept line by line beside its output, so that the next run continues there."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from msquant.checkpoint.disk import shown_sizes, writing
from msquant.checkpoint.file_names import is_file_name
from msquant.checkpoint.json_file import MAX_BYTES, decode_json
from msquant.checkpoint.regular_file import read_regular
from msquant.checkpoint.writer import write_text
from msquant.errors import OutputError

JOURNAL_NAME = "journal.jsonl"

_VERSION = 2
_START_OVER = "start over with --restart, or name another folder with --output"
_SHOWN = 3
_WIDTH = 100


class Journal:
    """A file of JSON lines: the identity of the run, then what is finished; each line vouches for itself.

    A line is `{"sha256": ..., "record": ...}`, the hash being over the record's canonical JSON. A last line
    that was cut off by a kill is dropped; damage anywhere else is an error.

    Attributes:
        path: the file.
        identity: what the run was started with, as JSON gives it back.
        records: what was finished, in order.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], records: list[dict[str, Any]]) -> None:
        self.path = path
        self.identity = identity
        self.records = records

    @classmethod
    def open(cls, folder: Path, identity: Mapping[str, Any], *, restart: bool = False) -> "Journal":
        """Continue the journal in a folder, or begin one.

        Args:
            folder: the partial output, whose lock the caller holds.
            identity: everything that the result depends on, as JSON values.
            restart: begin a new one whatever is there; `OutputFolder.clear` removes what it had written.

        Raises:
            OutputError: the journal is damaged, or of a run with another identity (names what differs); a
                file that it lists is missing or has another size; the disk cannot be written.
        """
        path = folder / JOURNAL_NAME
        wanted = json.loads(_canonical(identity))
        if restart or not path.exists():
            with writing(path):
                write_text(path, _line({"version": _VERSION, "identity": wanted}).decode())
            return cls(path, wanted, [])
        with writing(path):
            data = read_regular(path, MAX_BYTES)
        records = _parse(path, data)
        head = records.pop(0)
        if head.get("version") != _VERSION or not isinstance(head.get("identity"), dict):
            raise OutputError("was written by another version of msquant", where=path, remedy=_START_OVER)
        if differences := list(_differences(head["identity"], wanted)):
            more = f", and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise OutputError(
                "an unfinished run was started otherwise: " + "; ".join(differences[:_SHOWN]) + more,
                where=folder,
                remedy=_START_OVER,
            )
        for record in records:
            _check_files(folder, path, record)
        return cls(path, wanted, records)

    def append(self, record: Mapping[str, Any]) -> None:
        """Note that something is finished; when this returns, a power cut cannot undo it.

        Args:
            record: JSON values; `files` of it, if there, gives `{"size": bytes, "sha256": ...}` by the names
                of files in the journal's folder.

        Raises:
            OutputError: the disk is full or cannot be written; the journal is as it was.
        """
        line = _line(record)
        with writing(self.path, len(line)):
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                size = os.fstat(descriptor).st_size
                try:
                    done = 0
                    while done < len(line):
                        done += os.write(descriptor, line[done:])
                    os.fsync(descriptor)
                except BaseException:
                    os.ftruncate(descriptor, size)
                    raise
            finally:
                os.close(descriptor)
        self.records.append(json.loads(_canonical(record)))


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _line(record: Mapping[str, Any]) -> bytes:
    digest = hashlib.sha256(_canonical(record)).hexdigest()
    return _canonical({"sha256": digest, "record": record}) + b"\n"


def _parse(path: Path, data: bytes) -> list[dict[str, Any]]:
    """The records of all lines; a torn last one is cut off from the file."""
    lines = [line + b"\n" for line in data.split(b"\n")]
    # What follows the last line break is nothing, or the beginning of a line.
    lines[-1] = lines[-1][:-1]
    if not lines[-1]:
        lines.pop()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        record = _verified(line)
        if record is not None:
            records.append(record)
            continue
        # The first line was written with the file, so it is never torn.
        if number < len(lines) or number == 1:
            raise OutputError(f"line {number} is damaged", where=path, remedy=_START_OVER)
        with writing(path), path.open("r+b") as file:
            file.truncate(len(data) - len(line))
            os.fsync(file.fileno())
    if not records:
        raise OutputError("is empty", where=path, remedy=_START_OVER)
    return records


def _verified(line: bytes) -> dict[str, Any] | None:
    try:
        value = decode_json(line)
        record = value["record"]
        if line.endswith(b"\n") and value["sha256"] == hashlib.sha256(_canonical(record)).hexdigest():
            return record if isinstance(record, dict) else None
    except (ValueError, TypeError, KeyError):
        pass
    return None


def _check_files(folder: Path, path: Path, record: Mapping[str, Any]) -> None:
    for name, entry in record.get("files", {}).items():
        if not is_file_name(name):
            raise OutputError(f"lists {name!r}, which is not in its folder", where=path, remedy=_START_OVER)
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry["size"]:
            here, written = shown_sizes(size or 0, entry["size"])
            found = "is missing" if size is None else f"has {here} instead of {written}"
            raise OutputError(f"{found}, though an earlier run finished it", where=file, remedy=_START_OVER)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(before.keys() | now.keys()):
        name = f"{prefix}{key}"
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differences(old, new, f"{name}.")
        elif key not in before:
            yield f"{name} was not set, is {_shown(new)}"
        elif key not in now:
            yield f"{name} was {_shown(old)}, is not set"
        elif old != new or type(old) is not type(new):
            yield f"{name} was {_shown(old)}, is {_shown(new)}"


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 4]} ..."
