"""Counts of int8 levels, beside NumPy's over whole tensors."""

from pathlib import Path

import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import CheckpointError
from msquant.formats.summary import summarize
from msquant.reporting.histograms import LEVELS, Histogram, histograms
from tests.formats.folders import change_tensors, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(
        tmp_path_factory.mktemp("histograms") / "model", float_modules=("model.layers.1.mlp.up_proj",)
    )


def whole(folder: Path, kind: str) -> np.ndarray:
    checkpoint = Checkpoint.open(folder)
    names = [name for name in checkpoint.names() if name.endswith(f".{kind}.weight")]
    weights = [checkpoint.raw(name) for name in names if checkpoint.dtype(name) == "I8"]
    values = np.concatenate([weight.reshape(-1) for weight in weights]).astype(int)
    return np.array([np.count_nonzero(values == level) for level in LEVELS])


def test_all_weights_are_counted(folder: Path) -> None:
    steps: list[tuple[int, int]] = []
    found = histograms(
        folder, summarize(folder).modules, progress=lambda done, total: steps.append((done, total))
    )
    assert len(found) == 7
    for histogram in found:
        np.testing.assert_array_equal(histogram.counts, whole(folder, histogram.kind), histogram.kind)
        assert histogram.read == histogram.weights
    assert {h.kind: h.modules for h in found}["mlp.up_proj"] == 1
    assert {h.kind: h.modules for h in found}["mlp.gate_proj"] == 2
    total = sum(h.weights for h in found)
    assert steps[-1] == (total, total)
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)


@pytest.mark.parametrize("most", [1, 300, 2000])
def test_of_a_large_folder_some_rows_of_every_matrix_are_read(folder: Path, most: int) -> None:
    modules = summarize(folder).modules
    found = histograms(folder, modules, most=most)
    weights, read = sum(h.weights for h in found), sum(h.read for h in found)
    matrices = sum(h.modules for h in found)
    assert read < weights
    assert read <= most + matrices * 24
    for histogram in found:
        assert histogram.read >= histogram.modules * 16
        assert (np.array(histogram.counts) <= whole(folder, histogram.kind)).all()


def test_measures_of_a_histogram() -> None:
    counts = np.zeros(256, int)
    counts[[0, 1, 128, 255]] = 2, 2, 8, 4
    histogram = Histogram("k", 1, 16, tuple(counts.tolist()))
    assert (histogram.zeros, histogram.edges) == (0.5, 0.5)
    assert histogram.bits == pytest.approx(1.75)
    assert Histogram("k", 1, 256, (1,) * 256).bits == pytest.approx(8)
    empty = Histogram("k", 0, 0, (0,) * 256)
    assert (empty.zeros, empty.edges, empty.bits) == (0, 0, 0)


def test_a_shard_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    modules = summarize(folder).modules
    shard = next(folder.glob("model-00001*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        histograms(folder, modules)


def test_a_quantized_tensor_of_another_name_is_passed_over(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    change_tensors(folder, {"model.layers.0.extra.table": np.zeros((4, 4), np.int8)})
    kinds = [histogram.kind for histogram in histograms(folder, summarize(folder).modules)]
    assert "extra" not in kinds
    assert len(kinds) == 7
