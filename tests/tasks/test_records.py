"""Questions from files: where they are looked for, and what is refused."""

from pathlib import Path

import pytest

from msquant.errors import CalibrationError
from msquant.tasks.records import TaskFolder, read_records
from tests.tasks.questions import write_records


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"question": "a"}\n\n{"question": }\n', r"bad.jsonl:3: the record is not JSON"),
        ("[" * 100_000, r"bad.jsonl:1: the record is not JSON .*nested more than 64 deep"),
        ('{"question": "a"}\n["a"]\n', "bad.jsonl:2: the record is not a JSON object"),
        ('{"question": "a"}\n{"answer": "b"}\n', "bad.jsonl:2: .*'answer', 'question'"),
        ("\n", "holds no record"),
    ],
)
def test_bad_records(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(CalibrationError, match=message):
        read_records(path)


def test_no_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_records(path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no such folder"):
        TaskFolder(tmp_path / "nothing")


def test_a_group_is_divided_by_subject(tmp_path: Path) -> None:
    rows = [{"question": str(i), "subject": "ab"[i % 2]} for i in range(5)]
    write_records(tmp_path / "all.jsonl", rows)
    folder = TaskFolder(tmp_path)
    found = folder.split("all_b", "all", "b", "test", asked=True)
    assert found is not None
    assert [row["question"] for row in found.rows] == ["1", "3"]
    assert found.lines == [2, 4]
    assert folder.split("all_c", "all", "c", "test", asked=True) is None
    # The file of a split is none of another, and its own file comes before the group's.
    assert folder.split("all_b", "all", "b", "dev", asked=False) is None
    write_records(tmp_path / "all_b" / "validation.jsonl", [{"question": "own"}])
    found = folder.split("all_b", "all", "b", "val", asked=True)
    assert found is not None
    assert found.rows == [{"question": "own"}]


def test_a_group_without_subjects(tmp_path: Path) -> None:
    write_records(tmp_path / "all.jsonl", [{"question": "a"}])
    with pytest.raises(CalibrationError, match="no field 'subject'"):
        TaskFolder(tmp_path).split("all_b", "all", "b", "test", asked=True)
