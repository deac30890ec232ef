"""Incremental text of real tokenizers, with characters that are spread over tokens."""

from pathlib import Path
from typing import Any

import pytest

from msquant.inference.answer import TextStream
from msquant.inference.token_bytes import TokenBytes

TEXT = "Grüße, 世界! 👩‍👩‍👧 naïve — done."


@pytest.fixture(scope="module")
def byte_level(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def byte_fallback() -> Any:
    """The tokenizer of Llama 2 in small: words start with U+2581, unknown characters become byte tokens."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"Gredonaiv,.! "]
    tokenizer = Tokenizer(
        models.BPE({piece: i for i, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("prompt_characters", [0, 1, 7, 12])
def test_pieces_join_to_the_text(kind: str, prompt_characters: int, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    prompt, rest = TEXT[:prompt_characters], TEXT[prompt_characters:]
    prompt_ids = tokenizer.encode(prompt) if prompt else []
    ids = tokenizer.encode(TEXT)
    assert ids[: len(prompt_ids)] == prompt_ids
    assert len(ids) > len(TEXT), "some characters must take several tokens"
    stream = TextStream(tokenizer, prompt_ids)
    pieces = [stream.add(token) for token in ids[len(prompt_ids) :]]
    assert "".join(pieces) == rest
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    assert stream.finish() == ""
    assert sum(bool(piece) for piece in pieces) > 10, "text must come while tokens do"


def test_incomplete_character_is_released_at_the_end(byte_level: Any) -> None:
    ids = byte_level.encode("世")
    assert len(ids) == 3
    stream = TextStream(byte_level)
    assert [stream.add(token) for token in ids[:2]] == ["", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_text_goes_on_after_bytes_that_are_no_character(byte_level: Any) -> None:
    ids = byte_level.encode("世")[:2] + byte_level.encode(" and")
    stream = TextStream(byte_level)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) == byte_level.decode(ids) == "\N{REPLACEMENT CHARACTER} and"


def test_special_tokens_are_no_text(byte_level: Any) -> None:
    stream = TextStream(byte_level)
    assert stream.add(byte_level.eos_token_id) == ""
    assert stream.finish() == ""


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@pytest.mark.parametrize("text", [TEXT, "I am", " two  spaces\n\N{REPLACEMENT CHARACTER}"])
def test_bytes_of_tokens_join_to_the_text(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    found = TokenBytes(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    joined = b"".join(found[token] for token in ids).decode()
    assert joined == tokenizer.decode([*tokenizer.encode("a"), *ids]).removeprefix("a")
    assert joined.endswith(text)


def test_bytes_of_special_tokens_and_of_those_beyond_the_tokenizer(byte_level: Any) -> None:
    found = TokenBytes(byte_level)
    assert found[byte_level.bos_token_id] == byte_level.bos_token.encode()
    assert found.special == {byte_level.bos_token_id, byte_level.eos_token_id}
    assert found[len(byte_level) + 5] == b""
