"""Questions of a task from files on this machine, in the format of the hub's data sets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msquant.checkpoint.json_file import decode_json
from msquant.checkpoint.regular_file import read_regular
from msquant.errors import CalibrationError

# The largest splits that tasks are scored on have some 50 MB.
_MAX_BYTES = 2**29

# A split by its other names.
_ALIASES = {"validation": ("validation", "val"), "val": ("val", "validation")}


@dataclass(frozen=True)
class Records:
    """Records of one split.

    Attributes:
        path: the file.
        rows: its records, all with the same fields.
        lines: of each, its line in the file, from 1.
    """

    path: Path
    rows: list[dict[str, Any]]
    lines: list[int]


class TaskFolder:
    """A folder of questions: `TASK.jsonl`, or `TASK/SPLIT.jsonl`, one JSON object a line.

    A group's file serves all of its tasks: each takes the records of which `subject` is its own.

    Args:
        folder: the folder.

    Raises:
        CalibrationError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser()
        if not self.folder.is_dir():
            raise CalibrationError(
                "there is no such folder", where=folder, remedy="name the folder of the tasks' .jsonl files"
            )
        self._read: dict[Path, Records] = {}

    def split(self, task: str, group: str, subject: str | None, split: str, *, asked: bool) -> Records | None:
        """The records of a task's split, if they are there.

        Args:
            task: its name.
            group: the group that was asked for, or the task itself.
            subject: the name of the task's part of the group's data set.
            split: its name in the hub's data set.
            asked: whether its questions are asked, which `TASK.jsonl` holds.

        Raises:
            CalibrationError: a record cannot be read, or has not the fields of the others.
        """
        for owner in dict.fromkeys((task, group)):
            for path in self.candidates(owner, split, asked=asked):
                if path.is_file():
                    return self._of_subject(path, None if owner == task else subject)
        return None

    def candidates(self, name: str, split: str, *, asked: bool) -> list[Path]:
        """Where the records may be, the best first."""
        paths = [self.folder / name / f"{alias}.jsonl" for alias in _ALIASES.get(split, (split,))]
        return [*paths, self.folder / f"{name}.jsonl"] if asked else paths

    def _of_subject(self, path: Path, subject: str | None) -> Records | None:
        if path not in self._read:
            self._read[path] = read_records(path)
        records = self._read[path]
        if subject is None:
            return records
        chosen = []
        for row, line in zip(records.rows, records.lines, strict=True):
            if "subject" not in row:
                raise CalibrationError(
                    "the record has no field 'subject', which says to which task of the group it belongs",
                    where=f"{path}:{line}",
                    remedy='add "subject" to every record, or write a file for each task',
                )
            if row["subject"] == subject:
                chosen.append((row, line))
        if not chosen:
            return None
        return Records(path, [row for row, _ in chosen], [line for _, line in chosen])


def read_records(path: Path) -> Records:
    """Read a .jsonl file. Raises CalibrationError at the first line that does not fit."""
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    try:
        text = read_regular(path, _MAX_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot be read ({error})", where=path) from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = decode_json(line.encode())
        except ValueError as error:
            raise _bad(path, number, f"is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise _bad(path, number, "is not a JSON object")
        if rows and row.keys() != rows[0].keys():
            differing = ", ".join(sorted(map(repr, row.keys() ^ rows[0].keys())))
            raise _bad(path, number, f"has not the fields of the first record: {differing}")
        rows.append(row)
        lines.append(number)
    if not rows:
        raise CalibrationError("holds no record", where=path, remedy="write one JSON object a line")
    return Records(path, rows, lines)


def _bad(path: Path, line: int, what: str) -> CalibrationError:
    return CalibrationError(
        f"the record {what}", where=f"{path}:{line}", remedy="write one JSON object a line, all alike"
    )
