"""What is finished is remembered through kills; what does not fit is refused with what differs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from msquant.checkpoint.journal import JOURNAL_NAME, Journal
from msquant.errors import OutputError

IDENTITY: dict[str, Any] = {
    "recipe": {"model": "m", "quantization": {"smooth_alpha": [0.0, 0.05], "clip": True}, "seed": 1},
    "source": {"shards": {"a.safetensors": 10}, "sha256": "00"},
}


def journal_of_three(folder: Path) -> bytes:
    journal = Journal.open(folder, IDENTITY)
    for index in range(3):
        (folder / f"{index}.safetensors").write_bytes(bytes(index + 1))
        files = {f"{index}.safetensors": {"size": index + 1, "sha256": "ab"}}
        journal.append({"layer": index, "error": 0.1 + 0.2, "files": files, "text": "ü\r\n\x85"})
    return (folder / JOURNAL_NAME).read_bytes()


def layers(journal: Journal) -> list[int]:
    return [record["layer"] for record in journal.records]


def test_records_come_back(tmp_path: Path) -> None:
    journal_of_three(tmp_path)
    journal = Journal.open(tmp_path, IDENTITY)
    assert layers(journal) == [0, 1, 2]
    assert journal.records[1] == {
        "layer": 1,
        "error": 0.1 + 0.2,
        "files": {"1.safetensors": {"size": 2, "sha256": "ab"}},
        "text": "ü\r\n\x85",
    }
    journal.append({"layer": 3})
    assert layers(journal) == [0, 1, 2, 3]
    assert layers(Journal.open(tmp_path, {**IDENTITY})) == [0, 1, 2, 3]


def test_tuples_are_lists_and_order_does_not_matter(tmp_path: Path) -> None:
    Journal.open(tmp_path, {"a": (1, 2), "b": {"x": 1, "y": 2}})
    assert Journal.open(tmp_path, {"b": {"y": 2, "x": 1}, "a": [1, 2]}).records == []


def test_a_last_line_cut_anywhere_is_dropped_and_the_journal_goes_on(tmp_path: Path) -> None:
    data = journal_of_three(tmp_path)
    last = data.rindex(b"\n", 0, -1) + 1
    for end in range(last, len(data)):
        (tmp_path / JOURNAL_NAME).write_bytes(data[:end])
        journal = Journal.open(tmp_path, IDENTITY)
        assert layers(journal) == [0, 1]
        journal.append({"layer": 9})
        assert layers(Journal.open(tmp_path, IDENTITY)) == [0, 1, 9]
    (tmp_path / JOURNAL_NAME).write_bytes(data[:-10] + bytes(9) + b"\n")
    assert layers(Journal.open(tmp_path, IDENTITY)) == [0, 1]


def test_damage_before_the_last_line_is_an_error(tmp_path: Path) -> None:
    data = journal_of_three(tmp_path)
    lines = data.splitlines(keepends=True)
    for number in range(3):
        place = sum(map(len, lines[:number])) + len(lines[number]) // 2
        (tmp_path / JOURNAL_NAME).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(OutputError, match=f"line {number + 1} is damaged") as caught:
            Journal.open(tmp_path, IDENTITY)
        assert "--restart" in (caught.value.remedy or "")
    (tmp_path / JOURNAL_NAME).write_bytes(lines[0] + b"\n" + lines[1])
    with pytest.raises(OutputError, match="line 2 is damaged"):
        Journal.open(tmp_path, IDENTITY)


@pytest.mark.parametrize("content", [b"", b"\n", b"\x00", b"{}\n", b"[]\n", b"[" * 100_000])
def test_a_file_that_is_no_journal_is_an_error_and_restart_replaces_it(
    tmp_path: Path, content: bytes
) -> None:
    (tmp_path / JOURNAL_NAME).write_bytes(content)
    with pytest.raises(OutputError, match=r"damaged|empty"):
        Journal.open(tmp_path, IDENTITY)
    assert (tmp_path / JOURNAL_NAME).read_bytes() == content
    assert Journal.open(tmp_path, IDENTITY, restart=True).records == []
    assert Journal.open(tmp_path, IDENTITY).records == []


def test_a_journal_of_another_version_is_an_error(tmp_path: Path) -> None:
    import hashlib

    record = {"identity": IDENTITY, "version": 1}
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    line = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "record": record}
    (tmp_path / JOURNAL_NAME).write_text(json.dumps(line) + "\n")
    with pytest.raises(OutputError, match="another version of msquant"):
        Journal.open(tmp_path, IDENTITY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"recipe": {**IDENTITY["recipe"], "quantization": {"smooth_alpha": [0.5], "clip": True}}},
            r"recipe\.quantization\.smooth_alpha was \[0\.0, 0\.05\], is \[0\.5\]",
        ),
        ({"device": "cpu"}, 'device was not set, is "cpu"'),
        ({"source": 3}, "source was .*, is 3"),
        ({"recipe": {"model": "m", "quantization": {}, "seed": 1}}, "clip was true, is not set"),
        (
            {"recipe": {**IDENTITY["recipe"], "quantization": {"smooth_alpha": [0.0, 0.05], "clip": 1}}},
            r"recipe\.quantization\.clip was true, is 1\n",
        ),
        ({"recipe": {"a": 1, "b": 2}}, "; .*, and 2 more"),
    ],
)
def test_another_identity_is_refused_with_what_differs(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    before = journal_of_three(tmp_path)
    with pytest.raises(OutputError, match=message) as caught:
        Journal.open(tmp_path, IDENTITY | change)
    assert "--restart" in (caught.value.remedy or "")
    assert "--output" in (caught.value.remedy or "")
    assert (tmp_path / JOURNAL_NAME).read_bytes() == before
    assert Journal.open(tmp_path, IDENTITY | change, restart=True).records == []
    assert Journal.open(tmp_path, IDENTITY | change).records == []


def test_long_values_are_shortened(tmp_path: Path) -> None:
    Journal.open(tmp_path, {"a": list(range(1000))})
    with pytest.raises(OutputError) as caught:
        Journal.open(tmp_path, {"a": list(range(1, 1000))})
    assert len(caught.value.what) < 300


def test_a_listed_file_must_be_there_with_its_size(tmp_path: Path) -> None:
    journal_of_three(tmp_path)
    (tmp_path / "1.safetensors").write_bytes(b"")
    with pytest.raises(OutputError, match="has 0 bytes instead of 2") as caught:
        Journal.open(tmp_path, IDENTITY)
    assert caught.value.where == str(tmp_path / "1.safetensors")
    (tmp_path / "1.safetensors").unlink()
    with pytest.raises(OutputError, match="is missing") as caught:
        Journal.open(tmp_path, IDENTITY)
    assert "--restart" in (caught.value.remedy or "")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b"])
def test_a_listed_file_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    Journal.open(tmp_path, IDENTITY).append({"files": {name: {"size": 1, "sha256": ""}}})
    with pytest.raises(OutputError, match="not in its folder"):
        Journal.open(tmp_path, IDENTITY)


def test_a_full_disk_leaves_the_journal_as_it_was(small_disk: Path) -> None:
    journal_of_three(small_disk)
    journal = Journal.open(small_disk, IDENTITY)
    before = journal.path.read_bytes()
    with pytest.raises(OutputError, match="disk is full"):
        journal.append({"text": "x" * 1_000_000})
    assert journal.path.read_bytes() == before
    journal.append({"layer": 3})
    assert layers(Journal.open(small_disk, IDENTITY)) == [0, 1, 2, 3]


LIMITED = """
import resource, sys
from pathlib import Path
from msquant.checkpoint.journal import Journal
from msquant.errors import OutputError

journal = Journal.open(Path(sys.argv[1]), {"a": 1})
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    journal.append({"text": "x" * 5000})
except OutputError as error:
    print(error.what)
journal.append({"layer": 1})
"""


def test_a_write_that_is_cut_short_leaves_the_journal_as_it_was(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True)
    assert "File too large" in run.stdout
    assert layers(Journal.open(tmp_path, {"a": 1})) == [1]


def test_a_journal_that_vanished_is_not_begun_anew_by_append(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, IDENTITY)
    os.unlink(journal.path)
    with pytest.raises(OutputError, match="cannot be written"):
        journal.append({"layer": 1})
    assert not journal.path.exists()
