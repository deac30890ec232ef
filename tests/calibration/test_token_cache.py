"""Token ids of large sources: computed once, by content."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.calibration import token_cache
from msquant.calibration.token_cache import cached_tokens


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MSQUANT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(token_cache, "LARGE", 10)
    monkeypatch.setattr(token_cache, "_STEP", 10)
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


class Encoder:
    """Counts what it encodes."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, tokenizer: Any, texts: Any) -> list[Any]:
        self.calls += 1
        return [np.array([len(word) for word in text.split()], np.int32) for text in texts]


TEXTS = ["one two three", "", "four five six"]


def test_a_large_source_is_tokenized_once_and_says_how_far_it_is(folder: Path) -> None:
    encode, said = Encoder(), []
    first = cached_tokens(None, folder, TEXTS, encode, said.append)
    assert said[-1].startswith("tokenizing 100%")
    calls = encode.calls
    again = cached_tokens(None, folder, TEXTS, encode)
    assert encode.calls == calls
    assert (
        [each.tolist() for each in again] == [each.tolist() for each in first] == [[3, 3, 5], [], [4, 4, 3]]
    )


def test_other_content_is_tokenized_anew(folder: Path) -> None:
    encode = Encoder()
    cached_tokens(None, folder, TEXTS, encode)
    calls = encode.calls
    cached_tokens(None, folder, ["one two three", "four", "five six"], encode)
    assert encode.calls > calls
    calls = encode.calls
    (folder / "tokenizer.json").write_text("{ }")
    cached_tokens(None, folder, TEXTS, encode)
    assert encode.calls > calls


def test_a_damaged_copy_is_made_again(folder: Path) -> None:
    cached_tokens(None, folder, TEXTS, Encoder())
    (kept,) = (folder / "cache" / "tokens").iterdir()
    kept.write_bytes(kept.read_bytes()[:50])
    encode = Encoder()
    assert cached_tokens(None, folder, TEXTS, encode)[0].tolist() == [3, 3, 5]
    assert encode.calls


def test_few_copies_are_kept(folder: Path) -> None:
    for number in range(12):
        cached_tokens(None, folder, [f"a long text {number}"], Encoder())
    assert len(list((folder / "cache" / "tokens").iterdir())) == 8


def test_a_small_source_is_not_kept(folder: Path) -> None:
    cached_tokens(None, folder, ["short"], Encoder())
    assert not (folder / "cache").exists()
