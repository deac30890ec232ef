"""What two models find most likely to come next, token by token of the same text, for people to read.

Both are given the true text so far, and what they find is not fed back to them. So it is no text that a model
would write; and it costs nothing beside an evaluation, which computes these predictions in any case.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msquant.evaluation.inputs import Text

SHOWN, TOKENS = 3, 24
"""Texts, and tokens of each."""

_LOST = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Prediction:
    """Some tokens from the middle of a text's first sequence.

    Attributes:
        text: its name.
        before: the text that leads up to them.
        actual: the text's own tokens.
        expected: what the baseline finds most likely in the place of each, after the text's own tokens.
        found: what the other model finds.
    """

    text: str
    before: str
    actual: tuple[str, ...]
    expected: tuple[str, ...]
    found: tuple[str, ...]


def predictions(
    texts: Sequence[Text],
    expected: Sequence[NDArray[np.integer]],
    found: Sequence[NDArray[np.integer]],
    decode: Callable[[list[int]], str],
) -> list[Prediction]:
    """Take `TOKENS` tokens of each of `SHOWN` texts.

    Args:
        texts: that were evaluated.
        expected: `ModelScore.next_tokens` of the baseline.
        found: the same of the other model.
        decode: the text of some token ids.

    Returns:
        The texts that a person reads most easily: those where no token is a part of a character, and of
        these the ones with most letters and spaces.
    """
    shown = [
        _prediction(text, ours[0], theirs[0], decode)
        for text, theirs, ours in zip(texts, expected, found, strict=True)
    ]
    return sorted(shown, key=_difficulty)[:SHOWN]


def _difficulty(one: Prediction) -> tuple[bool, float]:
    text = "".join(one.actual)
    words = sum(character.isalpha() or character == " " for character in text)
    return _LOST in text, -words / max(1, len(text))


def _prediction(
    text: Text, found: NDArray[np.integer], expected: NDArray[np.integer], decode: Callable[[list[int]], str]
) -> Prediction:
    ids = [int(token) for token in text.tokens[0]]
    start = max(1, (len(ids) - TOKENS) // 2)
    places = range(start, min(start + TOKENS, len(ids)))

    def pieces(chosen: Sequence[int]) -> tuple[str, ...]:
        return tuple(
            _piece(ids[place - 1], token, decode) for place, token in zip(places, chosen, strict=True)
        )

    return Prediction(
        text=text.name,
        before=decode(ids[max(0, start - TOKENS) : start]),
        actual=pieces([ids[place] for place in places]),
        expected=pieces([int(expected[place - 1]) for place in places]),
        found=pieces([int(found[place - 1]) for place in places]),
    )


def _piece(before: int, token: int, decode: Callable[[list[int]], str]) -> str:
    """The text that a token adds; some tokenizers leave out the space before the first of several."""
    whole, first = decode([before, token]), decode([before])
    return whole.removeprefix(first) if whole.startswith(first) else decode([token])
