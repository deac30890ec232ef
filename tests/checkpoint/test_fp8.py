"""FP8 with block scales is dequantized exactly, or refused with its name."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import CheckpointError
from tests.checkpoint.folders import write_folder
from tests.fixtures.fp8 import dequantize_blocks, to_fp8

E4M3 = ml_dtypes.float8_e4m3fn
NAN_CODES = (0x7F, 0xFF)


def config(*block: object) -> dict[str, object]:
    return {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)}}


def all_codes(rows: int, columns: int) -> np.ndarray:
    """A matrix of all codes but NaN, many times over."""
    codes = np.array([code for code in range(256) if code not in NAN_CODES], np.uint8)
    return np.resize(codes, (rows, columns)).view(E4M3)


def scales(rows: int, columns: int, block: tuple[int, int] = (128, 128), factor: float = 1e-4) -> np.ndarray:
    shape = (-(-rows // block[0]), -(-columns // block[1]))
    return np.random.default_rng(0).uniform(factor, 3 * factor, shape).astype(np.float32)


def reference(weight: np.ndarray, scale: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    import torch

    codes = torch.from_numpy(weight.view(np.uint8)).view(torch.float8_e4m3fn)
    return dequantize_blocks(codes, torch.from_numpy(scale.astype(np.float32)), block).numpy()


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((256, 384), (128, 128)),
        ((300, 200), (128, 128)),
        ((5, 3), (128, 128)),
        ((129, 1), (128, 128)),
        ((70, 90), (16, 32)),
        ((2100, 1030), (128, 128)),  # several chunks, by threads
        ((40, 50000), (3, 1000)),
    ],
)
@pytest.mark.parametrize("factor", [1e-4, 1.0, 1e4, 1e-42])
def test_every_code_times_its_scale_is_exact(
    tmp_path: Path, shape: tuple[int, int], block: tuple[int, int], factor: float
) -> None:
    weight, scale = all_codes(*shape), scales(*shape, block, factor)
    folder = write_folder(tmp_path / "m", {"w": weight, "w_scale_inv": scale}, config(*block))
    checkpoint = Checkpoint.open(folder)
    expected = reference(weight, scale, block)
    assert_same_bits(checkpoint.tensor("w"), expected)
    rows = np.array([shape[0] - 1, 0, shape[0] // 2, 0])
    assert_same_bits(checkpoint.rows("w", rows), expected[rows])
    blocks = list(checkpoint.row_blocks("w", 7 * shape[1] * 4))
    assert [start for start, _ in blocks] == list(range(0, shape[0], 7))
    assert_same_bits(np.concatenate([block for _, block in blocks]), expected)


def test_a_scale_in_bfloat16_is_read_and_the_block_is_128_by_default(tmp_path: Path) -> None:
    weight, scale = all_codes(200, 300), scales(200, 300).astype(ml_dtypes.bfloat16)
    for number, content in enumerate((None, {}, {"quantization_config": {"quant_method": "fp8"}})):
        folder = write_folder(tmp_path / str(number), {"w": weight, "w_scale_inv": scale}, content)
        assert_same_bits(Checkpoint.open(folder).tensor("w"), reference(weight, scale, (128, 128)))


FLUSHED = """
import sys
import numpy as np
import torch
from msquant.checkpoint.checkpoint_reader import Checkpoint

assert torch.set_flush_denormal(True)
assert np.float32(1e-40) * np.float32(1e10) == 0
np.save(sys.argv[2], Checkpoint.open(sys.argv[1]).tensor("w"))
"""


def test_subnormal_codes_are_exact_when_the_processor_flushes_subnormals(tmp_path: Path) -> None:
    weight, scale = all_codes(2100, 1030), scales(2100, 1030)
    folder = write_folder(tmp_path / "m", {"w": weight, "w_scale_inv": scale})
    result = tmp_path / "result.npy"
    subprocess.run([sys.executable, "-c", FLUSHED, str(folder), str(result)], check=True)
    assert_same_bits(np.load(result), reference(weight, scale, (128, 128)))


def test_a_published_style_folder_reads_like_its_reference(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = to_fp8(tiny_llama, tmp_path / "fp8", block=(48, 40))
    checkpoint = Checkpoint.open(folder)
    stored = load_file(folder / "model.safetensors")
    assert checkpoint.parameters() == Checkpoint.open(tiny_llama).names()
    assert {name for name in checkpoint.names() if checkpoint.is_scale(name)} == {
        name for name in stored if name.endswith("_scale_inv")
    }
    for name in checkpoint.parameters():
        expected = stored[name].float()
        if (scale := stored.get(f"{name}_scale_inv")) is not None:
            expected = dequantize_blocks(stored[name], scale, (48, 40))
        assert_same_bits(checkpoint.tensor(name), expected.numpy())
    linear = checkpoint.linear("model.layers.1.mlp.up_proj")
    assert_same_bits(linear.weight, checkpoint.tensor("model.layers.1.mlp.up_proj.weight"))


@pytest.mark.parametrize("code", NAN_CODES)
def test_nan_codes_are_counted(tmp_path: Path, code: int) -> None:
    weight = all_codes(20, 30)
    weight.view(np.uint8)[[3, 17], [4, 29]] = code
    folder = write_folder(tmp_path / "m", {"w": weight, "w_scale_inv": scales(20, 30)})
    checkpoint = Checkpoint.open(folder)
    with pytest.raises(CheckpointError, match="w holds NaN or infinity in 2 of 600 places") as caught:
        checkpoint.tensor("w")
    assert caught.value.where == str(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="in 1 of 60 places"):
        checkpoint.rows("w", np.array([2, 3]))
    assert np.isfinite(checkpoint.rows("w", np.array([2, 4]))).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0.0, -1e-4, 1e37])
def test_a_scale_that_is_not_positive_and_finite_is_named(tmp_path: Path, bad: float) -> None:
    scale = scales(200, 300)
    scale[1, 2] = bad
    folder = write_folder(tmp_path / "m", {"w": all_codes(200, 300), "w_scale_inv": scale})
    checkpoint = Checkpoint.open(folder)
    for read in (checkpoint.tensor, lambda name: checkpoint.rows(name, np.array([0]))):
        with pytest.raises(CheckpointError, match="w_scale_inv holds"):
            read("w")


@pytest.mark.parametrize("shape", [(2, 2), (3, 2), (2, 3, 1), (6,), ()])
def test_a_scale_of_another_shape_is_named_with_both_shapes(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {"w": all_codes(200, 300), "w_scale_inv": np.ones(shape, np.float32)}
    checkpoint = Checkpoint.open(write_folder(tmp_path / "m", tensors))
    with pytest.raises(CheckpointError) as caught:
        checkpoint.tensor("w")
    assert f"w_scale_inv has shape {list(shape)}; for w of shape [200, 300] in blocks" in caught.value.what
    assert "[128, 128], [2, 3] is expected" in caught.value.what


def test_a_scale_stored_as_integers_is_refused(tmp_path: Path) -> None:
    tensors = {"w": all_codes(2, 3), "w_scale_inv": np.ones((1, 1), np.int32)}
    with pytest.raises(CheckpointError, match="w_scale_inv is stored as I32"):
        Checkpoint.open(write_folder(tmp_path / "m", tensors)).tensor("w")


def test_a_missing_scale_is_named(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_folder(tmp_path / "m", {"w": all_codes(2, 3)}))
    for read in (checkpoint.tensor, lambda name: next(checkpoint.row_blocks(name, 100))):
        with pytest.raises(CheckpointError, match="its scales w_scale_inv are missing"):
            read("w")


def test_only_matrices_have_block_scales(tmp_path: Path) -> None:
    tensors = {"w": all_codes(1, 6).reshape(6), "w_scale_inv": np.ones(1, np.float32)}
    with pytest.raises(CheckpointError, match=r"shape \[6\]: only matrices"):
        Checkpoint.open(write_folder(tmp_path / "m", tensors)).tensor("w")


@pytest.mark.parametrize("block", [[], [128], [128, 0], [128, -1], ["a", "b"], [128.0, 128], [1, 2, 3]])
def test_a_block_size_that_makes_no_sense_is_named(tmp_path: Path, block: list[object]) -> None:
    tensors = {"w": all_codes(2, 3), "w_scale_inv": scales(2, 3)}
    folder = write_folder(tmp_path / "m", tensors, config(*block))
    with pytest.raises(CheckpointError, match="weight_block_size is") as caught:
        Checkpoint.open(folder).tensor("w")
    assert caught.value.where == str(folder / "config.json")


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {"w": all_codes(2, 3), "w_scale_inv": scales(2, 3)})
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        Checkpoint.open(folder).tensor("w")


def test_scales_left_beside_a_tensor_in_floating_point_are_not_applied(tmp_path: Path) -> None:
    weight = np.ones((2, 3), np.float32)
    folder = write_folder(tmp_path / "m", {"w": weight, "w_scale_inv": scales(2, 3), "x_scale_inv": weight})
    checkpoint = Checkpoint.open(folder)
    np.testing.assert_array_equal(checkpoint.tensor("w"), weight)
    assert checkpoint.parameters() == ["w", "x_scale_inv"]


MEASURE = """
import sys
from msquant.checkpoint.checkpoint_reader import Checkpoint

def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

checkpoint = Checkpoint.open(sys.argv[1])
checkpoint.tensor("small")
before = status("VmRSS")
array = checkpoint.tensor("w")
print(status("VmHWM") - before - array.nbytes)
"""


def test_nothing_but_the_result_takes_memory(tmp_path: Path) -> None:
    tensors = {"w": all_codes(4096, 8192), "small": all_codes(1, 1)}
    tensors |= {"w_scale_inv": scales(4096, 8192), "small_scale_inv": scales(1, 1)}
    folder = write_folder(tmp_path / "m", tensors)
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder)], check=True, capture_output=True, text=True
    )
    # The codes alone would be 32 MB.
    assert int(run.stdout) < 16 * 2**20


def test_the_index_may_place_a_scale_in_another_shard(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {"w": all_codes(2, 3)})
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    write_folder(folder, {"w_scale_inv": scales(2, 3)})
    weight_map = {"w": "a.safetensors", "w_scale_inv": "model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same_bits(
        Checkpoint.open(folder).tensor("w"), reference(all_codes(2, 3), scales(2, 3), (128, 128))
    )
