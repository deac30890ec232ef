"""msquant's OSL search beside golden-stick's own: one real SmolLM2 layer, 4 x 128 tokens, one run."""

import time
from typing import Any

import numpy as np

from benchmarks.rows import row
from benchmarks.smollm2 import float_folder
from benchmarks.texts import builtin_tokens

LAYER, SAMPLES, LENGTH, MIN_RATIO = 3, 4, 128, 50


def measure() -> list[dict[str, Any]]:
    """Quantize the layer both ways, on the same inputs."""
    from msquant.checkpoint.checkpoint_reader import Checkpoint
    from msquant.kernels import golden_stick
    from msquant.models.config_json import read_config
    from msquant.models.device import use_device
    from msquant.models.layers import DecoderLayer, positions
    from msquant.models.network import Embedding
    from msquant.quantization.layer_pass import quantize_layer
    from tests.fixtures.policies import policy_of

    folder, dtype = float_folder(), use_device()
    config, checkpoint = read_config(folder), Checkpoint.open(folder)
    tokens = builtin_tokens(folder, SAMPLES, LENGTH)
    places = positions(config, LENGTH, dtype)
    hidden = Embedding(config, checkpoint, dtype)(tokens)
    for index in range(LAYER):
        hidden = DecoderLayer(config, checkpoint, index, dtype)(hidden, places)

    golden_stick.set_log_level(verbose=False)
    seconds, results = {}, {}
    for reference in (False, True):
        layer = DecoderLayer(config, checkpoint, LAYER, dtype)
        started = time.monotonic()
        policy = policy_of("osl-golden-stick", reference=reference)
        results[reference] = quantize_layer(config, LAYER, layer, [hidden], places, policy)
        seconds[reference] = time.monotonic() - started
    ratio = seconds[True] / seconds[False]
    return [
        row("golden-stick's modules, s", round(seconds[True], 1)),
        row("msquant's modules, s", round(seconds[False], 2)),
        row("times faster", round(ratio, 1), f">= {MIN_RATIO}", ratio >= MIN_RATIO),
        *_differences(results[False], results[True]),
    ]


def _differences(ours: Any, theirs: Any) -> list[dict[str, Any]]:
    alphas = [[group.alpha for group in result.report.groups] for result in (ours, theirs)]
    changed = clipped = 0
    scales = 0.0
    for name, linear in theirs.linears.items():
        changed += int((ours.linears[name].weight != linear.weight).sum())
        scales = max(scales, *_relative(ours.linears[name], linear))
    for name, ratios in theirs.report.clip_ratios.items():
        clipped += int((np.abs(ours.report.clip_ratios[name] - ratios) > 1e-3).sum())
    rows = sum(len(linear.weight) for linear in theirs.linears.values())
    size = sum(linear.weight.size for linear in theirs.linears.values())
    # A tie may be broken either way, and a row that is clipped otherwise has other weights.
    same = None if clipped else True
    return [
        row("alphas of ours", str(alphas[0]), str(alphas[1]), alphas[0] == alphas[1]),
        row(f"rows with another clip ratio, of {rows}", clipped, "0, except on ties", same),
        row(f"int8 weights that differ, of {size}", changed, "0 without such rows", same and changed == 0),
        row("largest relative difference of scales", f"{scales:.1e}", "<= 1e-6", same and scales <= 1e-6),
    ]


def _relative(ours: Any, theirs: Any) -> tuple[float, float]:
    weight = np.abs(ours.weight_scale / theirs.weight_scale - 1).max()
    inputs = np.abs(ours.input_scale / theirs.input_scale - 1).max()
    return float(weight), float(inputs)
