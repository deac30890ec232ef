"""Linear layers in msModelSlim's layout: written, computed as vllm-ascend does, read back."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from msquant.checkpoint.tensor_spec import TensorSpec
from msquant.checkpoint.weights import FloatLinear, QuantizedLinear, as_computed
from msquant.errors import CheckpointError
from msquant.formats.ascend_layout import decode_linear, encode_linear, linear_specs
from msquant.schemes import W8A8, W8A8_DYNAMIC, W8A16, Scheme
from tests.formats.layers import ideal_output, random_layer

MODULE = "model.layers.0.self_attn.q_proj"
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def ascend_output(tensors: dict[str, np.ndarray], x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Its parameters (w8a8_static.py, w8a8_dynamic.py), and the operators' arithmetic without their rounding.

    The loader copies every tensor into a parameter of the dtype given here, in which the reciprocal of the
    input's scale is computed too. `npu_quantize` multiplies by that; `npu_quant_matmul` reads int64 scales as
    the bits of float32, and adds its bias to the sums with static scales, to the result with per-token ones.
    """
    parts = {name.removeprefix(f"{MODULE}."): torch.from_numpy(a) for name, a in tensors.items()}
    inputs, weight = torch.from_numpy(x), parts["weight"].to(torch.int32)
    if "deq_scale" not in parts:
        scale = inputs.abs().amax(dim=-1, keepdim=True) / 127
        x_q = torch.round(inputs / scale).to(torch.int32)
        y = (x_q @ weight.T).double() * scale.double() * parts["weight_scale"].to(dtype).double().T
        return (y + parts["bias"].double() if "bias" in parts else y).numpy()
    reciprocal, offset = 1 / parts["input_scale"].to(dtype), parts["input_offset"].to(torch.int8)
    assert reciprocal.dtype == dtype
    deq_scale = parts["deq_scale"]
    if dtype == torch.float16:
        assert deq_scale.dtype == torch.int64
        deq_scale = deq_scale.to(torch.int32).view(torch.float32)
    assert deq_scale.dtype == torch.float32
    x_q = torch.clamp(torch.round(inputs * reciprocal.double() + offset), -128, 127).to(torch.int32)
    return ((x_q @ weight.T + parts["quant_bias"]).double() * deq_scale.double()).numpy()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_vllm_ascend_computes_the_layer(dtype: str, dynamic: bool, seed: int) -> None:
    tensors = encode_linear(MODULE, random_layer(12, 40, seed, dynamic=dynamic), dtype)
    x = np.random.default_rng(seed).normal(size=(9, 40))
    y = ascend_output(tensors, x, TORCH[dtype])
    np.testing.assert_allclose(
        y, ideal_output(decode_linear(MODULE, tensors, dtype), x), rtol=3e-7, atol=1e-7
    )


def test_a_scale_of_another_tool_is_computed_with_the_reciprocal_that_the_engine_rounds() -> None:
    """In bfloat16 1 / (255 / 8192) is 32, 0.4 % off: an exact reciprocal gives other integers."""
    tensors = encode_linear(MODULE, random_layer(12, 40, 1), "bfloat16")
    tensors[f"{MODULE}.input_scale"][:] = 255 / 8192
    x = np.random.default_rng(1).normal(size=(200, 40))
    y = ascend_output(tensors, x, torch.bfloat16)
    served, exact = (ideal_output(decode_linear(MODULE, tensors, dtype), x) for dtype in ("bfloat16", None))
    np.testing.assert_allclose(y, served, rtol=3e-7, atol=1e-7)
    assert np.linalg.norm(y - exact) > 1e-3 * np.linalg.norm(exact)


def test_a_scale_without_a_reciprocal_in_float16_is_refused() -> None:
    layer = replace(random_layer(3, 5, 1), input_scale=np.float32([1e-5]))
    with pytest.raises(
        CheckpointError, match=r"reciprocal of its input scale 1\.001e-05 is infinite or 0 in float16"
    ):
        encode_linear(MODULE, layer, "float16")
    tensors = encode_linear(MODULE, layer, "bfloat16")
    with pytest.raises(CheckpointError, match="not positive and finite"):
        decode_linear(MODULE, tensors, "float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("seed", range(4))
def test_a_bias_is_added_to_half_a_step_of_the_sums(dtype: str, seed: int) -> None:
    tensors = encode_linear(MODULE, random_layer(12, 40, seed, bias=True), dtype)
    x = np.random.default_rng(seed).normal(size=(9, 40))
    back = decode_linear(MODULE, tensors, dtype)
    assert back.input_scale is not None
    error = np.abs(ascend_output(tensors, x, TORCH[dtype]) - ideal_output(back, x))
    assert (error <= 0.5001 * back.weight_scale * back.input_scale).all()
    # Without the bias it would be far away.
    assert np.abs(back.bias).max() > 100 * error.max()


def test_the_bias_of_per_token_activations_is_added_as_it_is() -> None:
    tensors = encode_linear(MODULE, random_layer(12, 40, 3, bias=True, dynamic=True), "bfloat16")
    x = np.random.default_rng(3).normal(size=(9, 40))
    y = ascend_output(tensors, x, torch.bfloat16)
    expected = ideal_output(decode_linear(MODULE, tensors, "bfloat16"), x)
    np.testing.assert_allclose(y, expected, rtol=3e-7, atol=1e-7)


@pytest.mark.parametrize("bias", [False, True])
def test_vllm_ascend_computes_a_layer_with_int8_weights_alone(bias: bool) -> None:
    """As w8a16.py has it: `npu_weight_quant_batchmatmul` dequantizes to `(weight + offset) * scale`."""
    linear = replace(random_layer(12, 40, 3, bias=bias, dynamic=True), scheme=W8A16)
    tensors = encode_linear(MODULE, linear, "bfloat16")
    parts = {name.removeprefix(f"{MODULE}."): torch.from_numpy(a).double() for name, a in tensors.items()}
    scale = parts["weight_scale"].bfloat16().double()
    x = np.random.default_rng(3).normal(size=(9, 40))
    y = torch.from_numpy(x) @ ((parts["weight"] + parts["weight_offset"]) * scale).T
    back = decode_linear(MODULE, tensors, "bfloat16", W8A16)
    assert back.scheme == W8A16
    floats = as_computed(back)
    expected = x @ floats.weight.T.astype(np.float64)
    if bias:
        y, expected = y + parts["bias"], expected + floats.bias
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scheme", [W8A8, W8A8_DYNAMIC, W8A16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_specs_are_those_of_the_tensors(scheme: Scheme, bias: bool, dtype: str) -> None:
    linear = random_layer(3, 5, 1, dynamic=not scheme.is_static, bias=bias)
    tensors = encode_linear(MODULE, replace(linear, scheme=scheme), dtype)
    specs = linear_specs(MODULE, (3, 5), scheme, dtype, bias)
    assert {spec.name: spec for spec in specs} == {n: TensorSpec.of(n, a) for n, a in tensors.items()}


def test_the_layout_of_a_static_layer() -> None:
    tensors = encode_linear(MODULE, random_layer(3, 5, 1, bias=True), "bfloat16")
    found = {name.removeprefix(f"{MODULE}."): (array.dtype, array.shape) for name, array in tensors.items()}
    assert found == {
        "weight": (np.dtype(np.int8), (3, 5)),
        "quant_bias": (np.dtype(np.int32), (3,)),
        "input_scale": (np.dtype(np.float32), (1,)),
        "input_offset": (np.dtype(np.float32), (1,)),
        "deq_scale": (np.dtype(np.float32), (3,)),
        "bias": (np.dtype(np.float32), (3,)),
    }


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_read_back_is_what_went_in(dtype: str, bias: bool) -> None:
    linear = random_layer(12, 40, 5, bias=bias)
    back = decode_linear(MODULE, encode_linear(MODULE, linear, dtype))
    np.testing.assert_array_equal(back.weight, linear.weight)
    np.testing.assert_allclose(back.weight_scale, linear.weight_scale, rtol=2e-7)
    np.testing.assert_array_equal(back.input_offset, linear.input_offset)
    assert (back.bias is None) == (linear.bias is None)
    again = decode_linear(MODULE, encode_linear(MODULE, back, dtype))
    np.testing.assert_array_equal(again.input_scale, back.input_scale)
    np.testing.assert_allclose(again.weight_scale, back.weight_scale, rtol=2e-7)
    if bias:
        np.testing.assert_array_equal(again.bias, back.bias)


def test_a_bias_that_is_only_in_quant_bias_is_found() -> None:
    linear = random_layer(12, 40, 5, bias=True)
    tensors = encode_linear(MODULE, linear, "bfloat16")
    bias, deq_scale = tensors.pop(f"{MODULE}.bias"), tensors[f"{MODULE}.deq_scale"]
    back = decode_linear(MODULE, tensors)
    assert back.bias is not None
    assert (np.abs(back.bias - bias) <= 0.5001 * deq_scale).all()


def test_float_layers_are_rounded_to_the_models_dtype() -> None:
    tensors = encode_linear(
        MODULE, FloatLinear(np.ones((2, 2), np.float32), np.ones(2, np.float32)), "bfloat16"
    )
    assert {array.dtype for array in tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}


def test_a_bias_too_large_for_the_sums_is_refused() -> None:
    linear = random_layer(3, 5, 1, bias=True)
    huge = QuantizedLinear(
        **{**vars(linear), "bias": np.full(3, 3e4, np.float32), "weight_scale": np.full(3, 1e-7, np.float32)}
    )
    with pytest.raises(CheckpointError, match="does not fit 32 bits") as caught:
        encode_linear(MODULE, huge, "bfloat16")
    assert f"{MODULE}.quant_bias" in str(caught.value)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("input_scale", np.zeros(1, np.float32), "not positive and finite"),
        ("deq_scale", np.full(3, -1, np.float32), "not positive and finite"),
        ("input_offset", np.array([3.5], np.float32), "is not an integer"),
        ("input_offset", np.array([200.0], np.float32), "is not an integer in"),
    ],
)
def test_stored_parts_that_make_no_sense_are_refused(part: str, value: np.ndarray, message: str) -> None:
    tensors = encode_linear(MODULE, random_layer(3, 5, 1), "bfloat16")
    with pytest.raises(CheckpointError, match=message):
        decode_linear(MODULE, {**tensors, f"{MODULE}.{part}": value})


def test_asymmetric_weights_are_refused() -> None:
    tensors = encode_linear(MODULE, random_layer(3, 5, 1, dynamic=True), "bfloat16")
    tensors[f"{MODULE}.weight_offset"][1] = 2
    with pytest.raises(CheckpointError, match="is not zero"):
        decode_linear(MODULE, tensors)
