"""Where a text ends, in whatever pieces it comes."""

import itertools
import random

import pytest

from msquant.inference.answer import StopStrings


def passed(text: str, stop: list[str], cuts: list[int]) -> tuple[list[str], bool]:
    """The pieces that come through when `text` is cut at `cuts`, and whether a stop string ended it."""
    strings = StopStrings(stop)
    edges = [0, *cuts, len(text)]
    pieces = [strings.add(text[a:b]) for a, b in itertools.pairwise(edges)]
    return [*pieces, strings.finish()], strings.reached


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one. Two.", ["."], "one"),
        ("one\n\ntwo", ["\n\n"], "one"),
        ("no such thing", ["thong"], "no such thing"),
        ("ab ab abc", ["abc"], "ab ab "),
        ("aaab", ["aab"], "a"),
        ("abcd", ["bcx", "d"], "abc"),
        ("abc", ["b", "abc"], "a"),
        ("abc", ["c", "abc"], ""),
        ("text", [], "text"),
        ("begin STO", ["STOP"], "begin STO"),
    ],
)
def test_every_way_to_cut_the_text_gives_the_same(text: str, stop: list[str], expected: str) -> None:
    rng = random.Random(0)
    for cuts in [[], list(range(len(text))), *(sorted(rng.sample(range(len(text)), 2)) for _ in range(20))]:
        pieces, reached = passed(text, stop, cuts)
        assert "".join(pieces) == expected
        assert reached == (expected != text)


def test_certain_text_is_not_held_back() -> None:
    strings = StopStrings(["END"])
    assert [strings.add(piece) for piece in ("a", "bE", "N", "x", "EN", "D", "more")] == [
        *("a", "b", "", "ENx", "", "", "")
    ]
    assert strings.reached
    assert strings.finish() == ""
