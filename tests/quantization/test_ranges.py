"""The channels' ranges that are reported, beside those of the inputs themselves."""

from pathlib import Path

import numpy as np
import pytest

from msquant.algorithms import make_algorithm
from msquant.algorithms.smoothers import Batch
from msquant.checkpoint.checkpoint_reader import Checkpoint
from msquant.kernels.layer_report import ChannelRanges
from msquant.kernels.ranges import channel_ranges
from msquant.models.config_json import read_config
from msquant.models.device import use_device
from msquant.models.layers import DecoderLayer, positions
from msquant.quantization.feed_forward_pass import FeedForwardPass
from tests.fixtures.policies import rules
from tests.fixtures.tiny_families import write_tiny
from tests.quantization.test_osl import CASES, LENGTH, NAME, hidden_states, run_pass

ALGORITHMS = [
    ("grouped queries", "osl", False),
    ("grouped queries", "osl-golden-stick", False),
    ("grouped queries", "osl-golden-stick", True),
    ("grouped queries", "smoothquant", False),
    ("latent attention", "smoothquant", True),
]


def inputs(folder: Path, part: str) -> dict[str, np.ndarray]:
    """What the linears of each group read in floating point, `[tokens, K]`."""
    dtype = use_device()
    config = read_config(folder)
    layer = DecoderLayer(config, Checkpoint.open(folder), NAME, dtype, part)
    batch = Batch(layer, hidden_states(config.hidden_size), positions(config, LENGTH, dtype))
    return {name: batch.states[step][1].asnumpy() for name, step in layer.step_of.items()}


@pytest.mark.parametrize(("case", "algorithm", "reference"), ALGORITHMS)
def test_ranges_are_those_of_the_inputs(case, algorithm, reference, tmp_path):
    model_type, part, overrides = CASES[case]
    folder = write_tiny(tmp_path / "model", model_type, **overrides)
    alphas = {"smooth_alpha": (0.5,), "smoothquant_alpha": 0.5}
    result = run_pass(
        folder, 2, part, algorithm=algorithm, reference=reference, weight_clip_ratio=(1.0,), **alphas
    )
    read = inputs(folder, part)
    assert len(result.report.groups) >= 4
    for group in result.report.groups:
        maxima = np.abs(read[group.name]).max(axis=0)
        smoothed = maxima / result.smooth_scales[group.name]
        assert group.before.largest == pytest.approx(maxima.max(), rel=1e-3)
        assert group.after.largest == pytest.approx(smoothed.max(), rel=1e-3)
        assert group.before.median <= group.before.p99 <= group.before.largest
        if (group.name, case) != ("o", "grouped queries"):
            # There the query heads of one key-value head count once.
            assert group.after.median == pytest.approx(np.median(smoothed), rel=1e-3)
            assert group.after.p99 == pytest.approx(np.quantile(smoothed, 0.99), rel=1e-3)


def test_smoothing_brings_outliers_down(tmp_path):
    folder = write_tiny(tmp_path / "model", "llama")
    groups = {group.name: group for group in run_pass(folder, 2, algorithm="smoothquant").report.groups}
    before, after = groups["qkv"].before, groups["qkv"].after
    assert after.largest / after.median < 0.6 * before.largest / before.median


def test_nothing_is_reported_of_what_is_not_smoothed(tmp_path):
    folder = write_tiny(tmp_path / "model", "llama")
    assert run_pass(folder, 2, algorithm="rtn").report.groups == []


@pytest.mark.parametrize(("index", "alpha"), [(0, 0.5), (1, 0.5), (1, None)])
def test_feed_forward_blocks_report_all_experts_as_one_group(index, alpha, tmp_path):
    folder = write_tiny(tmp_path / "model", "deepseek_v3")
    policy = make_algorithm(schemes=rules(dynamic=["mlp."]), feed_forward_alpha=alpha, min_expert_tokens=5)
    config = read_config(folder)
    block = FeedForwardPass(config, Checkpoint.open(folder), index, policy, use_device())
    hidden = np.random.default_rng(0).normal(size=(24, config.hidden_size)).astype(np.float32)
    block.forward(hidden)
    groups = block.groups()
    assert [group.name for group in groups] == ([] if alpha is None else ["gate_up", "down"])
    norm = Checkpoint.open(folder).tensor(f"model.layers.{index}.post_attention_layernorm.weight")
    x = hidden / np.sqrt(np.mean(hidden**2, axis=1, keepdims=True) + config.rms_norm_eps) * norm
    for group in groups:
        assert group.alpha == alpha
        assert group.before.largest > 0
        assert group.after != group.before
        if group.name == "gate_up":
            assert group.before.largest == pytest.approx(np.abs(x).max(), rel=1e-3)
            assert group.before.median == pytest.approx(np.median(np.abs(x).max(axis=0)), rel=1e-3)


def test_four_digits_are_kept():
    maxima = np.array([[0.0, 1.23456], [2.0, 98765.4]], np.float32)
    assert channel_ranges(maxima) == ChannelRanges(median=1.617, p99=95800.0, largest=98770.0)
