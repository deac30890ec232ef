"""Counts of the levels of integers, beside NumPy's over whole tensors."""

from pathlib import Path

import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.weights import QuantizedLinear
from msquant.errors import CheckpointError
from msquant.flows.conversion import open_quantized
from msquant.flows.pipeline import quantize
from msquant.formats.compressed_tensors.reader import CompressedTensorsCheckpoint
from msquant.formats.summary import summarize
from msquant.reporting.collect import collect
from msquant.reporting.histograms import Histogram, histograms
from msquant.reporting.write import html_page, markdown_page
from tests.fixtures.tiny_families import write_tiny
from tests.formats.folders import change_tensors, write_folder
from tests.test_pipeline_formats import recipe_of


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
    return np.array([np.count_nonzero(values == level) for level in range(-128, 128)])


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


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Several integers are one number in it: eight of 4 bits, four of 8."""
    output = tmp_path_factory.mktemp("packed")
    source = write_tiny(output / "float", "llama", dtype="bfloat16")
    schemes = [{"*.mlp.*": "W4A16_G16"}, {"*.self_attn.*": "W8A16"}, {"*": "FLOAT"}]
    recipe = recipe_of(source, "compressed-tensors", schemes=schemes).replace("evaluation", sequences=0)
    return quantize(recipe, output / "quantized", remember=False).folder


@pytest.mark.parametrize("most", [10**9, 500])
def test_packed_integers_of_every_width_are_counted(packed: Path, most: int) -> None:
    found = histograms(packed, summarize(packed).modules, most=most)
    linears = open_quantized(packed).linears
    expected = {(name.split(".", 3)[3], scheme) for name, scheme in linears.items() if not scheme.is_float}
    assert {(h.kind, h.bits) for h in found} == {
        (kind, scheme.weights.bits) for kind, scheme in expected if scheme.weights
    }
    for histogram in found:
        assert len(histogram.counts) == 1 << histogram.bits
        levels = np.concatenate([integers(packed, name) for name in linears if name.endswith(histogram.kind)])
        counts = np.array([np.count_nonzero(levels == level) for level in histogram.levels])
        if most > levels.size:
            np.testing.assert_array_equal(histogram.counts, counts, histogram.kind)
        assert histogram.read > 0
        assert (np.array(histogram.counts) <= counts).all()


def integers(folder: Path, module: str) -> np.ndarray:
    """A layer's integers by the format's own reader."""
    linear = CompressedTensorsCheckpoint.open(folder).linear(module)
    assert isinstance(linear, QuantizedLinear)
    return linear.weight.reshape(-1)


def test_the_share_of_every_width_is_told(packed: Path) -> None:
    report = collect(packed, check=False)
    shapes = {module.name: np.prod(module.shape) for module in summarize(packed).modules}
    widths = {"mlp": 4, "self_attn": 8}
    expected = dict.fromkeys(widths.values(), 0)
    for name, scheme in open_quantized(packed).linears.items():
        if not scheme.is_float:
            expected[widths[name.split(".")[3]]] += shapes[name]
    assert report.size.quantized == expected
    for bits, count in expected.items():
        share = f"{count / report.size.parameters:.1%}"
        assert f"{share} in int{bits}" in html_page(report)
        assert f"| of them in int{bits} | {share} |" in markdown_page(report)
    assert "Int4 weights of mlp.up_proj" in html_page(report)


def test_measures_of_a_histogram() -> None:
    counts = np.zeros(256, int)
    counts[[0, 1, 128, 255]] = 2, 2, 8, 4
    histogram = Histogram("k", 8, 1, 16, tuple(counts.tolist()))
    assert (histogram.zeros, histogram.edges) == (0.5, 0.5)
    assert histogram.entropy == pytest.approx(1.75)
    assert Histogram("k", 8, 1, 256, (1,) * 256).entropy == pytest.approx(8)
    int4 = Histogram("k", 4, 1, 16, (1,) * 16)
    assert (list(int4.levels), int4.entropy) == (list(range(-8, 8)), pytest.approx(4))
    empty = Histogram("k", 8, 0, 0, (0,) * 256)
    assert (empty.zeros, empty.edges, empty.entropy) == (0, 0, 0)


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
