"""The search on held-out tokens: its loss against torch, and what it does about channels that wake up."""

import numpy as np
import pytest
import torch

from msquant.algorithms import held_out
from msquant.algorithms.held_out import Choice, GroupInputs, HeldOutSearch, typical_magnitudes
from msquant.kernels.weight_rounding import smoothed_and_rounded
from msquant.schemes import Quant

S, T, K, N = 4, 16, 24, 10


def group(seed=0, residual=False, **values):
    random = np.random.default_rng(seed)
    x = random.standard_t(3, size=(S, T, K)).astype(np.float32) * np.geomspace(0.1, 30, K).astype(np.float32)
    flat = x.reshape(-1, K)
    given = {
        "low": x.min(axis=1),
        "high": x.max(axis=1),
        "x": flat,
        "sample": np.repeat(np.arange(S), T),
        "residual": random.normal(size=(S * T, N)).astype(np.float32) if residual else None,
        "typical": random.uniform(0.5, 2, size=K).astype(np.float32),
    }
    weights = [random.normal(size=(n, K)).astype(np.float32) for n in (N, N)[: 1 if residual else 2]]
    return GroupInputs(**(given | values)), weights


def int8_rows(smoothed):
    unit = 2 * smoothed.abs().amax(1, keepdim=True) / 255
    return torch.clamp(torch.round(smoothed / unit), -128, 127) * unit


def torch_loss(inputs, weights, alpha, floor, per_token, shifted=False, rounded=int8_rows):
    """The definition in held_out.py, written down once more in float64."""
    x, low, high = (torch.tensor(v, dtype=torch.float64) for v in (inputs.x, inputs.low, inputs.high))
    typical, sample = torch.tensor(inputs.typical, dtype=torch.float64), torch.tensor(inputs.sample)
    weights = [torch.tensor(w, dtype=torch.float64) for w in weights]
    total = 0.0
    parts = 4 if per_token else 2
    for part in range(parts):
        others, rows = torch.arange(S) % parts != part, sample % parts == part
        least, most = low[others].amin(0), high[others].amax(0)
        maxima = (most - least) / 2 if shifted else torch.maximum(least.abs(), most.abs())
        if floor:
            maxima = torch.maximum(maxima, torch.quantile(maxima / typical, floor) * typical)
        columns = torch.cat(weights).abs().amax(0)
        scale = maxima**alpha / columns ** (1 - alpha)
        given = x[rows] / scale
        if per_token:
            given = given.float()
            step, offset = given.abs().amax(1, keepdim=True) / 127, 0.0
        elif shifted:
            first, last = least / scale, most / scale
            step = (last.clamp(min=0) - first.clamp(max=0)).max() / 255
            offset = torch.clamp(torch.round(-0.5 - (first + last) / 2 / step), -128, 127)
        else:
            first, last = (least / scale).min(), (most / scale).max()
            step = (last - first) / 255
            offset = torch.round(-128 - first / step)
        quantized = (torch.clamp(torch.round(given / step + offset), -128, 127) - offset).double() * step
        for w in weights:
            exact = x[rows] @ w.T
            read = exact if inputs.residual is None else exact + torch.tensor(inputs.residual)[rows]
            total += ((quantized @ rounded(w * scale).T - exact).square().sum(1) / read.square().sum(1)).sum()
    return float(total) / (len(x) * len(weights))


@pytest.mark.parametrize("inputs_are", ["static", "per_token", "shifted"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("alpha", "floor"), [(0.5, 0.0), (0.85, 0.75)])
def test_the_loss_is_what_torch_computes(alpha, floor, residual, inputs_are):
    inputs, weights = group(residual=residual)
    given = {} if inputs_are == "static" else {inputs_are: True}
    loss = HeldOutSearch(inputs, weights, **given).loss(alpha, floor)
    # A value on a tie may round the other way in float32.
    expected = torch_loss(inputs, weights, alpha, floor, inputs_are == "per_token", inputs_are == "shifted")
    assert loss == pytest.approx(expected, rel=2e-2)


def test_the_best_candidate_is_the_best_of_its_row_and_column():
    inputs, weights = group()
    search = HeldOutSearch(inputs, weights)
    alphas, floors = (0.3, 0.5, 0.7, 0.9), (0.0, 0.5, 0.9)
    choice = search.best(alphas, floors)
    assert choice.loss == min(search.loss(choice.alpha, floor) for floor in floors)
    first = min(floors, key=lambda floor: search.loss(0.9, floor))
    assert choice.alpha == min(alphas, key=lambda alpha: search.loss(alpha, first))


@pytest.mark.parametrize("per_token", [True, False])
def test_few_tokens_decide_who_stays_in_the_race(monkeypatch: pytest.MonkeyPatch, per_token: bool) -> None:
    inputs, weights = group()
    alphas, floors = tuple(i / 20 for i in range(20)), (0.0, 0.5, 0.9)
    whole = HeldOutSearch(inputs, weights, per_token=per_token)
    expected = whole.best(alphas, floors)
    monkeypatch.setattr(held_out, "FEW_TOKENS", 16)
    racing = HeldOutSearch(inputs, weights, per_token=per_token)
    found = racing.best(alphas, floors)
    assert (found.alpha, found.range_floor) == (expected.alpha, expected.range_floor)
    assert found.loss == pytest.approx(expected.loss, rel=1e-5)
    assert len(racing._all) < len(racing._few)


def test_the_loss_of_a_range_that_leaves_out_0() -> None:
    inputs, weights = group()
    lifted = {"low": inputs.low + 200, "high": inputs.high + 200, "x": inputs.x + 200}
    inputs, weights = group(**lifted)
    loss = HeldOutSearch(inputs, weights).loss(0.5, 0.0)
    assert loss == pytest.approx(torch_loss(inputs, weights, 0.5, 0.0, per_token=False), rel=5e-2)


@pytest.mark.usefixtures("product")
@pytest.mark.parametrize(
    "quant",
    [Quant(8, "channel"), Quant(4, "channel"), Quant(8, "group", 8), Quant(4, "group", 8, symmetric=False)],
)
def test_the_loss_with_other_integers(quant: Quant) -> None:
    inputs, weights = group()

    def rounded(smoothed: torch.Tensor) -> torch.Tensor:
        values = smoothed.numpy().astype(np.float32)
        return torch.tensor(smoothed_and_rounded(values, np.ones(K, np.float32), quant=quant)).double()

    loss = HeldOutSearch(inputs, weights, per_token=True, quant=quant).loss(0.5, 0.75)
    expected = torch_loss(inputs, weights, 0.5, 0.75, per_token=True, rounded=rounded)
    assert loss == pytest.approx(expected, rel=2e-2)


def test_channels_that_wake_up_in_other_samples_ask_for_a_floor():
    random = np.random.default_rng(1)
    x = random.normal(size=(S, T, K)).astype(np.float32)
    # In every sample another quarter of the channels is loud.
    for sample in range(S):
        x[sample, :, sample::S] *= 30
    inputs, weights = group(
        low=x.min(axis=1), high=x.max(axis=1), x=x.reshape(-1, K), typical=np.ones(K, np.float32)
    )
    search = HeldOutSearch(inputs, weights)
    grid = (0.5, 0.85)
    with_floor, without = search.best(grid, (0.0, 0.9)), search.best(grid, (0.0,))
    assert with_floor.range_floor == 0.9
    assert with_floor.loss < without.loss / 3


def test_a_floor_lifts_quiet_channels_alone():
    inputs, weights = group(typical=np.ones(K, np.float32))
    search = HeldOutSearch(inputs, weights)
    maxima = np.maximum(-inputs.low.min(axis=0), inputs.high.max(axis=0))
    loud = maxima >= np.quantile(maxima, 0.5)
    ratio = search.scale(Choice(1.0, 0.5, 0)) / search.scale(Choice(1.0, 0.0, 0))
    np.testing.assert_array_equal(ratio[loud], 1)
    assert (ratio[~loud] > 1).all()


def test_query_heads_of_one_key_value_head_share_their_scale():
    inputs, weights = group(query_groups=(2, 3))
    scale = HeldOutSearch(inputs, weights).scale(Choice(0.7, 0.75, 0)).reshape(2, 3, -1)
    np.testing.assert_array_equal(scale, np.broadcast_to(scale[:, :1], scale.shape))
    assert not np.array_equal(scale[0, 0], scale[1, 0])


def test_one_sample_is_measured_on_itself():
    inputs, weights = group()
    one = GroupInputs(inputs.low[:1], inputs.high[:1], inputs.x[:T], inputs.sample[:T], None, inputs.typical)
    assert 0 < HeldOutSearch(one, weights).best((0.5, 0.7), (0.0, 0.5)).loss < 1


@pytest.mark.filterwarnings("ignore:overflow")
def test_overflowing_weights_have_no_finite_loss():
    inputs, weights = group()
    assert not np.isfinite(HeldOutSearch(inputs, [weights[0] * 1e38]).best((0.5,), (0.0,)).loss)


def test_dead_channels_and_rows_change_nothing():
    inputs, weights = group()
    inputs.x[:, 3] = inputs.low[:, 3] = inputs.high[:, 3] = 0
    inputs.x[5] = 0
    search = HeldOutSearch(inputs, weights)
    assert np.isfinite(search.best((0.5, 0.85), (0.0, 0.9)).loss)
    assert np.isfinite(search.scale(Choice(0.85, 0.9, 0))).all()


def test_typical_magnitudes_of_a_norm_and_of_gated_rows():
    random = np.random.default_rng(0)
    norm, gate, up = random.normal(size=K), random.normal(size=(K, 5)), random.normal(size=(K, 5))
    np.testing.assert_allclose(typical_magnitudes(norm), np.abs(norm), rtol=1e-6)
    expected = np.linalg.norm(gate, axis=1) * np.linalg.norm(up, axis=1)
    np.testing.assert_allclose(typical_magnitudes(up, gate), expected, rtol=1e-6)
    norm[2] = 0
    assert (typical_magnitudes(norm) > 0).all()
