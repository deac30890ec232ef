"""AWQ's search beside its definition in torch, and its factors beside golden-stick's."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mindspore import Tensor
from mindspore_gs.ptq.algo_modules.mindone import AWQSmoother

from msquant.algorithms.loudness import SEARCH_RATIOS, LoudnessSearch, loudness_scale
from msquant.schemes import Scheme, parse_scheme

K = 24


def group(seed: int = 0, tokens: int = 200) -> tuple[list[Any], list[Any]]:
    """Inputs in two batches, whose channels go together and differ in loudness, and two weights."""
    random = np.random.default_rng(seed)
    mixed = np.eye(K) + 0.2 * random.standard_normal((K, K))
    x = (random.standard_t(3, size=(tokens, K)) @ mixed * np.geomspace(0.1, 30, K)).astype(np.float32)
    weights = [random.normal(size=(rows, K)).astype(np.float32) for rows in (10, 7)]
    return [x[:80], x[80:]], weights


def torch_loss(x: Any, weights: Any, alpha: float, scheme: Scheme) -> float:
    """What the loss stands for, in float64, with inputs that are really rounded."""
    assert scheme.weights is not None
    inputs = torch.tensor(np.concatenate(x), dtype=torch.float64)
    scale = inputs.abs().mean(0) ** alpha
    scale /= (scale.max() * scale.min()).sqrt()
    gram = inputs.T @ inputs / len(inputs)
    hessian = 0.7 * gram + 0.3 * torch.diag(gram.diag())
    loud = (gram.diag() / scale**2).reshape(-1, scheme.weights.group_size or K)
    given = inputs / scale
    step = given.abs().amax(1, keepdim=True) / 127
    rounding = torch.clamp(torch.round(given / step), -128, 127) * step - given
    error = power = 0.0
    for weight in weights:
        exact = torch.tensor(weight, dtype=torch.float64)
        groups = (exact * scale).reshape(len(exact), *loud.shape)
        best, chosen = torch.full(groups.shape[:2], torch.inf, dtype=torch.float64), torch.zeros_like(groups)
        for ratio in SEARCH_RATIOS:
            low, high = groups.amin(2).clamp(max=0) * ratio, groups.amax(2).clamp(min=0) * ratio
            unit, zero = 2 * torch.maximum(-low, high) / 15, torch.zeros_like(low)
            if not scheme.weights.symmetric:
                unit = (high - low) / 15
                zero = torch.clamp(torch.round(-8 - low / unit), -8, 7)
            unit, zero = unit[..., None], zero[..., None]
            kept = (torch.clamp(torch.round(groups / unit + zero), -8, 7) - zero) * unit
            found = ((kept - groups).square() * loud).sum(2)
            better = found < best
            best[better], chosen[better] = found[better], kept[better]
        change = (chosen.reshape(exact.shape) - exact * scale) / scale
        error += float(((change @ hessian) * change).sum())
        if scheme.is_dynamic:
            error += float((rounding @ (exact * scale).T).square().sum(1).mean())
        power += float(((exact @ hessian) * exact).sum())
    return error / power


@pytest.mark.parametrize("word", ["W4A16_CHANNEL", "W4A16_G8_ASYM", "W4A8_DYNAMIC"])
@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_the_loss_is_what_torch_computes(alpha: float, word: str) -> None:
    x, weights = group()
    scheme = parse_scheme(word)
    # Values on a tie may round the other way in float32; the inputs' rounding is an expectation.
    expected = torch_loss(x, weights, alpha, scheme)
    assert LoudnessSearch(x, weights, scheme).loss(alpha) == pytest.approx(expected, rel=5e-2)


def test_columns_of_loud_channels_gain_by_being_enlarged() -> None:
    x, weights = group()
    search = LoudnessSearch(x, weights, parse_scheme("W4A16_CHANNEL"))
    alphas = (0.0, 0.2, 0.35, 0.5)
    alpha, loss = search.best(alphas)
    assert alpha > 0
    assert loss == min(search.loss(each) for each in alphas)
    assert loss < search.loss(0.0)


@pytest.mark.parametrize("alpha", [0.0, 0.35, 0.6])
def test_the_factors_are_golden_sticks(alpha: float) -> None:
    magnitudes = np.random.default_rng(0).gamma(1, 1, size=K).astype(np.float32)
    policy = SimpleNamespace(algo_args={"duo_scaling": False})
    smoother = SimpleNamespace(is_gqa_wo_layer=False, get_layer_policy=lambda name: policy)
    linears = SimpleNamespace(curr_layer=[SimpleNamespace(layer_name="q_proj")])
    ones = Tensor(np.ones(K, np.float32))
    expected = AWQSmoother._calculate_smooth_scale(smoother, Tensor(magnitudes), ones, alpha, 1, 1, linears)
    np.testing.assert_allclose(loudness_scale(magnitudes, alpha), expected.asnumpy(), rtol=1e-5)


def test_silent_channels_stay_as_they_are_and_query_heads_share() -> None:
    x, weights = group()
    for batch in x:
        batch[:, 3] = 0
    scale = LoudnessSearch(x, weights, parse_scheme("W4A16_CHANNEL"), query_groups=(2, 3)).scale(0.5)
    assert np.isfinite(scale).all()
    heads = scale.reshape(2, 3, -1)
    np.testing.assert_array_equal(heads, np.broadcast_to(heads[:, :1], heads.shape))
    assert loudness_scale(np.array([0, 1, 4], np.float32), 0.5)[0] == 1


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid")
def test_huge_weights_have_no_finite_loss() -> None:
    x, weights = group()
    search = LoudnessSearch(x, [weights[0] * np.float32(1e38)], parse_scheme("W4A16_CHANNEL"))
    assert not np.isfinite(search.best((0.0, 0.5))[1])
