"""Prompts from files, good and bad."""

import io
import os
import sys
from pathlib import Path

import pytest

from msquant.errors import EngineError
from msquant.inference.prompt_file import read_prompts


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("p.txt", "I am\nToday is\n", ["I am", "Today is"]),
        ("p.txt", "\n  I am \r\n\n\nToday is", ["  I am ", "Today is"]),
        ("p.txt", "\ufeffGrüße\u2028all\n", ["Grüße\u2028all"]),
        ("p.txt", "[1, 2]\nfive\n", ["[1, 2]", "five"]),
        ("p.txt", "{not json}\n", ["{not json}"]),
        ("p.txt", '{"prompt": "two\\nlines", "id": 7}\n{"prompt": "b\u2028c"}\n', ["two\nlines", "b\u2028c"]),
        ("p.jsonl", '{"prompt": "I am"}\n\n', ["I am"]),
    ],
)
def test_lines(tmp_path: Path, name: str, data: str, expected: list[str]) -> None:
    path = tmp_path / name
    path.write_bytes(data.encode())
    assert read_prompts(path) == expected


@pytest.mark.parametrize(
    ("name", "data", "message", "line"),
    [
        ("p.txt", b"", "there is no prompt", ""),
        ("p.txt", b" \n\n", "there is no prompt", ""),
        ("p.txt", b"I am\xff\n", "byte 0xff at 4", ""),
        ("p.txt", b"PK\0\0", "binary file", ""),
        ("p.jsonl", b'"I am"\n', "has no text 'prompt'", ":1"),
        ("p.jsonl", b'{"prompt": "a"}\n\n{"text": "b"}\n', "has no text 'prompt'", ":3"),
        ("p.jsonl", b'{"prompt": ""}\n', "has no text 'prompt'", ":1"),
        ("p.txt", b'{"prompt": "a"}\nplain\n', "is not JSON", ":2"),
        ("p.jsonl", b"[" * 100_000, "is not JSON", ":1"),
    ],
    ids=range(9),
)
def test_bad_files(tmp_path: Path, name: str, data: bytes, message: str, line: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(EngineError, match=message) as caught:
        read_prompts(path)
    assert caught.value.where == f"{path}{line}"
    assert caught.value.remedy


def test_a_file_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("msquant.inference.prompt_file.MAX_BYTES", 1000)
    (tmp_path / "p.txt").symlink_to("/dev/zero")
    with pytest.raises(EngineError, match=r"more than 1\.0 kB") as caught:
        read_prompts(tmp_path / "p.txt")
    assert caught.value.where == str(tmp_path / "p.txt")


def test_unreadable(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent.txt"):
        with pytest.raises(EngineError, match="cannot be read") as caught:
            read_prompts(path)
        assert caught.value.where == str(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.touch(0)
    with pytest.raises(EngineError, match="Permission denied"):
        read_prompts(path)


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "I am"}\nx\n')))
    with pytest.raises(EngineError, match="is not JSON") as caught:
        read_prompts(Path("-"))
    assert caught.value.where == "standard input:2"
