"""W4A8_DYNAMIC in `int-quantized`: one int4 in a byte, as the package and vLLM have it, and back."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

from msquant.checkpoint.json_file import read_json
from msquant.checkpoint.weights import QuantizedLinear, token_scales
from msquant.errors import CheckpointError
from msquant.flows.conversion import open_quantized
from msquant.formats.compressed_tensors.form import CompressedTensorsFormat
from msquant.formats.compressed_tensors.layout import decode_linear
from msquant.kernels.cpu_linear import linear_layer
from msquant.kernels.weight_rounding import quantize_weight
from msquant.schemes import FLOAT, Scheme, parse_scheme
from tests.formats.expert_folders import QWEN, random_linear, schemes_of, write_experts
from tests.formats.folders import CONFIG, change_json, change_tensors

FORM = CompressedTensorsFormat()
WORDS = ("W4A8_DYNAMIC", "W4A8_DYNAMIC_G8")
DOWN = "model.layers.0.mlp.down_proj"
GROUP = "quantization_config", "config_groups", "group_0"


def rounded(word: str) -> tuple[np.ndarray, QuantizedLinear]:
    """A weight and what it is rounded to."""
    weight, scheme = np.random.default_rng(0).normal(size=(12, 64)).astype(np.float32), parse_scheme(word)
    assert scheme.weights is not None
    integers, scale, _ = quantize_weight(weight, "bfloat16", scheme.weights)
    return weight, QuantizedLinear(integers, scale, scheme)


@pytest.fixture(params=WORDS)
def word(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(word: str, tmp_path: Path) -> Path:
    schemes: dict[str, Scheme] = dict.fromkeys(schemes_of(CONFIG), parse_scheme(word))
    write_experts(tmp_path / "m", CONFIG, schemes=schemes, format_name="compressed-tensors")
    return tmp_path / "m"


def test_the_package_rounds_to_the_same_tensors(word: str) -> None:
    weight, linear = rounded(word)
    quant = linear.scheme.weights
    assert quant is not None
    arguments = QuantizationArgs(
        num_bits=4, symmetric=True, strategy=quant.granularity, group_size=quant.group_size
    )
    inputs = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, input_activations=inputs)
    package = BaseCompressor.load_from_registry("int-quantized")
    scales = torch.from_numpy(linear.weight_scale.reshape(12, -1))
    theirs = package.compress({"weight": torch.from_numpy(weight), "weight_scale": scales}, scheme)
    parts = FORM.encode_parts("m", linear, "bfloat16", None)
    assert parts["weight"].tobytes() == theirs["weight"].numpy().tobytes()
    assert parts["weight_scale"].shape == tuple(theirs["weight_scale"].shape)
    np.testing.assert_array_equal(parts["weight_scale"], theirs["weight_scale"].numpy())


def test_layers_come_back_as_they_were_written(word: str, folder: Path) -> None:
    opened = open_quantized(folder)
    assert FORM.validate(folder, verify_hashes=True) == []
    assert set(opened.linears.values()) == {parse_scheme(word)}
    for module, scheme in opened.linears.items():
        found = opened.weights.linear(module)
        expected = random_linear(module, found.weight.shape, scheme)
        assert isinstance(found, QuantizedLinear)
        assert isinstance(expected, QuantizedLinear)
        assert found.scheme == scheme
        np.testing.assert_array_equal(found.weight, expected.weight)
        np.testing.assert_array_equal(found.weight_scale, expected.weight_scale)


def test_the_section_says_what_vllm_looks_for(word: str, folder: Path) -> None:
    """`_is_dynamic_token_w4a8_int` of vLLM: int4, by channel or in groups, per-token int8 inputs."""
    section = read_json(folder / "config.json")["quantization_config"]
    group = section["config_groups"]["group_0"]
    assert section["format"] == "int-quantized"
    assert (group["weights"]["num_bits"], group["input_activations"]["num_bits"]) == (4, 8)
    assert group["weights"].get("group_size") == (8 if "G8" in word else None)
    assert group["weights"]["strategy"] == ("group" if "G8" in word else "channel")
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)


def test_the_embedded_engine_and_the_cell_compute_it(word: str) -> None:
    """Next to sums of integers, group by group, in float64."""
    import mindspore as ms

    from msquant.models.cells import linear_cell

    _, linear = rounded(word)
    x = np.random.default_rng(1).normal(size=(9, 64)).astype(np.float32)
    scale = token_scales(x)
    groups = linear.weight_scale.reshape(12, -1).astype(np.float64)
    inputs = np.rint(x / scale).astype(np.int64).reshape(9, groups.shape[1], -1)
    sums = np.einsum("tgk,ngk->tng", inputs, linear.weight.astype(np.int64).reshape(12, groups.shape[1], -1))
    expected = (sums * groups).sum(-1) * scale
    np.testing.assert_allclose(linear_layer(linear)(x), expected, rtol=2e-6, atol=1e-6)
    both = linear_layer(linear, linear)(x)
    np.testing.assert_array_equal(both[:, :12], both[:, 12:])
    cell = linear_cell(linear, ms.float32)
    np.testing.assert_allclose(cell(ms.Tensor(x)).asnumpy(), expected, rtol=2e-6, atol=1e-6)


def test_experts_and_attention_in_one_folder(tmp_path: Path) -> None:
    """The experts are the group of all linear layers, static attention has its own."""
    config = {**QWEN, "num_experts_per_tok": 2}
    schemes = schemes_of(config)
    experts = {module: parse_scheme("W4A8_DYNAMIC") for module in schemes if ".experts." in module}
    write_experts(tmp_path / "m", config, schemes=schemes | experts, format_name="compressed-tensors")
    assert FORM.validate(tmp_path / "m") == []
    assert open_quantized(tmp_path / "m").linears == schemes | experts


@pytest.mark.parametrize("word", ["W4A8_DYNAMIC_ASYM", "W4A8", "W6A8_DYNAMIC", "W4A4_DYNAMIC"])
def test_what_vllm_has_no_scheme_for_is_refused(word: str) -> None:
    linears = dict.fromkeys(schemes_of(CONFIG), parse_scheme(word))
    found = list(FORM.check(linears, CONFIG))
    assert f"is {word}: in this format msquant writes FLOAT, W8A8, W8A8_DYNAMIC, W4A8_DYNAMIC" in str(
        found[0]
    )
    assert not list(FORM.check(dict.fromkeys(linears, FLOAT), CONFIG))


def outside(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[3] = 9
    return array


@pytest.mark.parametrize("word", ["W4A8_DYNAMIC_G8"], indirect=True)
def test_broken_rules_are_found(folder: Path) -> None:
    linear = open_quantized(folder).weights.linear(DOWN)
    assert isinstance(linear, QuantizedLinear)
    changes = {f"{DOWN}.weight": outside(linear.weight.copy())}
    change_tensors(folder, changes, described=False)
    assert "holds -8 to 9, integers of 4 bits are -8 to 7" in str(FORM.validate(folder)[0])
    change_tensors(folder, {f"{DOWN}.weight_scale": linear.weight_scale[:, 1:]}, described=False)
    assert f"{DOWN}.weight_scale: has shape" in str(FORM.validate(folder)[0])
    (folder / "msquant.json").unlink()
    change_json(folder / "config.json", lambda config: group_of(config)["weights"].update(group_size=7))
    assert "which groups of 7 do not divide" in str(FORM.validate(folder)[0])


def group_of(config: dict[str, Any]) -> dict[str, Any]:
    for key in GROUP:
        config = config[key]
    return config


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"group_size": None}, "group_size of the weights of group_0 is None"),
        ({"group_size": 0}, "group_size of the weights of group_0 is 0"),
        ({"group_size": 200_000}, "group_size of the weights of group_0 is 200000"),
        ({"symmetric": False}, "symmetric of the weights of group_0 is False"),
        ({"strategy": "tensor"}, "strategy of the weights of group_0 is 'tensor'"),
        ({"actorder": "group"}, "actorder of the weights of group_0 is 'group'"),
        ({"num_bits": 3}, "num_bits of the weights of group_0 is 3, only 8 or 4 is read"),
    ],
)
@pytest.mark.parametrize("word", ["W4A8_DYNAMIC_G8"], indirect=True)
def test_what_a_group_may_not_say(folder: Path, change: dict[str, Any], problem: str) -> None:
    change_json(folder / "config.json", lambda config: group_of(config)["weights"].update(change))
    with pytest.raises(CheckpointError, match=problem):
        FORM.open(folder)


def test_a_group_of_zeros_gets_a_scale_and_others_are_refused() -> None:
    _, linear = rounded("W4A8_DYNAMIC_G8")
    weight, scale = linear.weight.copy(), linear.weight_scale.copy()
    weight[0, :8], scale[0, 0] = 0, 0
    empty = QuantizedLinear(weight, scale, linear.scheme)
    assert FORM.encode_parts("m", empty, "bfloat16", None)["weight_scale"][0, 0] == 1
    scale[1, 1] = np.nan
    with pytest.raises(CheckpointError, match="not positive and finite"):
        FORM.encode_parts("m", empty, "bfloat16", None)
    parts = {"m.weight": weight, "m.weight_scale": scale}
    with pytest.raises(CheckpointError, match="not positive and finite"):
        decode_linear("m", parts, linear.scheme)
