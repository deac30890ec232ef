"""Calibration text from files, and the errors of files that hold none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from msquant.calibration import sources
from msquant.calibration.sources import load_texts
from msquant.errors import CalibrationError


def _texts(path: Path, **options: str) -> list[str]:
    (domain,) = load_texts(str(path), **options)
    assert (domain.name, domain.weight) == (path.name, 1)
    return domain.texts


def _json_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("First line.\n\nÜmläut 中文.\n", encoding="utf-8")
    assert _texts(path) == ["First line.\n\nÜmläut 中文.\n"]


def test_json_lines(tmp_path: Path) -> None:
    path = _json_lines(
        tmp_path / "a.jsonl", {"text": "one", "id": 1}, {"text": " ", "id": 2}, {"text": "two", "id": 3}
    )
    assert _texts(path) == ["one", "two"]


def test_second_default_field(tmp_path: Path) -> None:
    assert _texts(_json_lines(tmp_path / "a.jsonl", {"content": "one"})) == ["one"]


def test_named_field(tmp_path: Path) -> None:
    path = _json_lines(tmp_path / "a.jsonl", {"text": "no", "prompt": "yes"})
    assert _texts(path, text_field="prompt") == ["yes"]


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pd.DataFrame({"id": [1, 2, 3], "text": ["one", None, "two"]}).to_parquet(path)
    assert _texts(path) == ["one", "two"]


def test_changed_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("one", "two"):
        path.write_text(text)
        os.utime(path, (1, 1))
        assert _texts(path) == [text]


def test_long_file_is_read_up_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_CHARACTERS", 10)
    path = _json_lines(tmp_path / "a.jsonl", *({"text": "12345"} for _ in range(5)))
    assert _texts(path) == ["12345", "12345"]


def test_no_network_and_no_output(tmp_path: Path) -> None:
    path = _json_lines(tmp_path / "a.jsonl", {"text": "one"})
    script = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise SystemExit('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from msquant.calibration.sources import load_texts\n"
        "assert load_texts(sys.argv[1])[0].texts == ['one']\n"
    )
    result = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no such file") as caught:
        load_texts(str(tmp_path / "none.txt"))
    assert caught.value.where == str(tmp_path / "none.txt")
    assert "builtin" in (caught.value.remedy or "")


@pytest.mark.parametrize("name", ["a.csv", "a"])
def test_unknown_extension(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("text")
    with pytest.raises(CalibrationError, match="cannot be read from a") as caught:
        load_texts(str(tmp_path / name))
    assert ".parquet" in (caught.value.remedy or "")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_empty_file(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(CalibrationError, match="holds no text"):
        load_texts(str(tmp_path / name))


@pytest.mark.parametrize("line", ['{"text": "cut', "[1, 2]", '"text"', "[" * 5000])
def test_bad_json_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "one"}}\n{line}\n{{"text": "two"}}\n')
    with pytest.raises(CalibrationError, match="not a JSON object") as caught:
        load_texts(str(path))
    assert caught.value.where == f"{path}, line 2"


def test_missing_field_names_those_there_are(tmp_path: Path) -> None:
    path = _json_lines(tmp_path / "a.jsonl", {"question": "one", "answer": "two"})
    with pytest.raises(CalibrationError, match="'text' or 'content'; the fields are 'question', 'answer'"):
        load_texts(str(path))
    with pytest.raises(CalibrationError, match="no field 'body'"):
        load_texts(str(path), text_field="body")


def test_field_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pd.DataFrame({"text": [1, 2]}).to_parquet(path)
    with pytest.raises(CalibrationError, match="'text' holds int, not text") as caught:
        load_texts(str(path))
    assert caught.value.where == f"{path}, record 1"


def test_file_that_is_no_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(CalibrationError, match=r"cannot be read as \.parquet") as caught:
        load_texts(str(path))
    assert caught.value.where == str(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_file_in_another_encoding(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes('{"text": "Grüße"}\n'.encode("latin-1"))
    with pytest.raises(CalibrationError, match="not UTF-8 text"):
        load_texts(str(path))
