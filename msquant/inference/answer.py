"""One prompt's continuation while its tokens come: the text that is certain, and why it ended."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from msquant.inference.engine import FinishReason, Sampling
from msquant.inference.stop_strings import StopStrings
from msquant.inference.text_stream import TextStream


class Answer:
    """Iterates over pieces of text, one for each token as it is computed, and what is left at the end.

    A piece is empty while a character is not complete or a stop string may have begun.

    Args:
        tokens: the new tokens; they are not asked for after the text has ended.
        tokenizer: it makes the text.
        prompt_ids: the tokens before the new ones.
        sampling: its stop strings end the text.
        ends: whether a token is one that ends the text; it is no part of the text.

    Attributes:
        token_ids: all tokens so far, with the one that ended the text.
        finish_reason: why the text ended; None until it has.
    """

    def __init__(
        self,
        tokens: Iterable[int],
        tokenizer: Any,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        ends: Callable[[int], bool],
    ) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._tokens = tokens
        self._stream = TextStream(tokenizer, prompt_ids)
        self._stops = StopStrings(sampling.stop)
        self._ends = ends

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
