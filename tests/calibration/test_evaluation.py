"""The builtin evaluation text: what it is, and that calibration has seen none of it."""

from typing import Any

import pytest

from msquant.calibration.builtin import CODE_MODULES as CALIBRATED_MODULES
from msquant.calibration.builtin import calibration_domains, module_source
from msquant.calibration.evaluation import CODE_MODULES, evaluation_domains
from msquant.calibration.tokens import evaluation_tokens, spread_windows
from msquant.errors import CalibrationError
from tests.fixtures.tiny_model import tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


def test_domains_are_what_they_say() -> None:
    texts = {domain.name: "\n".join(domain.texts) for domain in evaluation_domains()}
    assert list(texts) == ["docs", "code", "chinese", "dialogue", "fiction", "math"]
    assert min(map(len, texts.values())) > 6_000
    assert "class ZipFile" in texts["code"]
    assert sum("\u4e00" <= character <= "\u9fff" for character in texts["chinese"]) > 5_000


def test_calibration_has_seen_none_of_it() -> None:
    """No paragraph of some length is in both; code modules are others."""
    assert not set(CODE_MODULES) & set(CALIBRATED_MODULES)
    seen, held_out = (
        {
            paragraph.strip()
            for domain in domains
            for text in domain.texts
            for paragraph in text.split("\n\n")
            if len(paragraph) > 100
        }
        for domains in (calibration_domains(), evaluation_domains())
    )
    assert min(len(seen), len(held_out)) > 500
    assert not seen & held_out


def test_windows_of_the_documentation_are_those_of_evaluation_tokens(tokenizer: Any) -> None:
    (docs, *_) = evaluation_domains()
    windows = spread_windows(docs, tokenizer, sequences=3, sequence_length=64)
    assert windows.tolist() == evaluation_tokens(tokenizer, sequences=3, sequence_length=64).tolist()


def test_fewer_windows_of_a_short_text(tokenizer: Any) -> None:
    (docs, *_) = evaluation_domains()
    short = type(docs)("mine", 1, [docs.texts[0][:300]])
    count = len(tokenizer.encode(short.texts[0] + "\n\n"))
    windows = spread_windows(short, tokenizer, sequences=9, sequence_length=count // 2, fewer=True)
    assert windows.shape == (2, count // 2)
    for fewer, length in ((False, count), (True, count + 1)):
        with pytest.raises(CalibrationError, match=f"more than the {count} there are") as caught:
            spread_windows(short, tokenizer, sequences=2, sequence_length=length, fewer=fewer)
        assert caught.value.where == "mine"


def test_a_missing_part_of_the_installation_is_named() -> None:
    with pytest.raises(CalibrationError, match="the source of the standard module 'nowhere'"):
        module_source("nowhere")
