"""The fast search is golden-stick's: the same alpha, clip ratio, int8 weight and scale for everything."""

from itertools import pairwise

import mindspore as ms
import numpy as np
import pytest

from msquant.algorithms.smoothers import least_loss
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.errors import CalibrationError
from msquant.kernels import golden_stick
from msquant.models.config_json import read_config
from msquant.models.device import use_device
from msquant.models.layers import DecoderLayer, positions
from msquant.quantization.layer_pass import quantize_layer
from tests.fixtures.policies import policy_of
from tests.fixtures.tiny_families import write_tiny
from tests.fixtures.tiny_model import write_tiny_llama

INDEX = 1
NAME = "model.layers.1"
SAMPLES, LENGTH = 4, 24
ALPHAS = (0.1, 0.3, 0.45, 0.6, 0.75, 0.9)


def hidden_states(size):
    """Inputs with outlier channels and one massive token a sample, as decoder layers have them."""
    hidden = np.random.default_rng(0).normal(size=(SAMPLES, LENGTH, size)).astype(np.float32)
    hidden[:, :, 5] *= 20
    hidden[:, 0] *= 5
    return ms.Tensor(hidden)


def run_pass(folder, batch, part="whole", **policy):
    dtype = use_device()
    golden_stick.set_log_level(verbose=False)
    config = read_config(folder)
    layer = DecoderLayer(config, Checkpoint.open(folder), NAME, dtype, part)
    hidden = hidden_states(config.hidden_size)
    batches = [hidden[start : start + batch] for start in range(0, SAMPLES, batch)]
    places = positions(config, LENGTH, dtype)
    policy = policy_of(**({"algorithm": "osl-golden-stick"} | policy))
    return quantize_layer(config, INDEX, layer, batches, places, policy)


CASES = {
    "grouped queries": ("llama", "whole", {}),
    "one key per query, biases": (
        "llama",
        "whole",
        {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True},
    ),
    "query and key norms": ("qwen3", "whole", {}),
    "latent attention": ("deepseek_v3", "attention", {}),
    "latent attention, queries of full rank": ("deepseek_v3", "attention", {"q_lora_rank": None}),
}


@pytest.mark.parametrize("case", CASES)
def test_fast_search_equals_golden_sticks_own(case, tmp_path):
    model_type, part, overrides = CASES[case]
    folder = write_tiny(tmp_path / "model", model_type, **overrides)
    reference = run_pass(folder, 2, part, reference=True, smooth_alpha=ALPHAS)
    fast = run_pass(folder, 2, part, smooth_alpha=ALPHAS)

    expected = {group.name: group.alpha for group in reference.report.groups}
    assert {group.name: group.alpha for group in fast.report.groups} == expected
    assert len(set(expected.values())) > 1, "a case where all groups choose alike shows nothing"
    for ours, theirs in zip(fast.report.groups, reference.report.groups, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-5)
    for name, theirs in reference.report.clip_ratios.items():
        np.testing.assert_allclose(fast.report.clip_ratios[name], theirs, rtol=1e-6)
    for name, theirs in reference.linears.items():
        ours = fast.linears[name]
        np.testing.assert_array_equal(ours.weight, theirs.weight)
        np.testing.assert_allclose(ours.weight_scale, theirs.weight_scale, rtol=1e-6)
        np.testing.assert_allclose(ours.input_scale, theirs.input_scale, rtol=1e-6)
        np.testing.assert_array_equal(ours.input_offset, theirs.input_offset)
        if theirs.bias is not None:
            np.testing.assert_allclose(ours.bias, theirs.bias, rtol=1e-6)
    for name, theirs in reference.tensors.items():
        np.testing.assert_allclose(fast.tensors[name], theirs, rtol=1e-6)


def test_the_result_does_not_depend_on_the_batches(tmp_path):
    folder = write_tiny_llama(tmp_path / "model")
    results = [run_pass(folder, batch) for batch in (1, 2, SAMPLES)]
    for one, other in pairwise(results):
        assert [g.alpha for g in one.report.groups] == [g.alpha for g in other.report.groups]
        for name, linear in one.linears.items():
            np.testing.assert_array_equal(linear.weight, other.linears[name].weight)


@pytest.mark.parametrize(
    ("algorithm", "reference"), [("osl-golden-stick", False), ("osl-golden-stick", True), ("osl", False)]
)
def test_weights_without_a_finite_error_are_refused(tmp_path, algorithm, reference):
    folder = write_tiny_llama(tmp_path / "model")
    dtype = use_device()
    config = read_config(folder)
    layer = DecoderLayer(config, Checkpoint.open(folder), NAME, dtype)
    layer.mlp.down_proj.weight.set_data(layer.mlp.down_proj.weight * 1e36)
    places = positions(config, LENGTH, dtype)
    policy = policy_of(algorithm, reference=reference, smooth_alpha=(0.5,))
    with pytest.raises(CalibrationError, match="no alpha gives a finite error") as caught:
        quantize_layer(config, INDEX, layer, [hidden_states(config.hidden_size)], places, policy)
    assert NAME in str(caught.value)


@pytest.mark.parametrize("seed", range(20))
def test_giving_up_early_finds_what_an_exhaustive_search_finds(seed):
    generator = np.random.default_rng(seed)
    # Few distinct values, so that ties occur.
    table = generator.integers(0, 4, size=(10, 5)).astype(float)
    candidates = [i / 10 for i in range(10)]
    calls = []

    def loss(candidate, chunk):
        calls.append((candidate, chunk))
        return table[round(candidate * 10), chunk]

    best, least = least_loss(candidates, 5, loss)

    totals = table.sum(axis=1)
    assert least == totals.min()
    assert best == candidates[int(totals.argmin())]
    assert len(set(calls)) == len(calls) <= table.size
