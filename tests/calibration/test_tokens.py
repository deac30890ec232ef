"""The choice of windows: deterministic, apart, spread, in proportion, and clear about too little text."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from msquant.calibration.builtin import WEIGHTS
from msquant.calibration.domains import Domain
from msquant.calibration.sources import load_texts
from msquant.calibration.tokens import Samples, SourceShare, choose_samples, evaluation_tokens
from msquant.checkpoint.tokenizer import load_tokenizer
from msquant.errors import CalibrationError


class Numbers:
    """A tokenizer whose text is its tokens' numbers, so that a window says where it comes from."""

    def __init__(self, bos_token_id: int | None = None) -> None:
        self.bos_token_id = bos_token_id

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        prefix = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return prefix + [int(word) for word in text.split()]

    def __call__(self, text: list[str], *, add_special_tokens: bool = True) -> dict[str, Any]:
        return {"input_ids": [self.encode(each, add_special_tokens=add_special_tokens) for each in text]}


def _domain(name: str, weight: float, start: int, count: int) -> Domain:
    return Domain(name, weight, [" ".join(map(str, range(start, start + count)))])


def _batches(domains: list[Domain], tokenizer: Any = None, **changes: int) -> np.ndarray[Any, Any]:
    return _samples([SourceShare("mine", domains)], tokenizer, **changes).tokens


def _samples(sources: list[SourceShare], tokenizer: Any = None, pack: bool = True, **changes: int) -> Samples:
    options = {"samples": 8, "sequence_length": 10, "seed": 0} | changes
    return choose_samples(sources, tokenizer or Numbers(), pack=pack, **options)


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
    assert {name: found.count(name) for name in texts} == WEIGHTS


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
    with pytest.raises(CalibrationError, match=r"8 samples of 10 tokens .* enough for 6") as caught:
        _batches([_domain("a", 1, 0, 45), _domain("b", 1, 0, 20)])
    assert caught.value.where == "mine"
    assert "at most 6 samples" in (caught.value.remedy or "")
    with pytest.raises(CalibrationError) as caught:
        _batches([_domain("a", 1, 0, 9)])
    assert "shorten the sequence length" in (caught.value.remedy or "")


@pytest.mark.parametrize("domains", [[], [Domain("a", 1, [])]])
def test_no_text(domains: list[Domain]) -> None:
    with pytest.raises(CalibrationError, match="enough for 0"):
        _batches(domains)


def _mix(*shares: tuple[int | None, float]) -> list[SourceShare]:
    return [
        SourceShare(f"s{i}", [_domain("a", 1, 1000 * i, 1000)], count, weight)
        for i, (count, weight) in enumerate(shares)
    ]


@pytest.mark.parametrize(
    ("shares", "counts"),
    [
        ([(3, 1), (None, 1)], [3, 5]),
        ([(None, 0.75), (None, 0.25)], [6, 2]),
        ([(2, 1), (None, 1), (None, 2)], [2, 2, 4]),
        ([(4, 1), (4, 1)], [4, 4]),
    ],
)
def test_sources_give_their_count_or_their_share(
    shares: list[tuple[int | None, float]], counts: list[int]
) -> None:
    samples = _samples(_mix(*shares))
    assert [samples.sources.count(i) for i in range(len(shares))] == counts
    assert (samples.tokens[:, 0] // 1000).tolist() == list(samples.sources)


def test_a_source_that_ends_early_is_named() -> None:
    short = SourceShare("short", [_domain("a", 1, 0, 25)], count=3)
    with pytest.raises(CalibrationError, match=r"3 samples of 10 tokens .* enough for 2") as caught:
        _samples([short, *_mix((None, 1))])
    assert caught.value.where == "short"


def test_more_counted_than_asked_for() -> None:
    with pytest.raises(CalibrationError, match="give 9 samples, and 8 are asked for"):
        _samples(_mix((9, 1), (None, 1)))


def test_rendered_documents_begin_samples_and_keep_their_own_tokens() -> None:
    texts = [" ".join(map(str, range(100 * i, 100 * i + 6))) for i in range(20)]
    samples = _samples([SourceShare("chat", [Domain("a", 1, texts, rendered=True)])], Numbers(bos_token_id=7))
    assert samples.tokens.shape == (8, 10)
    assert (samples.tokens[:, 0] % 100 == 0).all()
    assert (samples.tokens[:, 6] == samples.tokens[:, 0] + 100).all()


def test_unpacked_samples_are_documents_of_their_own_length() -> None:
    texts = [" ".join(map(str, range(100 * i, 100 * i + 2 + i))) for i in range(12)]
    samples = _samples([SourceShare("rows", [Domain("a", 1, texts)])], Numbers(bos_token_id=7), pack=False)
    assert (np.diff(samples.lengths) <= 0).all()
    assert samples.lengths.max() == 10
    for tokens, length in zip(samples.tokens, samples.lengths, strict=True):
        assert tokens[0] == 7
        assert tokens[1] % 100 == 0
        assert length == min(10, 3 + tokens[1] // 100)
        assert (tokens[length:] == 0).all()
    batches = list(samples.batches(20))
    assert sum(batch.size for batch in batches) == samples.size == samples.lengths.sum()
    assert all(batch.size <= 20 for batch in batches)
    assert all((batch[:, 1] % 100 == 0).all() and (np.diff(batch[:, 1:]) == 1).all() for batch in batches)


def test_documents_of_token_ids_stay_as_they_are() -> None:
    ids = [np.arange(10, dtype=np.int32) + 10 * i for i in range(8)]
    samples = _samples([SourceShare("self", [Domain("self", 1, [], encoded=ids)])], Numbers(bos_token_id=7))
    assert samples.tokens.tolist() == [each.tolist() for each in ids]


def test_the_hash_knows_lengths() -> None:
    tokens, lengths = np.zeros((2, 4), np.int32), np.array([4, 4], np.int32)
    assert Samples(tokens, lengths).sha256 != Samples(tokens, np.array([4, 3], np.int32)).sha256


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
