"""Hidden states come back bit by bit, from memory or from disk, or are refused."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from msquant.checkpoint.hidden_states import HiddenStates, HiddenStateStore
from msquant.checkpoint.writer import temporary_path
from msquant.errors import CheckpointError, OutputError

SHAPES = [(4, 8, 16), (4, 8, 16), (1, 8, 16)]
NBYTES = 4 * (512 + 512 + 128)


def batches(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape).astype(np.float32) for shape in SHAPES]


def fill(store: HiddenStateStore, boundary: int, seed: int = 0) -> HiddenStates:
    with store.write(boundary) as writer:
        for batch in batches(seed):
            writer.append(batch)
    return store.open(boundary)


def assert_same(found: HiddenStates, seed: int = 0) -> None:
    assert len(found) == 3
    assert found.shapes == SHAPES
    assert found.nbytes == NBYTES
    for batch, expected in zip(found, batches(seed), strict=True):
        assert batch.dtype == np.float32
        np.testing.assert_array_equal(batch, expected)
    np.testing.assert_array_equal(found[-1], batches(seed)[-1])
    assert [batch.shape for batch in found[:2]] == SHAPES[:2]
    for index in (3, -4):
        with pytest.raises(IndexError):
            found[index]


@pytest.mark.parametrize("budget", [0, NBYTES - 1, NBYTES])
def test_batches_come_back_in_this_process_and_the_next(tmp_path: Path, budget: int) -> None:
    store = HiddenStateStore(tmp_path / "scratch" / "deep", budget)
    written = fill(store, 12)
    assert (store.folder / "hidden-00012.f32").is_file()
    assert written.is_held == (budget >= NBYTES)
    assert store.open(12) is written
    assert_same(written)
    resumed = HiddenStateStore(store.folder, budget).open(12)
    assert resumed.is_held == (budget >= NBYTES)
    assert_same(resumed)


def test_the_budget_is_shared_by_all_boundaries(tmp_path: Path) -> None:
    store = HiddenStateStore(tmp_path, NBYTES)
    assert fill(store, 0).is_held
    assert not fill(store, 1, 1).is_held
    assert store.held_bytes == NBYTES
    store.discard(0)
    assert store.held_bytes == 0
    assert not (tmp_path / "hidden-00000.f32").exists()
    assert fill(store, 2).is_held
    assert_same(store.open(1), 1)
    with store.write(2) as writer:
        assert store.held_bytes == 0
        writer.append(batches()[0])
        with store.write(3) as other:
            other.append(batches()[0])
            assert store.held_bytes == 2 * batches()[0].nbytes
            other.append(batches()[1])
            assert store.held_bytes == batches()[0].nbytes


def test_a_boundary_may_be_written_anew(tmp_path: Path) -> None:
    store = HiddenStateStore(tmp_path, 0)
    fill(store, 1)
    assert_same(fill(store, 1, 5), 5)
    store.discard(7)


def test_an_array_that_is_not_contiguous_is_written_by_value(tmp_path: Path) -> None:
    store = HiddenStateStore(tmp_path, 0)
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    with store.write(0) as writer:
        writer.append(array.transpose(2, 1, 0))
        writer.append(array[:, ::2])
    np.testing.assert_array_equal(store.open(0)[0], array.transpose(2, 1, 0))
    np.testing.assert_array_equal(store.open(0)[1], array[:, ::2])


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="float64"), HiddenStateStore(tmp_path, 0).write(0) as writer:
        writer.append(np.zeros((1, 1, 1)))


def test_nothing_is_left_of_a_boundary_that_failed(tmp_path: Path) -> None:
    store = HiddenStateStore(tmp_path, 10**9)

    def interrupted() -> None:
        with store.write(3) as writer:
            writer.append(batches()[0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    assert store.held_bytes == 0
    with pytest.raises(CheckpointError, match="missing"):
        store.open(3)


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    fill(HiddenStateStore(tmp_path, 0), 1)
    temporary_path(tmp_path / "hidden-00002.f32").write_text("half")
    HiddenStateStore(tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["hidden-00001.f32"]


@pytest.mark.parametrize("budget", [0, 10**9])
@pytest.mark.parametrize("keep", [0, 5, 100, NBYTES, -9, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int, budget: int) -> None:
    path = fill(HiddenStateStore(tmp_path, 0), 1).path
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="hidden states are damaged") as caught:
        HiddenStateStore(tmp_path, budget).open(1)
    assert caught.value.where == str(path)
    assert "--restart" in (caught.value.remedy or "")


@pytest.mark.parametrize("budget", [0, 10**9])
@pytest.mark.parametrize("place", [0, 3000, NBYTES - 1, NBYTES, -20, -8, -1])
def test_a_flipped_bit_is_noticed(tmp_path: Path, place: int, budget: int) -> None:
    path = fill(HiddenStateStore(tmp_path, 0), 1).path
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="hidden states are damaged"):
        HiddenStateStore(tmp_path, budget).open(1)


@pytest.mark.parametrize(
    ("trailer", "says"),
    [
        (b"[" * 100_000, "nested more than"),
        (b'{"shapes": [[1e999, 8]], "crc32": [0]}', "infinity"),
        (b" " * 100, "at most 50 are read"),
    ],
    ids=["deep", "infinite", "long"],
)
def test_a_trailer_that_nothing_wrote_is_refused(
    trailer: bytes, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if says.startswith("at most"):
        monkeypatch.setattr("msquant.checkpoint.hidden_states.MAX_BYTES", 50)
    path = fill(HiddenStateStore(tmp_path, 0), 1).path
    path.write_bytes(path.read_bytes()[:NBYTES] + trailer + len(trailer).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match=f"hidden states are damaged: .*{says}"):
        HiddenStateStore(tmp_path, 0).open(1)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing") as caught:
        HiddenStateStore(tmp_path, 0).open(4)
    assert caught.value.where == str(tmp_path / "hidden-00004.f32")
    assert "--restart" in (caught.value.remedy or "")


def test_a_file_damaged_while_it_is_used_is_noticed(tmp_path: Path) -> None:
    states = fill(HiddenStateStore(tmp_path, 0), 1)
    states.path.write_bytes(states.path.read_bytes()[:3000])
    np.testing.assert_array_equal(states[0], batches()[0])
    with pytest.raises(CheckpointError, match="damaged"):
        states[1]
    states.path.unlink()
    with pytest.raises(CheckpointError, match="damaged"):
        states[0]


def test_a_full_disk_is_an_output_error(small_disk: Path) -> None:
    store = HiddenStateStore(small_disk / "scratch", 0)
    with pytest.raises(OutputError, match="disk is full"), store.write(0) as writer:
        writer.append(np.ones((10, 100, 100), np.float32))
    assert list(store.folder.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        HiddenStateStore(tmp_path / "file" / "scratch", 0)


MEASURE = """
import sys
from pathlib import Path
import numpy as np
from msquant.checkpoint.hidden_states import HiddenStateStore

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

batch = np.ones((1, 1024, 1024), np.float32)
before = peak()
store = HiddenStateStore(Path(sys.argv[1]), int(sys.argv[2]))
for boundary in range(2):
    with store.write(boundary) as writer:
        for number in range(16):
            writer.append(batch * number)
    assert [float(b[0, 0, 0]) for b in store.open(boundary)] == list(range(16))
assert [float(b[0, 0, 0]) for b in HiddenStateStore(Path(sys.argv[1]), 0).open(0)] == list(range(16))
print((peak() - before) / batch.nbytes)
"""


@pytest.mark.parametrize(("budget", "least", "most"), [(0, 0, 4), (8 << 22, 6, 12), (64 << 22, 28, 40)])
def test_no_more_than_the_budget_is_held(tmp_path: Path, budget: int, least: float, most: float) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path), str(budget)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert least <= float(run.stdout) <= most
