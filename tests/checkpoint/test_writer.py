"""Atomic files, deterministic shards and full disks."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from msquant.checkpoint.checkpoint_reader import INDEX_NAME, Checkpoint
from msquant.checkpoint.disk import require_free_space
from msquant.checkpoint.writer import (
    shard_name,
    write_index,
    write_json,
    write_shard,
    write_text,
)
from msquant.errors import OutputError


def example() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    return {
        "b.weight": rng.integers(-128, 128, (5, 7), dtype=np.int8),
        "a.weight": rng.normal(size=(3, 4)).astype(ml_dtypes.bfloat16),
        "scalar": np.array(2.5, np.float32),
        "bias": rng.integers(-9, 9, 5, dtype=np.int32),
    }


def test_a_shard_is_read_by_the_library_with_the_returned_hash(tmp_path: Path) -> None:
    path = tmp_path / shard_name(1, 2)
    digest = write_shard(path, example())
    assert path.name == "model-00001-of-00002.safetensors"
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    for name, array in load_file(path).items():
        # By name: once MindSpore is loaded, the library makes the bfloat16 that MindSpore registers.
        assert array.dtype.name == example()[name].dtype.name
        np.testing.assert_array_equal(array, example()[name])
    with safe_open(path, "np") as file:
        assert file.metadata() == {"format": "pt"}
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_same_tensors_give_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    backwards = dict(reversed(example().items()))
    assert write_shard(tmp_path / "a", example()) == write_shard(tmp_path / "b", backwards)
    assert write_shard(tmp_path / "a", {**example(), "scalar": np.array(2.4, np.float32)}) != write_shard(
        tmp_path / "b", example()
    )


def test_arrays_that_are_not_contiguous_are_written_by_value(tmp_path: Path) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    write_shard(tmp_path / "model.safetensors", {"t": array.T, "strided": array[:, ::2]})
    checkpoint = Checkpoint.open(tmp_path)
    np.testing.assert_array_equal(checkpoint.raw("t"), array.T)
    np.testing.assert_array_equal(checkpoint.raw("strided"), array[:, ::2])


def test_an_index_leads_back_to_the_shards(tmp_path: Path) -> None:
    tensors = example()
    write_shard(tmp_path / shard_name(1, 1), tensors)
    digest = write_index(tmp_path, dict.fromkeys(tensors, shard_name(1, 1)), 123)
    assert digest == hashlib.sha256((tmp_path / INDEX_NAME).read_bytes()).hexdigest()
    assert json.loads((tmp_path / INDEX_NAME).read_text())["metadata"] == {"total_size": 123}
    assert Checkpoint.open(tmp_path).names() == sorted(tensors)


def test_files_get_the_permissions_that_the_umask_gives(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_shard(tmp_path / "s", example())
        write_text(tmp_path / "t", "ü")
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in "st"} == {0o644}
    assert (tmp_path / "t").read_text(encoding="utf-8") == "ü"


def test_json_refuses_nan_and_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


def test_a_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    for write in (lambda path: write_shard(path, example()), lambda path: write_text(path, "x")):
        with pytest.raises(OutputError) as caught:
            write(tmp_path / "nowhere" / "file")
        assert "nowhere" in str(caught.value.where)


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from msquant.checkpoint.writer import write_shard, write_text
from msquant.errors import OutputError

resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
folder = Path(sys.argv[1])
for write in (
    lambda: write_shard(folder / "model.safetensors", {"x": np.ones(1 << 20, np.int8)}),
    lambda: write_text(folder / "text", "x" * (1 << 20)),
):
    try:
        write()
    except OutputError as error:
        print(error.where, "|", error.what, "|", error.remedy)
"""


def test_a_write_that_the_system_cuts_short_leaves_the_old_file(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", example())
    before = (tmp_path / "model.safetensors").read_bytes()
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    lines = run.stdout.splitlines()
    assert len(lines) == 2
    assert all("1.0 MB" in line and "File too large" in line and "--output" in line for line in lines)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_full_disk_says_how_much_is_free_and_needed() -> None:
    # /dev/full answers every write with "no space left", on any Linux and without being root.
    from msquant.checkpoint.disk import writing

    with (
        pytest.raises(OutputError, match=r"disk is full \([\d.]+ \w+ free, 3 bytes needed"),
        writing(Path("/dev/full"), 3),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"abc")


def test_a_really_full_disk_leaves_nothing(small_disk: Path) -> None:
    with pytest.raises(OutputError, match=r"disk is full \([\d.]+ \w+ free, 1\.0 MB needed") as caught:
        write_shard(small_disk / "model.safetensors", {"x": np.ones(1 << 20, np.int8)})
    assert caught.value.where == str(small_disk / "model.safetensors")
    with pytest.raises(OutputError, match="disk is full"):
        write_text(small_disk / "text", "x" * (1 << 20))
    assert list(small_disk.iterdir()) == []


def test_free_space_is_asked_for_before_it_is_used(tmp_path: Path) -> None:
    require_free_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(OutputError, match=r"1\.0 EB are needed"):
        require_free_space(tmp_path / "not" / "yet", 10**18)


KILLED = """
import os, signal, sys
from pathlib import Path
import numpy as np
from msquant.checkpoint import writer

def kill(path):
    os.kill(os.getpid(), signal.SIGKILL)

writer.file_sha256 = kill
writer.write_shard(Path(sys.argv[1]), {"x": np.ones(10, np.int8)})
"""


def test_a_kill_before_the_rename_leaves_no_shard(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    run = subprocess.run([sys.executable, "-c", KILLED, str(path)])
    assert run.returncode == -signal.SIGKILL
    assert not path.exists()
