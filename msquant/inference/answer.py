"""One prompt's continuation while its tokens come: the text that is certain, and why it ended."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from msquant.inference.engine_protocol import FinishReason, Sampling
from msquant.inference.logprobs import TokenLogprobs

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


class StopStrings:
    """Passes a text through piece by piece until one of the stop strings is complete in it.

    Where a stop string is cut into pieces does not matter: the one that is complete first ends the text, of
    those that are complete at the same character the longest. The end of the text that may be the start of a
    stop string is held back.

    Args:
        stop: the strings, none of them empty; without any, every piece passes at once.

    Attributes:
        reached: a stop string was found; nothing comes after it.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._held = ""
        self.reached = False

    def add(self, piece: str) -> str:
        """Take the next piece and return the text that is certain now and was not before."""
        if self.reached:
            return ""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            self.reached = True
            self._held = ""
            return text[: min(found)[1]]
        certain = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[certain:]
        return text[:certain]

    def finish(self) -> str:
        """Return what was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` may be the start of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)


class Answer:
    """Iterates over pieces of text, one for each token as it is computed, and what is left at the end.

    A piece is empty while a character is not complete or a stop string may have begun.

    Args:
        tokens: the new tokens; they are not asked for after the text has ended.
        tokenizer: it makes the text.
        prompt_ids: the tokens before the new ones.
        sampling: its stop strings end the text.
        ends: whether a token is one that ends the text; it is no part of the text.
        logprobs: of the new tokens, if they are kept; filled before `tokens` gives the token.
        prompt_logprobs: of the tokens before; filled before the first new token.

    Attributes:
        token_ids: all tokens so far, with the one that ended the text.
        finish_reason: why the text ended; None until it has.
        prompt_logprobs: as given; complete with the first piece.
    """

    def __init__(
        self,
        tokens: Iterable[int],
        tokenizer: Any,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        ends: Callable[[int], bool],
        logprobs: Sequence[TokenLogprobs] = (),
        prompt_logprobs: Sequence[TokenLogprobs] = (),
    ) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._tokens = tokens
        self._stream = TextStream(tokenizer, prompt_ids)
        self._stops = StopStrings(sampling.stop)
        self._ends = ends
        self._logprobs = logprobs
        self.prompt_logprobs = prompt_logprobs

    @property
    def logprobs(self) -> Sequence[TokenLogprobs]:
        """Of each of `token_ids`; empty unless they are kept."""
        # One more token may be computed already.
        return self._logprobs[: len(self.token_ids)]

    def __iter__(self) -> Iterator[str]:
        for token in self._tokens:
            self.token_ids.append(token)
            if self._ends(token):
                self.finish_reason = "stop"
                break
            yield self._stops.add(self._stream.add(token))
            if self._stops.reached:
                break
        rest = self._stops.add(self._stream.finish()) + self._stops.finish()
        if self.finish_reason is None:
            self.finish_reason = "stop" if self._stops.reached else "length"
        yield rest
