"""Schemes as values, and the words for them."""

import pytest

from msquant.errors import RecipeError
from msquant.schemes import C8, FLOAT, PRESETS, W8A8, W8A8_DYNAMIC, W8A16, Quant, Scheme, parse_scheme


@pytest.mark.parametrize("word", PRESETS)
def test_a_preset_is_its_word(word: str) -> None:
    assert str(PRESETS[word]) == word
    assert parse_scheme(word) is PRESETS[word]


@pytest.mark.parametrize(
    ("word", "scheme"),
    [
        ("W6A16", Scheme(Quant(6, "channel"))),
        ("W6A16_G64", Scheme(Quant(6, "group", 64))),
        ("W8A16_G32_ASYM", Scheme(Quant(8, "group", 32, symmetric=False))),
        ("W3A16_ASYM", Scheme(Quant(3, "channel", symmetric=False))),
        ("W4A8_DYNAMIC", Scheme(Quant(4, "channel"), Quant(8, "token", dynamic=True))),
        ("W4A4", Scheme(Quant(4, "channel"), Quant(4, "tensor", symmetric=False))),
    ],
)
def test_other_words_say_bits_and_groups(word: str, scheme: Scheme) -> None:
    assert parse_scheme(word) == scheme
    assert str(scheme) == word


@pytest.mark.parametrize(
    "word",
    ["", "w8a8", "INT8", "W8", "W9A8", "W1A16", "W8A16_DYNAMIC", "W4A16_G0", "W4A16_G-1", "W8A8_STATIC"],
)
def test_another_word_is_refused_with_what_is_known(word: str) -> None:
    with pytest.raises(RecipeError, match="is not a scheme") as caught:
        parse_scheme(word)
    assert "W8A8_DYNAMIC" in str(caught.value)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("FLOAT", "floating point"),
        ("W8A8", "W8A8, static activations"),
        ("W8A8_DYNAMIC", "W8A8, activations per token"),
        ("W6A16_G64", "int6 weights alone (W6A16_G64)"),
        ("W8A8_DYNAMIC_C8", "W8A8, activations per token, int8 key-value cache"),
        ("FLOAT_C8", "floating point, int8 key-value cache"),
    ],
)
def test_a_scheme_is_described_for_people(word: str, expected: str) -> None:
    assert parse_scheme(word).description == expected


@pytest.mark.parametrize("word", ["W8A8_C8", "FLOAT_C8", "W4A16_G64_ASYM_C8"])
def test_a_word_says_the_cache(word: str) -> None:
    scheme = parse_scheme(word)
    assert scheme.cache == C8
    assert str(scheme) == word
    assert scheme.without_cache == parse_scheme(word.removesuffix("_C8"))


@pytest.mark.parametrize(
    "word", ["W8A8_C8_C8", pytest.param("W8A8" + "_C8" * 3000, id="long"), "_C8", "W8A16_DYNAMIC_C8"]
)
def test_a_word_says_one_cache_of_a_scheme(word: str) -> None:
    with pytest.raises(RecipeError, match="is not a scheme"):
        parse_scheme(word)


def test_another_size_of_groups() -> None:
    assert parse_scheme("W6A16_ASYM").in_groups(32) == parse_scheme("W6A16_G32_ASYM")


def test_what_a_scheme_says_of_itself() -> None:
    assert [scheme.is_float for scheme in (FLOAT, W8A8, W8A8_DYNAMIC, W8A16)] == [True, False, False, False]
    assert [scheme.is_static for scheme in (FLOAT, W8A8, W8A8_DYNAMIC, W8A16)] == [False, True, False, False]
    assert [scheme.is_dynamic for scheme in (FLOAT, W8A8, W8A8_DYNAMIC, W8A16)] == [False, False, True, False]
    assert [scheme.is_weight_only for scheme in (FLOAT, W8A8, W8A8_DYNAMIC, W8A16)] == [False] * 3 + [True]
    assert (Quant(4, "channel").low, Quant(4, "channel").high) == (-8, 7)


@pytest.mark.parametrize(
    ("word", "dtype", "expected"),
    [
        ("W8A8", "bfloat16", "float32"),
        ("W8A8_DYNAMIC", "bfloat16", "bfloat16"),
        ("W4A16", "bfloat16", "bfloat16"),
        ("W4A8_DYNAMIC", "float32", "float32"),
        ("W4A8_DYNAMIC_G64", "bfloat16", "bfloat16 and float16"),
        ("W4A8_DYNAMIC_G64", "float32", "bfloat16 and float16"),
        ("W4A8_DYNAMIC_G64", "float16", "float16"),
    ],
)
def test_scales_fit_what_engines_keep_them_in(word: str, dtype: str, expected: str) -> None:
    assert parse_scheme(word).scale_dtype(dtype) == expected
