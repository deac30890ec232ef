"""The tokens that are shown of two models, and the texts that they are taken from."""

import numpy as np
import pytest

from msquant.evaluation.inputs import Text
from msquant.evaluation.predictions import SHOWN, TOKENS, predictions

WORDS = {i: f" w{i}" for i in range(100)} | {200: "\N{REPLACEMENT CHARACTER}"}


def decode(ids: list[int]) -> str:
    """As SentencePiece does: without the space before the first word."""
    return "".join(WORDS[i] for i in ids).removeprefix(" ")


def text(name: str, length: int, token: int | None = None) -> Text:
    ids = np.arange(length) % 100 if token is None else np.full(length, token)
    return Text(name, np.stack([ids, ids]).astype(np.int32))


def test_the_middle_of_the_first_sequence_with_what_both_choose_there() -> None:
    one = text("prose", 64)
    # After every token the baseline finds the true next one, the other model the one after that.
    (found,) = predictions([one], [one.tokens + 1], [one.tokens + 2], decode)
    assert found.text == "prose"
    assert found.actual == found.expected == tuple(f" w{i}" for i in range(20, 44))
    assert found.found == tuple(f" w{i}" for i in range(21, 45))
    assert found.before == decode(list(range(20)))


@pytest.mark.parametrize("length", [2, 10, TOKENS, TOKENS + 1])
def test_a_short_text_is_shown_as_far_as_it_goes(length: int) -> None:
    one = text("short", length)
    (found,) = predictions([one], [one.tokens], [one.tokens], decode)
    assert len(found.actual) == len(found.expected) == len(found.found) == min(TOKENS, length - 1)
    assert found.before


def test_prose_comes_before_symbols() -> None:
    words = {1: " word", 2: "](", 3: " x ="}
    texts = [text("symbols", 40, 2), text("prose", 40, 1), text("code", 40, 3)]
    tokens = [one.tokens for one in texts]
    found = predictions(texts, tokens, tokens, lambda ids: "".join(words[i] for i in ids))
    assert [one.text for one in found] == ["prose", "code", "symbols"]


def test_texts_in_parts_of_characters_come_last() -> None:
    texts = [text("parts", 40, 200), *(text(name, 40) for name in ("a", "b", "c"))]
    tokens = [one.tokens for one in texts]
    assert [one.text for one in predictions(texts, tokens, tokens, decode)] == ["a", "b", "c"]
    assert [one.text for one in predictions(texts[:2], tokens[:2], tokens[:2], decode)] == ["a", "parts"]
    assert SHOWN == 3
