"""Sequences that are continued together, on a model that says what it was asked."""

import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from msquant.errors import EngineError
from msquant.inference import batch
from msquant.inference.batch import DecodeBatch
from msquant.inference.engine_protocol import Sampling
from msquant.inference.sampling import Sampler

VOCABULARY = 50


class Cache:
    def __init__(self) -> None:
        self.tokens: list[int] = []


class Counter:
    """Continues n by n + 1; 13 makes it fail.

    Attributes:
        steps: how many tokens each sequence of each step had.
    """

    def __init__(self) -> None:
        self.steps: list[list[int]] = []
        self.caches: list[weakref.ref[Cache]] = []

    def new_cache(self) -> Cache:
        cache = Cache()
        self.caches.append(weakref.ref(cache))
        return cache

    def next_logits(self, batch: Sequence[tuple[Cache, Sequence[int]]]) -> NDArray[np.float32]:
        self.steps.append([len(tokens) for _, tokens in batch])
        logits = np.zeros((len(batch), VOCABULARY), np.float32)
        for row, (cache, tokens) in zip(logits, batch, strict=True):
            cache.tokens += tokens
            row[cache.tokens[-1] + 1] = np.nan if cache.tokens[-1] == 13 else 1
        return logits


@pytest.fixture
def model() -> Counter:
    return Counter()


@pytest.fixture
def together(model: Counter) -> DecodeBatch:
    return DecodeBatch(model)


def begin(together: DecodeBatch, ids: list[int], room: int = 4, ends: tuple[int, ...] = ()) -> Iterator[int]:
    return together.tokens(ids, Sampler(Sampling()), room, ends)


def test_iterators_advanced_in_turn_share_steps(together: DecodeBatch, model: Counter) -> None:
    sequences = [begin(together, [1]), begin(together, [10, 20]), begin(together, [30])]
    made = list(zip(*sequences, strict=True))
    assert made == [(2, 21, 31), (3, 22, 32), (4, 23, 33), (5, 24, 34)]
    # An iterator takes part from its first token on, and the first ones are a token ahead of the last.
    assert model.steps == [[1], [1, 2], [1, 1], [1, 1, 1], [1, 1, 1], [1]]


def test_none_is_more_than_a_token_ahead(together: DecodeBatch, model: Counter) -> None:
    fast, slow = begin(together, [1], room=9), begin(together, [20])
    assert next(slow) == 21
    assert list(fast) == list(range(2, 11))
    assert sum(map(sum, model.steps)) == 9 + 2
    assert list(slow) == [22, 23, 24]


def test_ends_after_an_end_token_or_without_room(together: DecodeBatch) -> None:
    assert list(begin(together, [5], ends=(7, 8))) == [6, 7]
    assert list(begin(together, [5], ends=(9,))) == [6, 7, 8, 9]
    assert list(begin(together, [5], room=1)) == [6]


def test_a_long_prompt_is_computed_in_pieces_beside_the_others(
    together: DecodeBatch, model: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "PREFILL_TOKENS", 8)
    short = begin(together, [1], room=9)
    next(short)
    assert next(begin(together, list(range(20)))) == 20
    assert model.steps == [[1], [1, 7], [8], [5]]
    assert next(short) == 3


def test_closed_and_dropped_iterators_free_their_caches(together: DecodeBatch, model: Counter) -> None:
    kept, closed, dropped = (begin(together, [1]) for _ in range(3))
    assert not model.caches, "nothing is taken before it is needed"
    assert [next(kept), next(closed), next(dropped)] == [2, 2, 2]
    closed.close()  # type: ignore[attr-defined]
    del dropped
    assert [cache() is not None for cache in model.caches] == [True, False, False]
    model.steps.clear()
    assert list(kept) == [3, 4, 5]
    # The token ahead was made with the others.
    assert all(len(step) == 1 for step in model.steps)


def test_a_sequence_that_fails_leaves_the_others(together: DecodeBatch) -> None:
    good, bad = begin(together, [1]), begin(together, [11])
    assert (next(good), next(bad)) == (2, 12)
    assert (next(good), next(bad)) == (3, 13)
    assert next(good) == 4
    with pytest.raises(EngineError, match="NaN"):
        next(bad)
    assert list(good) == [5]
