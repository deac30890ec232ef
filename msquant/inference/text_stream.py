"""Token ids to text while they are being generated."""

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Enough tokens before the first new one for a tokenizer that treats the start of a text differently.
_CONTEXT_TOKENS = 6


class TextStream:
    """Turns tokens into pieces of text that join to the whole.

    A character whose bytes are spread over several tokens is held back until its last byte is there: until
    then a tokenizer decodes it to U+FFFD. What never becomes a character is released by `finish`.

    Args:
        tokenizer: its `decode` is used, special tokens left out.
        prompt_ids: the prompt's tokens, which give the first new token its context.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-_CONTEXT_TOKENS:])
        self._settled = len(self._ids)
        self._emitted = len(self._decode())

    def add(self, token: int) -> str:
        """Take one token and return the text that is certain now and was not before; it may be empty."""
        self._ids.append(token)
        text = self._decode()
        stable = text.rstrip(_INCOMPLETE)
        piece = stable[self._emitted :]
        self._emitted = max(self._emitted, len(stable))
        if stable == text:
            # The tokens of the last step stay as context, so that the window is short however long the text.
            del self._ids[: self._settled]
            self._settled = len(self._ids)
            self._emitted = len(self._decode())
        return piece

    def finish(self) -> str:
        """Return what was held back, after the last token."""
        text = self._decode()
        piece = text[self._emitted :]
        self._emitted = len(text)
        return piece

    def _decode(self) -> str:
        return str(
            self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
