"""The choice of windows: deterministic, apart, spread, in proportion, and clear about too little text."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.calibration.builtin import Domain
from msquant.calibration.sources import load_texts
from msquant.calibration.tokens import calibration_batches, evaluation_tokens
from msquant.checkpoint.tokenizer import load_tokenizer
from msquant.errors import CalibrationError


class Numbers:
    """A tokenizer whose text is its tokens' numbers, so that a window says where it comes from."""

    def __init__(self, bos_token_id: int | None = None) -> None:
        self.bos_token_id = bos_token_id

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        prefix = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return prefix + [int(word) for word in text.split()]


def _domain(name: str, weight: float, start: int, count: int) -> Domain:
    return Domain(name, weight, [" ".join(map(str, range(start, start + count)))])


def _batches(domains: list[Domain], tokenizer: Any = None, **changes: int) -> np.ndarray[Any, Any]:
    options = {"samples": 8, "sequence_length": 10, "seed": 0} | changes
    return calibration_batches(domains, tokenizer or Numbers(), **options)


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return load_tokenizer(tiny_llama)


def test_builtin_with_a_real_tokenizer(tokenizer: Any) -> None:
    domains = load_texts("builtin")
    batches = _batches(domains, tokenizer, samples=16, sequence_length=128)
    assert batches.shape == (16, 128)
    assert batches.dtype == np.int32
    assert (batches < 512).all()
    texts = {domain.name: "\n\n".join(domain.texts) for domain in domains}
    middles = [tokenizer.decode(window[8:-8]).strip("\ufffd") for window in batches]
    found = [next((name for name, text in texts.items() if middle in text), None) for middle in middles]
    assert {name: found.count(name) for name in texts} == {
        "documentation": 8,
        "code": 3,
        "readme": 3,
        "legal": 1,
        "chinese": 1,
    }


def test_same_seed_same_samples_other_seed_others() -> None:
    domains = [_domain("a", 1, 0, 1000)]
    assert np.array_equal(_batches(domains), _batches(domains))
    assert not np.array_equal(_batches(domains), _batches(domains, seed=1))


def test_windows_are_contiguous_apart_and_one_in_each_stretch() -> None:
    batches = _batches([_domain("a", 1, 0, 1000)])
    assert (np.diff(batches, axis=1) == 1).all()
    assert (batches[:, 0] // 125).tolist() == list(range(8))
    assert (batches[:, -1] // 125).tolist() == list(range(8))


def test_text_that_just_suffices_is_used_whole() -> None:
    assert np.array_equal(_batches([_domain("a", 1, 0, 80)]).reshape(-1), np.arange(80))


def test_documents_are_joined_in_order() -> None:
    domain = Domain("a", 1, ["0 1 2 3", "4 5", "6 7 8 9"])
    assert _batches([domain], samples=1).tolist() == [list(range(10))]


def test_domains_take_turns_in_proportion() -> None:
    batches = _batches([_domain("a", 2, 0, 1000), _domain("b", 1, 1000, 1000), _domain("c", 1, 2000, 1000)])
    assert (batches[:, 0] // 1000).tolist() == [0, 1, 2, 0, 1, 2, 0, 0]


def test_others_give_what_a_short_domain_cannot() -> None:
    batches = _batches([_domain("a", 3, 0, 19), _domain("b", 1, 1000, 1000)])
    assert (batches[:, 0] // 1000).tolist() == [0, 1, 1, 1, 1, 1, 1, 1]


def test_samples_start_with_the_bos_token_the_model_will_see() -> None:
    batches = _batches([_domain("a", 1, 0, 80)], Numbers(bos_token_id=7))
    assert batches.shape == (8, 10)
    assert (batches[:, 0] == 7).all()
    assert (np.diff(batches[:, 1:], axis=1) == 1).all()


def test_too_little_text_says_how_much_there_is() -> None:
    with pytest.raises(CalibrationError, match=r"need 80 tokens, .* has 65, enough for 6 samples") as caught:
        _batches([_domain("a", 1, 0, 45), _domain("b", 1, 0, 20)])
    assert caught.value.where == "a, b"
    assert "at most 6 samples" in (caught.value.remedy or "")
    with pytest.raises(CalibrationError) as caught:
        _batches([_domain("a", 1, 0, 9)])
    assert "Shorten the sequence length" in (caught.value.remedy or "")


@pytest.mark.parametrize("domains", [[], [Domain("a", 1, [])]])
def test_no_text(domains: list[Domain]) -> None:
    with pytest.raises(CalibrationError, match="has 0"):
        _batches(domains)


@pytest.mark.parametrize(("name", "value"), [("samples", 0), ("sequence_length", 1), ("seed", -1)])
def test_number_out_of_range(name: str, value: int) -> None:
    with pytest.raises(CalibrationError, match=f"is {value}"):
        _batches([_domain("a", 1, 0, 1000)], **{name: value})


def test_evaluation_windows_are_spread_and_not_calibrated_on(tokenizer: Any) -> None:
    tokens = evaluation_tokens(tokenizer)
    assert tokens.shape == (8, 512)
    assert tokens.dtype == np.int32
    assert np.array_equal(tokens, evaluation_tokens(tokenizer))
    calibration = "\n\n".join(load_texts("builtin")[0].texts)
    middles = [tokenizer.decode(window[8:-8]) for window in tokens]
    assert len(set(middles)) == 8
    assert not any(middle in calibration for middle in middles)


def test_more_evaluation_windows_than_text(tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="1000 windows of 512 tokens are more than"):
        evaluation_tokens(tokenizer, sequences=1000)
