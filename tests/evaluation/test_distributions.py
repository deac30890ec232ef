"""Running sums over blocks of the vocabulary against the whole distributions in float64."""

import numpy as np
import pytest
from numpy.typing import NDArray

from msquant.evaluation.distributions import TOP, Distributions, Divergence

TOKENS, VOCABULARY = 11, 53


Logits = NDArray[np.float32]


def compared(
    reference: Logits, other: Logits, targets: NDArray[np.integer], width: int, rows: int
) -> tuple[Distributions, Distributions, Divergence]:
    """Both, block by block."""
    found = Distributions(targets), Distributions(targets)
    divergence = Divergence(*found)
    for first in range(0, reference.shape[1], width):
        for start in range(0, len(reference), rows):
            here = slice(start, min(start + rows, len(reference)))
            blocks = [
                distributions.add(here, first, logits[here, first : first + width])
                for distributions, logits in zip(found, (reference, other), strict=True)
            ]
            divergence.add(here, *blocks)
    return *found, divergence


@pytest.fixture(scope="module")
def logits() -> tuple[Logits, Logits]:
    rng = np.random.default_rng(0)
    # Ever greater, so that the greatest logit so far is another in every block; and one row the other way.
    reference = 3 * rng.normal(size=(TOKENS, VOCABULARY)) + np.linspace(0, 40, VOCABULARY)
    reference[0] = reference[0, ::-1]
    return reference.astype(np.float32), (reference + rng.normal(size=reference.shape)).astype(np.float32)


@pytest.mark.parametrize(("width", "rows"), [(VOCABULARY, TOKENS), (8, 4), (1, 1), (50, 11)])
def test_blocks_give_what_the_whole_gives(logits: tuple[Logits, Logits], width: int, rows: int) -> None:
    targets = np.arange(TOKENS) * 4
    targets[3] = -1
    reference, other, divergence = compared(*logits, targets, width, rows)

    p, q = (values.astype(np.float64) for values in logits)
    log_p = p - np.log(np.exp(p - p.max(1, keepdims=True)).sum(1, keepdims=True)) - p.max(1, keepdims=True)
    log_q = q - np.log(np.exp(q - q.max(1, keepdims=True)).sum(1, keepdims=True)) - q.max(1, keepdims=True)
    losses = -log_q[np.arange(TOKENS), targets]
    losses[3] = 0
    np.testing.assert_allclose(other.losses, losses, rtol=1e-12)
    np.testing.assert_allclose(divergence.kl, (np.exp(log_p) * (log_p - log_q)).sum(1), rtol=1e-9)
    wrong, power = divergence.squares
    np.testing.assert_allclose(wrong, np.square(p - q).sum(1), rtol=1e-12)
    np.testing.assert_allclose(power, np.square(p).sum(1), rtol=1e-12)
    best_p, best_q = (np.argsort(-values, axis=1)[:, :TOP] for values in (p, q))
    np.testing.assert_array_equal(reference.best, best_p)
    np.testing.assert_array_equal(divergence.same_best, best_p[:, 0] == best_q[:, 0])
    shared = [len({*a} & {*b}) / TOP for a, b in zip(best_p.tolist(), best_q.tolist(), strict=True)]
    np.testing.assert_allclose(divergence.shared_best, shared)


def test_equal_distributions_do_not_differ(logits: tuple[Logits, Logits]) -> None:
    _, _, divergence = compared(logits[0], logits[0], np.zeros(TOKENS, int), 8, 4)
    np.testing.assert_allclose(divergence.kl, 0, atol=1e-12)
    assert divergence.same_best.all()
    assert (divergence.shared_best == 1).all()


def test_extreme_logits_do_not_overflow() -> None:
    values = np.array([[1000.0, 0.0], [-1000.0, 0.0]], np.float32)
    found, _, divergence = compared(values, values, np.array([1, 1]), 1, 2)
    assert found.losses.tolist() == [1000.0, 0.0]
    assert divergence.kl.tolist() == [0.0, 0.0]


def test_a_vocabulary_of_fewer_than_five() -> None:
    values = np.array([[3.0, 1.0, 2.0]], np.float32)
    found, _, divergence = compared(values, -values, np.array([0]), 2, 1)
    assert found.best.tolist() == [[0, 2, 1, -1, -1]]
    assert divergence.shared_best.tolist() == [1.0]
    assert not divergence.same_best.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_shows_in_the_loss(bad: float) -> None:
    values = np.zeros((2, 6), np.float32)
    values[1, 4] = bad
    found, _, _ = compared(values, values, np.array([0, 0]), 2, 2)
    assert np.isfinite(found.losses).tolist() == [True, False]
