"""What an unfinished run has read and written is verified by hash, and named when it is another."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.checkpoint import run_files
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.journal import Journal
from msquant.checkpoint.run_files import RunFiles
from msquant.checkpoint.shard import Shard
from msquant.checkpoint.writer import file_sha256, write_shard
from msquant.errors import CheckpointError, StartOverError

FIRST, SECOND = (np.arange(64 + seed, dtype=np.float32) for seed in (1, 2))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_files, "_PIECE", 100)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of one shard with the tensors `first` and `second`."""
    folder = tmp_path / "source"
    folder.mkdir()
    write_shard(folder / "model.safetensors", {"first": FIRST, "second": SECOND})
    return folder


@pytest.fixture
def partial(source: Path, tmp_path: Path) -> Path:
    """What a run has left that has read `first` and written one shard."""
    folder = tmp_path / "partial"
    folder.mkdir()
    checkpoint = Checkpoint.open(source)
    journal = Journal.open(folder, {})
    with RunFiles(journal, checkpoint) as files:
        read = files.reading(["first"])
        sha256 = write_shard(folder / "out.safetensors", {"x": FIRST})
        size = (folder / "out.safetensors").stat().st_size
        journal.append({"files": {"out.safetensors": {"size": size, "sha256": sha256}}, "source": read()})
    return folder


def resume(partial: Path, source: Path) -> None:
    with RunFiles(Journal.open(partial, {}), Checkpoint.open(source)) as files:
        files.finish()
        assert files.unverified == 0
        files.check()


def change(path: Path, tensor: str, *, keep_time: bool = False) -> None:
    """Another value in a tensor, under the same header."""
    entry, status = Shard.open(path).entries[tensor], path.stat()
    with path.open("r+b") as file:
        file.seek(entry.offset + 120)
        byte = file.read(1)[0]
        file.seek(entry.offset + 120)
        file.write(bytes([byte ^ 1]))
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_the_record_says_what_was_read(partial: Path, source: Path) -> None:
    (record,) = Journal.open(partial, {}).records
    status = (source / "model.safetensors").stat()
    entry: dict[str, Any] = record["source"]["model.safetensors"]
    assert (entry["size"], entry["inode"]) == (status.st_size, status.st_ino)
    assert (entry["mtime_ns"], entry["ctime_ns"]) == (status.st_mtime_ns, status.st_ctime_ns)
    assert entry["tensors"] == ["first"]
    (partial / "bytes").write_bytes(FIRST.tobytes())
    assert entry["sha256"] == file_sha256(partial / "bytes")


def test_what_did_not_change_passes(partial: Path, source: Path) -> None:
    resume(partial, source)
    os.utime(source / "model.safetensors")
    resume(partial, source)
    change(source / "model.safetensors", "second")
    resume(partial, source)


@pytest.mark.parametrize("keep_time", [False, True])
def test_a_source_that_changed_where_it_was_read_is_named(
    keep_time: bool, partial: Path, source: Path
) -> None:
    change(source / "model.safetensors", "first", keep_time=keep_time)
    with pytest.raises(StartOverError, match="has read") as caught:
        resume(partial, source)
    assert caught.value.where == str(source / "model.safetensors")
    assert "put the file back" in (caught.value.remedy or "")
    change(source / "model.safetensors", "first")
    resume(partial, source)


def test_a_flipped_bit_in_what_was_written_is_found(partial: Path, source: Path) -> None:
    change(partial / "out.safetensors", "x", keep_time=True)
    with pytest.raises(StartOverError, match="sha256 is not the one in the journal") as caught:
        resume(partial, source)
    assert caught.value.where == str(partial / "out.safetensors")


def test_a_written_file_that_cannot_be_read_is_named(partial: Path, source: Path) -> None:
    journal = Journal.open(partial, {})
    (partial / "out.safetensors").unlink()
    with RunFiles(journal, Checkpoint.open(source)) as files, pytest.raises(StartOverError, match="No such"):
        files.finish()


def test_a_source_that_is_written_to_while_it_is_read_is_no_record(partial: Path, source: Path) -> None:
    checkpoint = Checkpoint.open(source)
    change(source / "model.safetensors", "second")
    with (
        RunFiles(Journal.open(partial, {}, restart=True), checkpoint) as files,
        pytest.raises(CheckpointError, match="written to since it was opened"),
    ):
        files.reading(["first"])()


def test_hashing_ends_with_the_run(partial: Path, source: Path) -> None:
    with RunFiles(Journal.open(partial, {}), Checkpoint.open(source)) as files:
        files._stop.set()
        with pytest.raises(run_files._Stopped):
            files.reading(["first"])()
    assert files.unverified == 0
