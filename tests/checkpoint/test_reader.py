"""Opening and reading a folder of safetensors, good and bad."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from msquant.checkpoint.checkpoint_reader import INDEX_NAME, Checkpoint
from msquant.checkpoint.disk import shown_sizes
from msquant.errors import CheckpointError

BF16 = ml_dtypes.bfloat16


def write_folder(folder: Path, shards: dict[str, dict[str, np.ndarray]]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    first = {
        "a.weight": rng.normal(size=(4, 6)).astype(BF16),
        "a.bias": rng.normal(size=4).astype(np.float16),
        "norm.weight": rng.normal(size=3).astype(np.float32),
    }
    second = {"b.weight": rng.normal(size=(2, 2)), "q.weight": np.arange(-6, 6, dtype=np.int8).reshape(3, 4)}
    return write_folder(tmp_path / "model", {"model-1.safetensors": first, "model-2.safetensors": second})


def write_raw(folder: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    head = struct.pack("<Q", len(text) if length is None else length)
    (folder / "model.safetensors").write_bytes(head + text + data)
    return folder


def test_tensors_come_back_as_they_were_written(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.names() == ["a.bias", "a.weight", "b.weight", "norm.weight", "q.weight"]
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 6)).astype(BF16)
    assert checkpoint.raw("a.weight").dtype == BF16
    np.testing.assert_array_equal(checkpoint.raw("a.weight"), weight)
    np.testing.assert_array_equal(checkpoint.tensor("a.weight"), weight.astype(np.float32))
    assert checkpoint.tensor("b.weight").dtype == np.float32
    np.testing.assert_array_equal(checkpoint.raw("q.weight"), np.arange(-6, 6).reshape(3, 4))
    assert (checkpoint.dtype("a.bias"), checkpoint.shape("a.bias")) == ("F16", (4,))
    assert checkpoint.nbytes("a.weight") == 48
    assert "a.weight" in checkpoint
    assert "missing" not in checkpoint


def test_names_by_module(tmp_path: Path) -> None:
    names = ["a.weight", "a.b.weight", "a.bias", "table"]
    write_folder(tmp_path / "m", {"model.safetensors": {name: np.ones(1, np.float32) for name in names}})
    found = Checkpoint.open(tmp_path / "m").by_module
    assert found == {"": ["table"], "a": ["a.bias", "a.weight"], "a.b": ["a.b.weight"]}


def test_a_linear_layer_has_its_bias(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.linear("a").bias is not None
    assert checkpoint.linear("a").bias.dtype == np.float32
    assert checkpoint.linear("b").bias is None


def test_a_single_file_needs_no_index(tmp_path: Path) -> None:
    save_file(
        {"x": np.array(3.0, np.float32), "empty": np.zeros((0, 4), np.int8)}, tmp_path / "model.safetensors"
    )
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensor("x").shape == ()
    assert checkpoint.raw("empty").shape == (0, 4)


def test_shards_may_be_links_as_in_the_hugging_face_cache(folder: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    (folder / "model-1.safetensors").rename(blob)
    (folder / "model-1.safetensors").symlink_to(blob)
    assert Checkpoint.open(folder).shape("a.weight") == (4, 6)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_truncated_shard_is_named_with_its_sizes(folder: Path, keep: int) -> None:
    shard = folder / "model-2.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=" found, ") as caught:
        Checkpoint.open(folder)
    if keep >= 0:
        assert caught.value.what.startswith(f"{keep} bytes found, at least ")
    assert caught.value.where == str(shard)
    assert caught.value.remedy is not None
    if keep == -1:
        here, whole = shown_sizes(len(data) - 1, len(data))
        assert caught.value.what.startswith(f"{here} found, {whole} expected: ")


def test_a_shard_cut_after_it_was_opened_is_noticed(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    with (folder / "model-1.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 10)
    with pytest.raises(CheckpointError, match="truncated"):
        [checkpoint.raw(name) for name in ("a.weight", "a.bias", "norm.weight")]


def test_a_shard_with_bytes_too_many_is_refused(folder: Path) -> None:
    with (folder / "model-2.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=r" found, .* expected: "):
        Checkpoint.open(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="missing") as caught:
        Checkpoint.open(folder)
    assert caught.value.where is not None
    assert caught.value.where.endswith("model-1.safetensors")


def test_a_tensor_that_its_shard_does_not_hold_is_named(folder: Path) -> None:
    index = json.loads((folder / INDEX_NAME).read_text())
    index["weight_map"]["c.weight"] = "model-1.safetensors"
    (folder / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"c\.weight"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "",
        ".",
        "..",
        "a\0",
        3,
    ],
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path, name: object) -> None:
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a.weight": name}}))
    with pytest.raises(CheckpointError, match="not the name of a file in this folder"):
        Checkpoint.open(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\x00", "[" * 100_000]
)
def test_a_damaged_index_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / INDEX_NAME).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.where == str(tmp_path / INDEX_NAME)


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"\xff\xfe",
        [],
        {"a": 3},
        {"a": {**ENTRY, "dtype": "F13"}},
        {"a": {**ENTRY, "dtype": None}},
        {"a": {**ENTRY, "shape": [-2]}},
        {"a": {**ENTRY, "shape": [True, 2]}},
        {"a": {**ENTRY, "shape": [3]}},
        {"a": {**ENTRY, "data_offsets": [8, 0]}},
        {"a": {**ENTRY, "data_offsets": [0]}},
        {"a": ENTRY, "b": ENTRY},
        {"a": {**ENTRY, "data_offsets": [4, 12]}},
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {}}',
    ],
)
def test_a_damaged_header_is_refused(tmp_path: Path, header: object) -> None:
    with pytest.raises(CheckpointError, match="header is damaged"):
        Checkpoint.open(write_raw(tmp_path, header, bytes(8)))


def test_a_header_of_absurd_length_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        Checkpoint.open(write_raw(tmp_path, b"{}", length=2**62))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_tensor_that_is_not_finite_is_named_with_its_shard(tmp_path: Path, bad: float) -> None:
    values = np.ones((3, 5), BF16)
    values[1, 2] = bad
    folder = write_folder(tmp_path / "m", {"s.safetensors": {"bad.weight": values}})
    with pytest.raises(CheckpointError, match=r"bad\.weight holds NaN or infinity in 1 of 15") as caught:
        Checkpoint.open(folder).tensor("bad.weight")
    assert caught.value.where == str(folder / "s.safetensors")


def test_numbers_whose_sum_overflows_float32_are_finite(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {"s.safetensors": {"big": np.full(4, 3e38, np.float32)}})
    assert np.isfinite(Checkpoint.open(folder).tensor("big")).all()


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.float8_e4m3fn])
def test_a_quantized_tensor_is_not_taken_for_a_floating_point_one(tmp_path: Path, dtype: type) -> None:
    (tmp_path / "m").mkdir()
    data = np.ones((2, 2), dtype).tobytes()
    code = "I8" if dtype is np.int8 else "F8_E4M3"
    write_raw(tmp_path / "m", {"x": {"dtype": code, "shape": [2, 2], "data_offsets": [0, 4]}}, data)
    checkpoint = Checkpoint.open(tmp_path / "m")
    assert checkpoint.raw("x").dtype == dtype
    with pytest.raises(CheckpointError, match=f"x is stored as {code}"):
        checkpoint.tensor("x")


def test_a_wrong_shape_is_named_with_both_shapes(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    checkpoint.expect("a.weight", (4, 6))
    with pytest.raises(CheckpointError, match=r"a\.weight has shape \[4, 6\], config\.json says \[4, 7\]"):
        checkpoint.expect("a.weight", (4, 7))


def test_a_bias_that_does_not_fit_is_named(tmp_path: Path) -> None:
    tensors = {
        "a.weight": np.ones((2, 3), np.float32),
        "a.bias": np.ones(3, np.float32),
        "v.weight": np.ones(3),
    }
    checkpoint = Checkpoint.open(write_folder(tmp_path / "m", {"s.safetensors": tensors}))
    with pytest.raises(CheckpointError, match=r"a\.bias has shape \[3\], a\.weight has \[2, 3\]"):
        checkpoint.linear("a")
    with pytest.raises(CheckpointError, match="a matrix"):
        checkpoint.linear("v")


def test_an_unknown_tensor_is_an_error_everywhere(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    for read in (checkpoint.raw, checkpoint.tensor, checkpoint.shape, checkpoint.dtype, checkpoint.nbytes):
        with pytest.raises(CheckpointError, match="there is no tensor nothing"):
            read("nothing")


def test_pickle_checkpoints_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="safetensors only") as caught:
        Checkpoint.open(tmp_path)
    assert "safe_serialization" in str(caught.value)
    (tmp_path / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    with pytest.raises(CheckpointError, match="only safetensors files are read"):
        Checkpoint.open(tmp_path)


def test_a_folder_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="neither"):
        Checkpoint.open(tmp_path)
    save_file({"x": np.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"index\.json that says"):
        Checkpoint.open(tmp_path)


MEASURE = """
import sys
from msquant.checkpoint.checkpoint_reader import Checkpoint

def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

checkpoint = Checkpoint.open(sys.argv[1])
checkpoint.raw("small")
before = resident("VmRSS")
for name in checkpoint.names():
    array = checkpoint.raw(name)
    del array
print(resident("VmRSS") - before, resident("VmHWM") - before)
"""


def test_reading_keeps_one_tensor_in_memory_and_no_shard(tmp_path: Path) -> None:
    # Above the 32 MB up to which the C library may keep freed memory for itself.
    size = 40 * 2**20
    tensors = {f"t{i}": np.full(size, i, np.int8) for i in range(3)}
    save_file({**tensors, "small": np.ones(1, np.int8)}, tmp_path / "model.safetensors")
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    kept, peak = map(int, output.split())
    assert kept < size / 2
    assert peak < 1.5 * size
