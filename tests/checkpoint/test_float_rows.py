"""Rows and blocks of rows of stored tensors, and shards that change under a run."""

import os
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.disk import shown_sizes
from msquant.checkpoint.writer import write_shard
from msquant.errors import CheckpointError
from tests.checkpoint.folders import write_folder

DTYPES = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16]

READERS: list[Callable[[Checkpoint, str], object]] = [
    lambda checkpoint, name: checkpoint.tensor(name),
    lambda checkpoint, name: checkpoint.rows(name, np.array([0, 700])),
    lambda checkpoint, name: list(checkpoint.row_blocks(name, 4000)),
    lambda checkpoint, name: checkpoint.raw(name),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7,), (1000, 3), (5, 4, 3), (9, 300_000)])
def test_rows_are_those_of_the_whole(tmp_path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32).astype(dtype)
    checkpoint = Checkpoint.open(write_folder(tmp_path / "m", {"x": values}))
    expected = values.astype(np.float32)
    np.testing.assert_array_equal(checkpoint.tensor("x"), expected)
    for indices in ([], [0], [3, 1, 2, 2], [4, 0, 3], [[0, 1], [4, 3]], [len(expected) - 1]):
        index = np.array(indices, np.int32)
        found = checkpoint.rows("x", index)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected[index])
    blocks = list(checkpoint.row_blocks("x", 50))
    assert all(block.nbytes <= 50 or len(block) == 1 for _, block in blocks)
    assert [start for start, _ in blocks] == list(np.cumsum([0, *(len(b) for _, b in blocks[:-1])]))
    np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), expected)


def test_only_the_rows_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(1000 * 100, dtype=np.float32).reshape(1000, 100)
    checkpoint = Checkpoint.open(write_folder(tmp_path / "m", {"x": values}))
    read: list[int] = []
    preadv = os.preadv

    def count(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        read.append(len(buffers[0]))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", count)
    checkpoint.rows("x", np.array([5, 900, 6, 5, 7]))
    assert read == [1200, 400]


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    tensors = {"s": np.array(2.5, np.float32), "no_rows": np.zeros((0, 4), np.float16)}
    tensors["no_columns"] = np.zeros((3, 0), np.float32)
    checkpoint = Checkpoint.open(write_folder(tmp_path / "m", tensors))
    assert checkpoint.tensor("s").shape == ()
    assert [(start, block.tolist()) for start, block in checkpoint.row_blocks("s", 1)] == [(0, [2.5])]
    assert checkpoint.tensor("no_rows").shape == (0, 4)
    assert list(checkpoint.row_blocks("no_rows", 100)) == []
    assert checkpoint.tensor("no_columns").shape == (3, 0)
    assert checkpoint.rows("no_columns", np.array([2])).shape == (1, 0)


@pytest.mark.parametrize("index", [-1, 5, 2**40])
def test_a_row_that_is_not_there_is_named(tmp_path: Path, index: int) -> None:
    checkpoint = Checkpoint.open(write_folder(tmp_path / "m", {"x": np.ones((5, 2), np.float32)}))
    with pytest.raises(CheckpointError, match=f"row {index} of x is asked for, which has 5 rows"):
        checkpoint.rows("x", np.array([0, index, 1]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_are_not_finite_are_counted_in_what_was_read(
    tmp_path: Path, bad: float, dtype: type
) -> None:
    values = np.ones((800, 2000), dtype)
    values[[3, 790], [1, 5]] = bad
    checkpoint = Checkpoint.open(write_folder(tmp_path / "m", {"x": values}))
    with pytest.raises(CheckpointError, match="x holds NaN or infinity in 2 of 1600000 places"):
        checkpoint.tensor("x")
    with pytest.raises(CheckpointError, match="x holds NaN or infinity in 1 of 4000 places"):
        checkpoint.rows("x", np.array([3, 4]))
    assert checkpoint.rows("x", np.array([2, 4])).shape == (2, 2000)
    blocks = checkpoint.row_blocks("x", 3 * 2000 * 4)
    next(blocks)
    with pytest.raises(CheckpointError, match="NaN or infinity in 1 of 6000"):
        next(blocks)


def test_a_float64_that_overflows_is_not_finite(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_folder(tmp_path / "m", {"x": np.array([1e300])}))
    with pytest.raises(CheckpointError, match="NaN or infinity in 1 of 1"):
        checkpoint.tensor("x")


@pytest.fixture(params=[np.float32, ml_dtypes.float8_e4m3fn])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    """A checkpoint whose shard may now be changed."""
    tensors = {"a": np.ones((800, 100), request.param), "b": np.ones((800, 100), request.param)}
    if request.param is not np.float32:
        tensors |= {f"{name}_scale_inv": np.ones((7, 1), np.float32) for name in "ab"}
    return Checkpoint.open(write_folder(tmp_path / "m", tensors))


@pytest.mark.parametrize("read", READERS)
def test_a_shard_truncated_in_the_middle_of_a_run_is_named(
    opened: Checkpoint, read: Callable[[Checkpoint, str], object]
) -> None:
    path = opened.shard_path("a")
    size = path.stat().st_size
    read(opened, "a")
    os.truncate(path, size - 10)
    here, whole = shown_sizes(size - 10, size)
    with pytest.raises(CheckpointError, match=f"{here} found, {whole} expected") as caught:
        read(opened, "b")
    assert caught.value.where == str(path)


def test_a_shard_truncated_between_two_blocks_is_named(opened: Checkpoint) -> None:
    blocks = opened.row_blocks("b", 4000)
    next(blocks)
    os.truncate(opened.shard_path("b"), 5000)
    with pytest.raises(CheckpointError, match=r"5\.0 kB found, "):
        next(blocks)


def test_a_shard_truncated_while_it_is_read_is_named(
    opened: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    fstat = os.fstat

    def cut_afterwards(descriptor: int) -> os.stat_result:
        status = fstat(descriptor)
        os.truncate(opened.shard_path("b"), 5000)
        return status

    monkeypatch.setattr(os, "fstat", cut_afterwards)
    with pytest.raises(CheckpointError, match="the file is truncated or damaged"):
        opened.raw("b")


@pytest.mark.parametrize("read", READERS)
def test_a_shard_replaced_by_one_of_the_same_size_is_noticed(
    opened: Checkpoint, read: Callable[[Checkpoint, str], object]
) -> None:
    path = opened.shard_path("a")
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data)
    os.utime(path, (1, 1))
    with pytest.raises(CheckpointError, match="written to since it was opened"):
        read(opened, "a")


@pytest.mark.parametrize("read", READERS)
def test_a_shard_that_vanished_is_named(
    opened: Checkpoint, read: Callable[[Checkpoint, str], object]
) -> None:
    opened.shard_path("a").unlink()
    with pytest.raises(CheckpointError, match=r"cannot read [ab]\w*: No such file"):
        read(opened, "a")


def test_a_fingerprint_knows_headers_config_and_sizes_but_no_times(tmp_path: Path) -> None:
    tensors = {"x": np.ones((5, 2), np.float32), "y": np.ones(3, np.float16)}
    folder = write_folder(tmp_path / "m", tensors, {"a": 1})
    first = Checkpoint.open(folder).fingerprint()
    shard = folder / "model.safetensors"
    assert first["shards"] == {shard.name: shard.stat().st_size}
    os.utime(shard, (1, 1))
    (folder / "tokenizer.json").write_text("{}")
    assert Checkpoint.open(folder).fingerprint() == first
    seen = [first]
    write_shard(shard, {"x": tensors["x"].reshape(2, 5), "y": tensors["y"]})
    seen.append(Checkpoint.open(folder).fingerprint())
    (folder / "config.json").write_text('{"a": 2}')
    seen.append(Checkpoint.open(folder).fingerprint())
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model.safetensors"}}')
    seen.append(Checkpoint.open(folder).fingerprint())
    assert len({value["sha256"] for value in seen}) == 4
