"""Shards written piece by piece: valid, deterministic, whole or not at all."""

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from msquant.checkpoint.shard import DTYPES, Shard
from msquant.checkpoint.shard_stream import ShardStream, shard_bytes
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.writer import write_shard
from msquant.errors import OutputError

NUMPY_CODES = [code for code in DTYPES if not code.startswith("F8")]


def random_tensors(rng: np.random.Generator, codes: list[str]) -> dict[str, np.ndarray]:
    """Tensors of random names, dtypes and shapes, scalars and empty ones among them."""
    tensors = {}
    for index in range(rng.integers(1, 12)):
        shape = tuple(rng.integers(0, 6, rng.integers(0, 4)))
        code = codes[rng.integers(len(codes))]
        data = rng.integers(0, 2 if code == "BOOL" else 100, shape)
        tensors[f"{rng.choice(list('aüz'))}.{index}"] = np.asarray(data).astype(DTYPES[code])
    return tensors


def specs_of(tensors: dict[str, np.ndarray]) -> list[TensorSpec]:
    return [TensorSpec.of(name, array) for name, array in tensors.items()]


def write_in_pieces(path: Path, tensors: dict[str, np.ndarray], rng: np.random.Generator) -> str:
    """Write all tensors in random order, some by rows in random order."""
    pieces = []
    for name, array in tensors.items():
        if array.ndim == 0 or rng.random() < 0.3:
            pieces.append((name, array, 0))
            continue
        cuts = sorted({0, len(array), *rng.integers(0, len(array) + 1, 3)})
        pieces += [(name, array[a:b], int(a)) for a, b in itertools.pairwise(cuts)]
    specs = specs_of(tensors)
    rng.shuffle(specs)
    with ShardStream(path, specs) as stream:
        for place in rng.permutation(len(pieces)):
            stream.write(*pieces[place])
        return stream.finish()


@pytest.mark.parametrize("seed", range(40))
def test_any_tensors_in_any_order_and_pieces_are_the_bytes_of_the_library(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = random_tensors(rng, NUMPY_CODES)
    path = tmp_path / "s.safetensors"
    digest = write_in_pieces(path, tensors, rng)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == write_shard(tmp_path / "library", tensors)
    assert path.stat().st_size == shard_bytes(specs_of(tensors))
    for name, array in load_file(path).items():
        assert array.dtype.name == tensors[name].dtype.name
        np.testing.assert_array_equal(array, tensors[name])


def test_every_dtype_is_read_by_torch_and_its_data_is_aligned(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        code.lower(): np.asarray(rng.integers(0, 2, (3, 5))).astype(dtype) for code, dtype in DTYPES.items()
    }
    path = tmp_path / "s.safetensors"
    write_in_pieces(path, tensors, rng)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tensors)
        for name, array in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name).double().numpy(), array.astype(np.float64))
    for code, entry in Shard.open(path).entries.items():
        assert entry.offset % np.dtype(DTYPES[code.upper()]).itemsize == 0


def test_a_model_that_was_streamed_loads_in_transformers(tiny_llama: Path, tmp_path: Path) -> None:
    import shutil

    import torch
    from transformers import AutoModelForCausalLM

    tensors = load_file(tiny_llama / "model.safetensors")
    write_in_pieces(tmp_path / "model.safetensors", tensors, np.random.default_rng(0))
    shutil.copy(tiny_llama / "config.json", tmp_path)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)(tokens).logits
            for folder in (tiny_llama, tmp_path)
        ]
    assert torch.equal(*logits)


def test_nothing_has_its_name_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("old")
    with ShardStream(path, [TensorSpec("a", "I8", (2,))]) as stream:
        stream.write("a", np.ones(2, np.int8))
        assert path.read_text() == "old"
    assert path.read_text() == "old"
    with pytest.raises(RuntimeError), ShardStream(path, [TensorSpec("a", "I8", (2,))]):
        raise RuntimeError
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_the_umask_gives_the_permissions(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with ShardStream(tmp_path / "s", []) as stream:
            stream.finish()
    finally:
        os.umask(before)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o640


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    specs = [TensorSpec(name, "I8", (4, 2)) for name in "abcde"]
    with ShardStream(tmp_path / "s", specs) as stream:
        stream.write("a", np.ones((4, 2), np.int8))
        stream.write("b", np.ones((1, 2), np.int8), 1)
        with pytest.raises(OutputError, match=r"4 of 5 .*: b rows 0 to 1, c rows 0 to 4, d .*, \.\.\."):
            stream.finish()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "array", "row", "message"),
    [
        ("x", np.ones((4, 2), np.int8), 0, "x is not planned"),
        ("a", np.ones((4, 2), np.uint8), 0, r"a is given as U8 \[4, 2\] .* planned as I8 \[4, 2\]"),
        ("a", np.ones((4, 3), np.int8), 0, r"given as I8 \[4, 3\]"),
        ("a", np.ones(8, np.int8), 0, r"given as I8 \[8\]"),
        ("a", np.ones((2, 2), np.int8), 3, "from row 3 on"),
        ("a", np.ones((2, 2), np.int8), -1, "from row -1 on"),
        ("a", np.ones((5, 2), np.int8), 0, r"given as I8 \[5, 2\]"),
        ("a", np.ones((4, 2), np.complex64), 0, "complex64"),
        ("b", np.ones((4, 2), np.int8), 0, r"rows 0 to 4 of b are written twice"),
        ("b", np.ones((1, 2), np.int8), 2, r"rows 2 to 3 of b are written twice"),
    ],
)
def test_a_piece_that_does_not_fit_is_refused(
    tmp_path: Path, name: str, array: np.ndarray, row: int, message: str
) -> None:
    specs = [TensorSpec("a", "I8", (4, 2)), TensorSpec("b", "I8", (4, 2))]
    with ShardStream(tmp_path / "s", specs) as stream:
        stream.write("b", np.ones((2, 2), np.int8), 1)
        with pytest.raises(OutputError, match=message):
            stream.write(name, array, row)


def test_a_stream_that_is_not_open_is_refused(tmp_path: Path) -> None:
    stream = ShardStream(tmp_path / "s", [TensorSpec("a", "I8", (1,))])
    with pytest.raises(OutputError, match="not open"):
        stream.write("a", np.ones(1, np.int8))
    with pytest.raises(OutputError, match="not open"):
        stream.finish()
    with pytest.raises(OutputError, match="to be written twice"):
        ShardStream(tmp_path / "s", [TensorSpec("a", "I8", (1,))] * 2)


def test_a_folder_that_is_not_there_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written"), ShardStream(tmp_path / "no" / "s", []):
        pass


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from msquant.checkpoint.shard_stream import ShardStream
from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.errors import OutputError

resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    with ShardStream(Path(sys.argv[1]) / "s", [TensorSpec("a", "I8", (1 << 20,))]) as stream:
        print("entered")
except OutputError as error:
    print(error.where, "|", error.what, "|", error.remedy)
"""


def test_a_file_that_will_not_fit_is_noticed_before_anything_is_written(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True)
    assert "entered" not in run.stdout
    assert f"{tmp_path / 's'} | cannot be written (1.0 MB" in run.stdout
    assert "File too large" in run.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_when_the_shard_is_opened(small_disk: Path) -> None:
    stream = ShardStream(small_disk / "s", [TensorSpec("a", "I8", (1 << 20,))])
    with pytest.raises(OutputError, match=r"disk is full \([\d.]+ \w+ free, 1\.0 MB needed"), stream:
        pass
    assert list(small_disk.iterdir()) == []


MEASURE = """
import sys
from pathlib import Path
import numpy as np
from msquant.checkpoint.shard_stream import ShardStream
from msquant.checkpoint.tensor_spec import TensorSpec

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

piece = np.ones((1, 1 << 20), np.int8)
before = peak()
with ShardStream(Path(sys.argv[1]), [TensorSpec("a", "I8", (100, 1 << 20))]) as stream:
    for row in range(100):
        stream.write("a", piece, row)
    stream.finish()
print(peak() - before)
"""


def test_a_shard_is_never_in_memory(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "s")]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(run.stdout) < 10 * 2**20
