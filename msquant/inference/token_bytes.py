"""The bytes of a text that a token stands for, which may be a part of a character."""

import re
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# How a vocabulary with byte fallback writes one byte.
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Looks up the bytes of tokens; those of a text's tokens join to the text in UTF-8.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Attributes:
        special: the tokens that are left out where a text is read: they begin or end it, or a turn.
    """

    def __init__(self, tokenizer: Any) -> None:
        from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder.items()
        self.special = frozenset(token for token, content in added if content.special)
        self._alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
        # A tokenizer may drop the space before a text's first token.
        self._before = tokenizer.encode("a", add_special_tokens=False)
        self._text_before = self._decode(self._before)
        self._known: dict[int, bytes] = {}

    def __getitem__(self, token: int) -> bytes:
        """The bytes of a token that is not the first of a text; none of one that has no text."""
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._bytes(token)
        return found

    def _bytes(self, token: int) -> bytes:
        text = self._decode([*self._before, token]).removeprefix(self._text_before)
        if _INCOMPLETE not in text:
            return text.encode()
        name = str(self._tokenizer.convert_ids_to_tokens(token))
        if (byte := _BYTE.fullmatch(name)) is not None:
            return bytes([int(byte[1], 16)])
        if self._alphabet.keys() >= set(name):
            return bytes(self._alphabet[character] for character in name)
        return text.encode()

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
