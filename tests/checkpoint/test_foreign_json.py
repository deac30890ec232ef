"""JSON and safetensors from outside: what is not as it should be is named, in little memory and time."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example
from hypothesis import strategies as st

from msquant.checkpoint.download_marker import MARKER_NAME, STATE_FOLDER, DownloadMarker
from msquant.checkpoint.journal import JOURNAL_NAME, Journal, _line
from msquant.checkpoint.json_file import MAX_BYTES, MAX_DEPTH, MAX_DIGITS, MAX_MARKS, decode_json, read_json
from msquant.checkpoint.shard import Shard
from msquant.checkpoint.weight_map import read_weight_map
from msquant.errors import CheckpointError
from msquant.reporting.manifest_data import read_manifest
from tests.fixtures.fuzzing import INTEGERS, TEXTS, changed, documents, fuzz, within_limits

MARKER = {
    "version": 1,
    "hub": "modelers",
    "repository": "org/name",
    "revision": "main",
    "commit": "c0ffee",
    "complete": True,
    "files": {"config.json": {"size": 2, "algorithm": "sha256", "digest": "00", "mtime_ns": 1}},
}
MANIFEST = {
    "msquant": "0.1.0",
    "recipe": {"model": "tiny", "quantization": {"algorithm": "osl"}},
    "layers": [{"index": 0, "error": 0.1, "groups": [{"name": "qkv", "alpha": 0.5}]}],
    "evaluation": {"overall": {"kl": 0.1, "perplexity": 3.0}},
    "files": {"config.json": {"size": 2, "sha256": "00"}},
}
IDENTITY = {"model": "tiny"}
HEADER = {"a.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}, "__metadata__": {"a": "b"}}


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


@fuzz(documents({"weight_map": {"a.weight": "model-1.safetensors", "b.weight": "model-2.safetensors"}}))
def test_an_index(tmp_path: Path, data: bytes) -> None:
    path = put(tmp_path / "model.safetensors.index.json", data)
    with within_limits():
        read_weight_map(path)


@fuzz(documents(MARKER))
def test_a_marker(tmp_path: Path, data: bytes) -> None:
    put(tmp_path / STATE_FOLDER / MARKER_NAME, data)
    with within_limits():
        DownloadMarker.read(tmp_path)


@fuzz(documents(MANIFEST))
def test_a_manifest(tmp_path: Path, data: bytes) -> None:
    put(tmp_path / "msquant.json", data)
    with within_limits():
        read_manifest(tmp_path)


RECORD = {"layer": 0, "files": {"a.safetensors": {"size": 1, "sha256": "00"}}}
# Lines that vouch for themselves reach what is behind the hash.
LINES = st.lists(changed(RECORD).map(lambda record: _line_of(record)) | documents(RECORD), max_size=3)


def _line_of(record: Any) -> bytes:
    try:
        return _line(record)
    except ValueError:
        return json.dumps(record).encode() + b"\n"


@fuzz(changed({"version": 1, "identity": IDENTITY}), LINES)
def test_a_journal(tmp_path: Path, head: Any, lines: list[bytes]) -> None:
    put(tmp_path / JOURNAL_NAME, _line_of(head) + b"".join(lines))
    with within_limits():
        Journal.open(tmp_path, IDENTITY)


ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "U8", "BF16", "F4"]),
        "shape": st.lists(INTEGERS, max_size=40),
        "data_offsets": st.lists(INTEGERS, max_size=3),
    }
)
HEADERS = documents(HEADER) | st.dictionaries(TEXTS, ENTRIES, max_size=3).map(
    lambda e: json.dumps(e).encode()
)


@fuzz(HEADERS, st.integers(-9, 9), st.integers(0, 40))
@example(json.dumps(HEADER).encode(), 0, 8)
def test_a_safetensors_header(tmp_path: Path, header: bytes, longer: int, data: int) -> None:
    length = max(0, len(header) + longer) % 2**64
    path = put(tmp_path / "model.safetensors", length.to_bytes(8, "little") + header + bytes(data))
    with within_limits():
        shard = Shard.open(path)
        for name in shard.entries:
            shard.read(name)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), f"more than {MAX_DEPTH} deep"),
        (b"[" * 100_000, f"more than {MAX_DEPTH} deep"),
        (b"9" * 5000, f"an integer of 5000 digits, at most {MAX_DIGITS}"),
        (b"[" + b"1," * MAX_MARKS + b"1]", f"at most {MAX_MARKS} are read"),
        (b" " * (MAX_BYTES + 1), f"at most {MAX_BYTES} are read"),
        (b'{"a": ["\\ud800"]}', "half of a character"),
        (b'{"\\ud800": 1}', "half of a character"),
    ],
    ids=["deep", "endlessly deep", "digits", "values", "bytes", "surrogate", "surrogate key"],
)
def test_what_is_beyond_a_limit_is_refused_by_it(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        decode_json(data)


def test_what_is_within_the_limits_is_read() -> None:
    assert decode_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    assert decode_json(b"-" + b"9" * MAX_DIGITS) == -(10**MAX_DIGITS - 1)
    assert decode_json(b'{"a": "\\ud83d\\ude00", "a": 2}') == {"a": 2}
    assert decode_json(b'"\\ud83d\\ude00"') == "\N{GRINNING FACE}"


@pytest.mark.parametrize("kind", ["device", "pipe", "loop", "folder", "socket"])
@pytest.mark.parametrize(
    "reader", [read_json, Shard.open, DownloadMarker.read], ids=["json", "shard", "marker"]
)
def test_only_a_file_is_read(kind: str, reader: Any, tmp_path: Path) -> None:
    """In a process whose memory and time end: before, a link to /dev/zero took all, a pipe hung."""
    folder = tmp_path / STATE_FOLDER
    folder.mkdir()
    path = folder / MARKER_NAME
    if kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    else:
        import socket

        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    with within_limits(), pytest.raises(CheckpointError) as caught:
        reader(tmp_path if reader == DownloadMarker.read else path)
    assert MARKER_NAME in str(caught.value.where)
