"""Linear layers in the compressed-tensors layout: written, computed as vLLM does, read back."""

import ml_dtypes
import numpy as np
import pytest
import torch

from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.weights import FloatLinear, QuantizedLinear
from msquant.errors import CheckpointError
from msquant.formats.compressed_tensors_layout import decode_linear, encode_linear, exact_scale, linear_specs
from msquant.schemes import W8A8, W8A8_DYNAMIC
from tests.formats.layers import ideal_output, random_layer

MODULE = "model.layers.0.self_attn.q_proj"


def vllm_parameters(scale: torch.Tensor, zero_point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How vLLM recovers them from the range of a fused layer, on CUDA (scaled_mm/cutlass.py)."""
    azps = zero_point.to(torch.int32)
    high, low = (scale * (127 - azps)).max(), (scale * (-128 - azps)).min()
    recovered = (high - low) / 255
    return recovered, (-128 - low / recovered).to(torch.int32)


def vllm_output(tensors: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Its kernel's arithmetic: int8 in, int32 sums, the zero point taken out of the sums, two scales."""
    parts = {name.removeprefix(f"{MODULE}."): torch.from_numpy(a) for name, a in tensors.items()}
    inputs = torch.from_numpy(x)
    if "input_scale" in parts:
        scale, azp = vllm_parameters(parts["input_scale"], parts["input_zero_point"])
    else:
        scale, azp = inputs.abs().amax(dim=-1, keepdim=True) / 127, torch.tensor(0)
    x_q = torch.clamp(torch.round(inputs / scale.double()) + azp, -128, 127).to(torch.int32)
    sums = x_q @ parts["weight"].to(torch.int32).T - azp * parts["weight"].sum(dim=1, dtype=torch.int32)
    y = sums.double() * scale.double() * parts["weight_scale"].double().T
    return (y + parts["bias"].double() if "bias" in parts else y).numpy()


def as_torch_takes_it(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {n: a.astype(np.float32) if n.endswith("bias") else a for n, a in tensors.items()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_vllm_computes_the_layer(dtype: str, bias: bool, dynamic: bool, seed: int) -> None:
    tensors = encode_linear(MODULE, random_layer(12, 40, seed, dynamic=dynamic, bias=bias), dtype)
    x = np.random.default_rng(seed).normal(size=(9, 40))
    back = decode_linear(MODULE, tensors)
    y = vllm_output(as_torch_takes_it(tensors), x)
    np.testing.assert_allclose(y, ideal_output(back, x), rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("bfloat16", 2**-8), ("float16", 2**-11), ("float32", 2**-16)]
)
def test_what_is_read_back_is_what_went_in(dtype: str, tolerance: float) -> None:
    linear = random_layer(12, 40, 5, bias=True)
    assert linear.input_scale is not None
    back = decode_linear(MODULE, encode_linear(MODULE, linear, dtype))
    np.testing.assert_array_equal(back.weight, linear.weight)
    np.testing.assert_array_equal(back.weight_scale, linear.weight_scale)
    np.testing.assert_array_equal(back.input_offset, linear.input_offset)
    np.testing.assert_allclose(back.input_scale, linear.input_scale, rtol=tolerance)
    again = encode_linear(MODULE, back, dtype)
    for name, array in encode_linear(MODULE, linear, dtype).items():
        np.testing.assert_array_equal(again[name], array)


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_specs_are_those_of_the_tensors(scheme: str, bias: bool, dtype: str) -> None:
    tensors = encode_linear(MODULE, random_layer(3, 5, 1, dynamic=scheme == "dynamic", bias=bias), dtype)
    specs = linear_specs(MODULE, (3, 5), W8A8_DYNAMIC if scheme == "dynamic" else W8A8, dtype, bias)
    assert {spec.name: spec for spec in specs} == {n: TensorSpec.of(n, a) for n, a in tensors.items()}


def test_the_layout_of_a_static_layer() -> None:
    tensors = encode_linear(MODULE, random_layer(3, 5, 1, bias=True), "bfloat16")
    found = {name.removeprefix(f"{MODULE}."): (array.dtype, array.shape) for name, array in tensors.items()}
    assert found == {
        "weight": (np.dtype(np.int8), (3, 5)),
        "weight_scale": (np.dtype(np.float32), (3, 1)),
        "input_scale": (np.dtype(np.float32), (1,)),
        "input_zero_point": (np.dtype(np.int8), (1,)),
        "bias": (np.dtype(ml_dtypes.bfloat16), (3,)),
    }


def recovered(scale: np.float32, zero_point: int) -> int:
    found = vllm_parameters(torch.tensor([scale]), torch.tensor([zero_point], dtype=torch.int8))
    return int(found[1])


def test_vllm_recovers_every_zero_point_of_a_stored_scale() -> None:
    scales = np.random.default_rng(0).uniform(1e-4, 0.5, 60).astype(np.float32)
    lost = [
        (scale, zp)
        for scale in scales
        for zp in range(-128, 128, 5)
        if recovered(np.float32(scale), zp) != zp
    ]
    # Scales as they come lose some, by the kernel's truncation: what the rounding is for.
    assert lost
    assert all(recovered(exact_scale(np.float32(scale)), zp) == zp for scale, zp in lost)
    assert all(abs(exact_scale(np.float32(s)) / s - 1) < 2**-16 for s in scales)


def test_symmetric_static_activations_are_read_with_a_zero_point_of_0() -> None:
    tensors = encode_linear(MODULE, random_layer(3, 5, 1), "bfloat16")
    del tensors[f"{MODULE}.input_zero_point"]
    back = decode_linear(MODULE, tensors)
    assert back.input_offset is not None
    assert back.input_offset.tolist() == [0]


def test_one_scale_for_the_whole_weight_and_scalars_are_read() -> None:
    tensors = encode_linear(MODULE, random_layer(3, 5, 1), "bfloat16")
    tensors[f"{MODULE}.weight_scale"] = np.array(0.5, ml_dtypes.bfloat16)
    tensors[f"{MODULE}.input_scale"] = np.array(0.25, np.float16)
    back = decode_linear(MODULE, tensors)
    np.testing.assert_array_equal(back.weight_scale, np.full(3, 0.5, np.float32))
    np.testing.assert_array_equal(back.input_scale, np.full(1, 0.25, np.float32))


def test_a_row_of_zeros_gets_a_scale_that_engines_can_divide_by() -> None:
    linear = random_layer(2, 4, 1, dynamic=True)
    linear.weight[0], linear.weight_scale[0] = 0, 0
    assert encode_linear(MODULE, linear, "bfloat16")[f"{MODULE}.weight_scale"][0] == 1


def test_float_layers_are_rounded_to_the_models_dtype() -> None:
    tensors = encode_linear(MODULE, FloatLinear(np.full((2, 2), 0.1, np.float32)), "bfloat16")
    assert tensors[f"{MODULE}.weight"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scale": np.full(3, np.nan, np.float32)}, "weight scales are not positive and finite"),
        ({"weight_scale": np.zeros(3, np.float32)}, "weight scales are not positive and finite"),
        ({"input_scale": np.zeros(1, np.float32)}, "input scale 0 is not positive and finite in float16"),
        (
            {"input_scale": np.full(1, 1e-9, np.float32)},
            "input scale 1e-09 is not positive and finite in float16",
        ),
        ({"input_scale": np.full(1, 1e9, np.float32)}, "holds values that float16 cannot hold"),
        ({"input_offset": np.array([128], np.int32)}, "zero point 128 is outside of"),
    ],
)
def test_scales_that_no_engine_can_use_are_refused(changes: dict[str, np.ndarray], message: str) -> None:
    linear = random_layer(3, 5, 1)
    with pytest.raises(CheckpointError, match=message) as caught:
        encode_linear(MODULE, QuantizedLinear(**{**vars(linear), **changes}), "float16")
    assert MODULE in str(caught.value)


@pytest.mark.parametrize("part", ["weight_scale", "input_scale"])
def test_stored_scales_that_are_not_positive_are_refused(part: str) -> None:
    tensors = encode_linear(MODULE, random_layer(3, 5, 1), "bfloat16")
    tensors[f"{MODULE}.{part}"] = -tensors[f"{MODULE}.{part}"]
    with pytest.raises(CheckpointError, match="not positive and finite"):
        decode_linear(MODULE, tensors)
