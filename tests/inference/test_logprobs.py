"""Log probabilities from logits, in order, with their ties."""

import numpy as np
import pytest

from msquant.errors import EngineError
from msquant.inference.engine_protocol import Sampling
from msquant.inference.logprobs import log_softmax, token_logprobs


def test_probabilities_sum_to_one_however_large_the_logits_are() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32) * 1e4
    found = log_softmax(logits)
    assert found.dtype == np.float64
    assert np.exp(found).sum(axis=1) == pytest.approx(1)
    assert found - found[:, :1] == pytest.approx((logits - logits[:, :1]).astype(float), rel=1e-6)


def test_of_equally_probable_tokens_the_first_comes_first() -> None:
    (one,) = token_logprobs(np.array([[0, 2, 1, 2, 2, 1]], np.float32), [0], 4)
    assert [token for token, _ in one.top] == [1, 3, 4, 2]
    assert one.token == 0
    assert one.logprob == pytest.approx(one.top[0][1] - 2)


@pytest.mark.parametrize("top", [0, 2, 3, 9])
def test_as_many_as_asked_for_and_as_there_are(top: int) -> None:
    (one,) = token_logprobs(np.array([[0, 1, 2]], np.float32), [2], top)
    assert [token for token, _ in one.top] == [2, 1, 0][:top]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(value: float) -> None:
    with pytest.raises(EngineError, match="NaN or infinite"):
        token_logprobs(np.array([[0, value]], np.float32), [0], 1)


@pytest.mark.parametrize("options", [{"logprobs": -1}, {"prompt_logprobs": -1}, {"max_tokens": 0}])
def test_values_out_of_range(options: dict[str, int]) -> None:
    with pytest.raises(EngineError, match=r"-1, it must not be negative|max_tokens is 0"):
        Sampling(**options)
    assert Sampling(max_tokens=0, prompt_logprobs=0).prompt_logprobs == 0
