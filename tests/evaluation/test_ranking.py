"""The one order of what quantization costs, by the noise that a part adds."""

import math

import pytest

from msquant.evaluation.ranking import noise_of, rank, rank_layers


def test_the_most_noise_comes_first_with_its_share() -> None:
    ranked = rank({"a": 1e-3, "b": 3e-3, "c": 0.0, "d": None})
    assert [row.key for row in ranked] == ["b", "a", "c"]
    assert [row.share for row in ranked] == pytest.approx([0.75, 0.25, 0])


def test_decibels_are_noise_on_another_scale() -> None:
    snr = {3: 20.0, 5: 30.0, 7: None, 9: 23.0103}
    ranked = rank_layers(snr)
    assert [row.key for row in ranked] == [3, 9, 5]
    assert ranked[0].noise == pytest.approx(0.01)
    assert ranked[0].share == pytest.approx(0.01 / (0.01 + 0.001 + 0.005), rel=1e-4)
    assert rank({key: noise_of(value) for key, value in snr.items()}) == ranked


def test_nothing_and_what_adds_nothing_have_no_share() -> None:
    assert rank({}) == rank({"a": None}) == []
    assert rank({"a": 0.0})[0].share == 0


@pytest.mark.parametrize("snr", [1e29, -1e29, 0.0])
def test_any_number_is_ranked(snr: float) -> None:
    ranked = rank_layers({0: snr, 1: 40.0})
    assert {row.key for row in ranked} == {0, 1}
    assert all(math.isfinite(row.noise) and 0 <= row.share <= 1 for row in ranked)
