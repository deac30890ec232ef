"""One decoder layer through golden-stick: what comes out computes nearly what went in."""

import mindspore as ms
import numpy as np
import pytest

from msquant.algorithms import make_algorithm
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.checkpoint.weights import FloatLinear, QuantizedLinear
from msquant.kernels import golden_stick
from msquant.kernels.layer_report import relative_error
from msquant.models.config_json import read_config
from msquant.models.device import use_device
from msquant.models.layers import DecoderLayer, positions
from msquant.quantization.layer_pass import quantize_layer
from tests.fixtures.policies import rules

NAME = "model.layers.0"
LENGTH = 16
# A short grid: these tests are about what is made of the choice.
GRID = {"algorithm": "osl-golden-stick", "smooth_alpha": (0.3, 0.5, 0.7), "weight_clip_ratio": (1.0, 0.9)}


@pytest.fixture
def parts(tiny_llama):
    dtype = use_device()
    golden_stick.set_log_level(verbose=False)
    config = read_config(tiny_llama)
    layer = DecoderLayer(config, Checkpoint.open(tiny_llama), NAME, dtype)
    hidden = ms.Tensor(np.random.default_rng(0).normal(size=(4, LENGTH, config.hidden_size)), ms.float32)
    return config, layer, [hidden], positions(config, LENGTH, dtype), dtype


def error(hidden, output, layer, places):
    """The relative error of a layer's output."""
    return relative_error(hidden[0].asnumpy(), output, layer(hidden[0], places).asnumpy())


def test_every_linear_is_int8_and_the_output_is_close(parts):
    config, layer, hidden, places, dtype = parts
    output = layer(hidden[0], places).asnumpy()

    result = quantize_layer(config, 0, layer, hidden, places, make_algorithm(**GRID))

    assert list(result.linears) == [f"{NAME}.{name}" for name in config.linears(0)]
    for name, linear in result.linears.items():
        assert isinstance(linear, QuantizedLinear)
        assert linear.weight.dtype == np.int8
        assert linear.weight.shape == config.shapes[f"{name}.weight"]
        assert linear.weight_scale.shape == linear.weight.shape[:1]
        assert np.abs(linear.weight.astype(np.int16)).max(axis=1).min() >= 127
        assert (linear.weight_scale > 0).all()
        assert linear.input_scale.shape == linear.input_offset.shape == (1,)
    quantized = DecoderLayer(config, result, NAME, dtype)
    assert 0 < error(hidden, output, quantized, places) < 0.01


def test_the_error_is_zero_for_the_layer_itself_and_one_for_no_layer(parts):
    _, layer, hidden, places, _ = parts
    output = layer(hidden[0], places).asnumpy()
    assert error(hidden, output, layer, places) == 0
    assert error(hidden, output, lambda batch, places: batch, places) == pytest.approx(1)


def test_skipped_linears_stay_in_floating_point(parts):
    config, layer, hidden, places, dtype = parts
    output = layer(hidden[0], places).asnumpy()
    policy = make_algorithm(**GRID, schemes=rules(skip=["lm_head", "down_proj"]))

    result = quantize_layer(config, 0, layer, hidden, places, policy)

    kinds = {name.rsplit(".", 1)[1]: type(linear) for name, linear in result.linears.items()}
    assert kinds.pop("down_proj") is FloatLinear
    assert set(kinds.values()) == {QuantizedLinear}
    assert [group.name for group in result.report.groups] == ["qkv", "o", "gate_up"]
    assert error(hidden, output, DecoderLayer(config, result, NAME, dtype), places) < 0.01


def test_linears_with_a_scale_per_token_are_not_searched(parts):
    config, layer, hidden, places, dtype = parts
    output = layer(hidden[0], places).asnumpy()
    policy = make_algorithm(**GRID, schemes=rules(dynamic=["down_proj"]))

    result = quantize_layer(config, 0, layer, hidden, places, policy)

    static = {name.rsplit(".", 1)[1]: linear.is_static for name, linear in result.linears.items()}
    assert static.pop("down_proj") is False
    assert all(static.values())
    assert [group.name for group in result.report.groups] == ["qkv", "o", "gate_up"]
    assert 0 < error(hidden, output, DecoderLayer(config, result, NAME, dtype), places) < 0.01
