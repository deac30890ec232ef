"""Linear layers in the golden-stick layout: written, computed as the engine does, read back."""

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from msquant.checkpoint.weights import FloatLinear, QuantizedLinear
from msquant.errors import CheckpointError
from msquant.formats.dtypes import cast, model_dtype
from msquant.formats.golden_stick.form import GoldenStickFormat
from msquant.formats.golden_stick.layout import DESCRIPTION_NAME, decode_linear
from msquant.formats.golden_stick.reader import GoldenStickCheckpoint
from msquant.schemes import W8A8, W8A8_DYNAMIC, W8A8_SHIFTED
from tests.formats.folders import CONFIG, change_tensors, random_quantized, write_folder

FORM = GoldenStickFormat()

MODULE = "model.layers.0.self_attn.q_proj"


def engine_output(tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """What vLLM-MindSpore computes of the stored tensors: int8 in, int32 sums, one factor, the bias."""
    scale = tensors[f"{MODULE}.input_scale"].astype(np.float64)
    offset = tensors[f"{MODULE}.input_offset"].astype(np.float64)
    x_q = np.clip(np.round(x / scale) + offset, -128, 127).astype(np.int8)
    sums = x_q.astype(np.int32) @ tensors[f"{MODULE}.weight"].astype(np.int32).T
    sums = sums + tensors[f"{MODULE}.quant_bias"]
    y = sums.astype(np.float64) * tensors[f"{MODULE}.deq_scale"].astype(np.float64)
    return y + tensors[f"{MODULE}.bias"].astype(np.float64) if f"{MODULE}.bias" in tensors else y


def ideal_output(linear: QuantizedLinear, x: np.ndarray) -> np.ndarray:
    """The layer by its definition, in float64."""
    assert linear.input_scale is not None
    assert linear.input_offset is not None
    scale, offset = np.float64(linear.input_scale[0]), linear.input_offset
    x_q = np.clip(np.round(x / scale) + offset, -128, 127)
    y = linear.weight_scale * scale * (linear.weight.astype(np.float64) @ (x_q - offset).T).T
    return y if linear.bias is None else y + linear.bias


def shifted(linear: QuantizedLinear) -> QuantizedLinear:
    """The layer with a zero point a column."""
    offsets = np.random.default_rng(7).integers(-128, 128, linear.weight.shape[1], dtype=np.int32)
    return replace(linear, scheme=W8A8_SHIFTED, input_offset=offsets)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_the_stored_tensors_compute_the_layer(dtype: str, bias: bool, columns: bool, seed: int) -> None:
    linear = random_quantized(12, 40, seed, bias=bias)
    linear = shifted(linear) if columns else linear
    tensors = FORM.encode_linear(MODULE, linear, dtype)
    x = np.random.default_rng(seed).normal(size=(9, 40))
    back = decode_linear(MODULE, tensors)
    np.testing.assert_allclose(engine_output(tensors, x), ideal_output(back, x), rtol=3e-7, atol=1e-7)
    # In the model's dtype the input scale is another number; all else is the layer that went in.
    rounded = tensors[f"{MODULE}.input_scale"][:1].astype(np.float32)
    np.testing.assert_allclose(rounded, linear.input_scale, rtol=0.01)
    stored_bias = None if linear.bias is None else linear.bias.astype(rounded.dtype)
    if stored_bias is not None:
        stored_bias = stored_bias.astype(tensors[f"{MODULE}.bias"].dtype).astype(np.float32)
    same = replace(linear, bias=stored_bias, input_scale=rounded)
    np.testing.assert_allclose(engine_output(tensors, x), ideal_output(same, x), rtol=3e-7, atol=1e-7)


def test_the_layout_of_a_quantized_layer() -> None:
    linear = random_quantized(3, 5, 1, bias=True)
    tensors = FORM.encode_linear(MODULE, linear, "bfloat16")
    found = {name.removeprefix(f"{MODULE}."): (array.dtype, array.shape) for name, array in tensors.items()}
    assert found == {
        "weight": (np.dtype(np.int8), (3, 5)),
        "deq_scale": (np.dtype(np.float32), (3,)),
        "quant_bias": (np.dtype(np.int32), (3,)),
        "input_scale": (np.dtype(ml_dtypes.bfloat16), (5,)),
        "input_offset": (np.dtype(np.int8), (5,)),
        "bias": (np.dtype(ml_dtypes.bfloat16), (3,)),
    }
    assert linear.input_offset is not None
    expected = -(int(linear.input_offset[0]) * linear.weight.astype(int)).sum(axis=1)
    np.testing.assert_array_equal(tensors[f"{MODULE}.quant_bias"], expected)


def test_deq_scale_is_made_of_the_input_scale_that_is_stored() -> None:
    linear = random_quantized(4, 8, 2)
    tensors = FORM.encode_linear(MODULE, linear, "bfloat16")
    stored = tensors[f"{MODULE}.input_scale"][0].astype(np.float64)
    assert stored != np.float64(linear.input_scale[0])
    np.testing.assert_array_equal(
        tensors[f"{MODULE}.deq_scale"], (stored * linear.weight_scale.astype(np.float64)).astype(np.float32)
    )


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_comes_back(bias: bool, columns: bool) -> None:
    linear = random_quantized(6, 10, 3, bias=bias)
    linear = shifted(linear) if columns else linear
    back = decode_linear(MODULE, FORM.encode_linear(MODULE, linear, "float32"))
    assert back.scheme == linear.scheme
    np.testing.assert_array_equal(back.weight, linear.weight)
    np.testing.assert_allclose(back.weight_scale, linear.weight_scale, rtol=1.2e-7)
    np.testing.assert_array_equal(back.input_scale, linear.input_scale)
    np.testing.assert_array_equal(back.input_offset, linear.input_offset)
    assert back.input_offset is not None
    assert back.input_offset.dtype == np.int32
    assert (back.bias is None) == (not bias)


def test_a_float_layer_is_stored_in_the_models_dtype() -> None:
    tensors = FORM.encode_linear(
        "head", FloatLinear(np.ones((2, 3), np.float32), np.ones(2, np.float32)), "float16"
    )
    assert {name: array.dtype for name, array in tensors.items()} == {
        "head.weight": np.float16,
        "head.bias": np.float16,
    }


def test_a_row_of_zeros_gives_zeros_whatever_its_scale() -> None:
    linear = random_quantized(3, 4, 0)
    linear.weight[1] = 0
    linear.weight_scale[1] = 0
    tensors = FORM.encode_linear(MODULE, linear, "bfloat16")
    assert (tensors[f"{MODULE}.deq_scale"] > 0).all()
    assert (engine_output(tensors, np.ones((2, 4)))[:, 1] == 0).all()


def replaced(**changes: object) -> QuantizedLinear:
    return QuantizedLinear(**{**vars(random_quantized(3, 4, 0)), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        (replaced(scheme=W8A8_DYNAMIC, input_scale=None, input_offset=None), "per token"),
        (replaced(input_scale=np.zeros(1, np.float32)), "not positive and finite"),
        (replaced(input_scale=np.full(1, -1, np.float32)), "not positive and finite"),
        (replaced(weight_scale=np.zeros(3, np.float32)), "not positive and finite"),
        (replaced(weight_scale=np.full(3, np.nan, np.float32)), "not positive and finite"),
        (
            replaced(weight_scale=np.full(3, 3e38, np.float32), input_scale=np.full(1, 9, np.float32)),
            "not positive",
        ),
        (replaced(input_scale=np.full(1, np.nan, np.float32)), "cannot hold"),
        (replaced(input_offset=np.full(1, 128, np.int32)), "zero point 128"),
        (replaced(bias=np.full(3, 1e9, np.float32)), "float16 cannot hold"),
    ],
)
def test_a_layer_that_cannot_be_stored_is_refused(linear: QuantizedLinear, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        FORM.encode_linear(MODULE, linear, "float16")
    assert caught.value.where is not None
    assert caught.value.where.startswith(MODULE)


def test_a_scale_that_underflows_in_the_models_dtype_is_refused() -> None:
    with pytest.raises(CheckpointError, match="not positive"):
        FORM.encode_linear(MODULE, replaced(input_scale=np.full(1, 1e-9, np.float32)), "float16")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(CheckpointError, match="int4"):
        cast("x", np.ones(3), "int4")


def test_the_sum_that_does_not_fit_32_bits_is_refused() -> None:
    columns = 2**17 + 1
    linear = replaced(
        weight=np.full((1, columns), -128, np.int8),
        weight_scale=np.ones(1, np.float32),
        input_offset=np.full(1, -128, np.int32),
    )
    with pytest.raises(CheckpointError, match="32 bits"):
        FORM.encode_linear(MODULE, linear, "bfloat16")


def test_a_folded_smooth_scale_is_refused_when_reading_back() -> None:
    tensors = FORM.encode_linear(MODULE, random_quantized(3, 4, 0), "bfloat16")
    tensors[f"{MODULE}.input_scale"][0] *= 2
    with pytest.raises(CheckpointError, match="one input scale a column"):
        decode_linear(MODULE, tensors)


def test_the_description_covers_a_bias_and_not_its_neighbours() -> None:
    names = ["a.q_proj.weight", "a.q_proj.bias", "a.q_proj_norm.weight", "embed.weight"]
    assert FORM.documents({"a.q_proj": W8A8}, names, {})[DESCRIPTION_NAME] == {
        "a.q_proj.bias": "W8A8",
        "a.q_proj.weight": "W8A8",
        "a.q_proj_norm.weight": "FLOAT",
        "embed.weight": "FLOAT",
    }


def test_the_dtype_of_old_and_new_configurations() -> None:
    assert model_dtype({"torch_dtype": "float16"}) == "float16"
    assert model_dtype({"dtype": "bfloat16", "torch_dtype": "float16"}) == "bfloat16"
    assert model_dtype({"dtype": 3}) is None


def test_a_written_folder_is_a_weight_source(tmp_path: Path) -> None:
    floating = "model.layers.1.mlp.down_proj"
    source = GoldenStickCheckpoint.open(write_folder(tmp_path / "m", float_modules=(floating,)))
    quantized = source.linear(MODULE)
    assert isinstance(quantized, QuantizedLinear)
    assert quantized.is_static
    assert quantized.weight.shape == (16, 16)
    assert isinstance(source.linear(floating), FloatLinear)
    assert source.tensor("model.embed_tokens.weight").shape == (CONFIG["vocab_size"], CONFIG["hidden_size"])
    assert "model.norm.weight" in source
    assert "lm_head.weight" not in source
    with pytest.raises(CheckpointError, match="I8"):
        source.tensor(f"{MODULE}.weight")


def test_a_layer_with_wrong_parts_is_not_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    change_tensors(folder, {f"{MODULE}.deq_scale": np.ones(16, np.int64)})
    with pytest.raises(CheckpointError, match="I64") as caught:
        GoldenStickCheckpoint.open(folder).linear(MODULE)
    assert "msquant inspect" in str(caught.value)


def test_equal_models_give_equal_folders(tmp_path: Path) -> None:
    first, second = write_folder(tmp_path / "a"), write_folder(tmp_path / "b")
    files = sorted(path.name for path in first.iterdir())
    assert files == sorted(path.name for path in second.iterdir())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
