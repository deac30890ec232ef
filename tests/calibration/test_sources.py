"""Calibration text from files, and the errors of files that hold none."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from msquant.calibration.rows import Template
from msquant.calibration.sources import Reading, load_texts, parse_source
from msquant.errors import CalibrationError


def _texts(path: Path, **options: Any) -> list[str]:
    (domain,) = load_texts(str(path), Reading(**options))
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
    assert _texts(path, template=Template("{prompt}")) == ["yes"]


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


def test_long_file_is_read_up_to_the_limit(tmp_path: Path) -> None:
    path = _json_lines(tmp_path / "a.jsonl", *({"text": "12345"} for _ in range(5)))
    assert _texts(path, characters=10) == ["12345", "12345"]


def test_long_text_file_is_read_by_paragraphs(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one two\n\nthree\n\n" * 50)
    assert _texts(path, characters=12) == ["one two", "three"]


def test_csv_and_tsv(tmp_path: Path) -> None:
    for name, separator in (("a.csv", ","), ("a.tsv", "\t")):
        (tmp_path / name).write_text(f"question{separator}answer\nwhy?{separator}NA\n")
        assert _texts(tmp_path / name) == ["why?\n\nNA"]


def test_compressed_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n'))
    assert _texts(path) == ["one"]


def test_a_folder_is_laid_out_like_a_repository(tmp_path: Path) -> None:
    for split in ("train", "test"):
        _json_lines(tmp_path / f"{split}.jsonl", {"text": split})
    (tmp_path / "load.py").write_text("raise SystemExit")
    assert _texts(tmp_path) == ["train"]
    assert load_texts(f"{tmp_path}:test")[0].texts == ["test"]
    with pytest.raises(CalibrationError, match="no split 'dev'; there is test, train"):
        load_texts(f"{tmp_path}:dev")


@pytest.mark.parametrize(
    ("word", "count", "weight"),
    [("builtin", None, 1), ("builtin=8", 8, 1), ("gsm8k=0.5", None, 0.5), ("self:4=25%", 4, 0.25)],
)
def test_shares_of_a_mix(word: str, count: int | None, weight: float) -> None:
    source = parse_source(word)
    assert (source.count, source.weight) == (count, weight)
    assert "=" not in source.word


def test_a_file_whose_name_looks_like_a_share(tmp_path: Path) -> None:
    path = tmp_path / "a.txt=3"
    path.write_text("x")
    assert parse_source(str(path)).count is None


@pytest.mark.parametrize(
    ("word", "what"),
    [
        ("builtin=0", "the count is 0"),
        ("builtin=0%", "the share is 0"),
        ("self:x", "'x' is no number of samples"),
        ("hf:gsm8k", "names no dataset"),
        ("hf:../x", "names no dataset"),
        ("modelers:a/b:c:d:e", "names no dataset"),
    ],
)
def test_a_word_that_names_no_source(word: str, what: str) -> None:
    with pytest.raises(CalibrationError, match=what) as caught:
        parse_source(word)
    assert caught.value.remedy


def test_a_builtin_domain() -> None:
    assert [domain.name for domain in load_texts("builtin:chinese")] == ["chinese"]
    with pytest.raises(CalibrationError, match="no domain 'poems'") as caught:
        load_texts("builtin:poems")
    assert "dialogue" in (caught.value.remedy or "")


def test_the_models_own_words_are_no_text_to_evaluate_on() -> None:
    with pytest.raises(CalibrationError, match="for calibration alone"):
        load_texts("self")


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
    with pytest.raises(CalibrationError, match="no such file, folder or dataset") as caught:
        load_texts(str(tmp_path / "none.txt"))
    assert caught.value.where == str(tmp_path / "none.txt")
    assert "builtin" in (caught.value.remedy or "")


@pytest.mark.parametrize("name", ["a.pdf", "a"])
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
    path = _json_lines(tmp_path / "a.jsonl", {"query": "one", "reply": "two"})
    with pytest.raises(
        CalibrationError, match="no column is known to hold text; the columns are 'query', 'reply'"
    ):
        load_texts(str(path))
    with pytest.raises(CalibrationError, match="no column 'body'"):
        load_texts(str(path), Reading(template=Template("{body}")))


def test_field_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pd.DataFrame({"text": [1, 2]}).to_parquet(path)
    with pytest.raises(CalibrationError, match="'text' holds int, not text") as caught:
        load_texts(str(path))
    assert caught.value.where == f"{path}, row 1"


def test_file_that_is_no_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(CalibrationError, match="cannot be read as parquet") as caught:
        load_texts(str(path))
    assert caught.value.where == str(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_file_in_another_encoding(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b'{"text": "fine"}\n' + '{"text": "Grüße"}\n'.encode("latin-1"))
    with pytest.raises(CalibrationError, match="not UTF-8 text") as caught:
        load_texts(str(path))
    assert caught.value.where == f"{path}, line 2"
