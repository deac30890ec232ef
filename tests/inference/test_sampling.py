"""Greedy and nucleus sampling, held to the logits processors of transformers."""

import numpy as np
import pytest

from msquant.errors import EngineError
from msquant.inference.engine_protocol import Sampling
from msquant.inference.sampling import Sampler, top_p_probabilities


@pytest.fixture
def logits() -> np.ndarray:
    return (3 * np.random.default_rng(5).standard_normal(1000)).astype(np.float32)


@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 1.0])
def test_probabilities_equal_those_of_transformers(
    logits: np.ndarray, temperature: float, top_p: float
) -> None:
    import torch
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    scores = torch.tensor(logits, dtype=torch.float64)[None]
    scores = TemperatureLogitsWarper(temperature)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = torch.softmax(scores, dim=-1)[0].numpy()
    found = top_p_probabilities(logits, temperature, top_p)
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-300)


def test_most_probable_token_is_kept_when_it_exceeds_top_p_alone() -> None:
    found = top_p_probabilities(np.array([0.0, 20.0, 0.0], np.float32), temperature=1.0, top_p=0.1)
    assert found.tolist() == [0.0, 1.0, 0.0]


def test_tiny_temperature_does_not_overflow(logits: np.ndarray) -> None:
    assert Sampler(Sampling(temperature=1e-9)).next_token(logits) == logits.argmax()


def test_temperature_0_takes_the_most_probable_token(logits: np.ndarray) -> None:
    sampler = Sampler(Sampling(temperature=0.0, top_p=0.5))
    assert {sampler.next_token(logits) for _ in range(5)} == {int(logits.argmax())}


def test_draws_follow_the_probabilities() -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.9))
    logits = np.log(probabilities).astype(np.float32)
    draws = [sampler.next_token(logits) for _ in range(4000)]
    found = np.bincount(draws, minlength=4) / len(draws)
    # Five standard deviations of a share of 4,000 draws; the last token is outside of the nucleus.
    np.testing.assert_allclose(found, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=5 * 0.5 / 4000**0.5)
    assert found[3] == 0


def test_same_seed_same_tokens(logits: np.ndarray) -> None:
    def draw(seed: int, sequence: int = 0) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, top_p=1.0, seed=seed), sequence)
        return [sampler.next_token(logits) for _ in range(20)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    assert draw(1, sequence=0) != draw(1, sequence=1)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_logits(logits: np.ndarray, bad: float, temperature: float) -> None:
    logits[3] = bad
    with pytest.raises(EngineError, match="NaN or infinite"):
        Sampler(Sampling(temperature=temperature)).next_token(logits)
