"""Tokens with their log probabilities, as clients are told of them."""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from msquant.inference.logprobs import TokenLogprobs
from msquant.inference.token_bytes import TokenBytes


@dataclass(frozen=True)
class ScoredToken:
    """A token of an answer.

    Attributes:
        data: its bytes in UTF-8, which may be a part of a character.
        logprob: natural logarithm of its probability; None of a prompt's first token.
        top: bytes and logprob of the most probable tokens in its place, the most probable first.
        offset: where in the answer's text it begins, in characters.
    """

    data: bytes
    logprob: float | None
    top: tuple[tuple[bytes, float], ...]
    offset: int


class Scorer:
    """Follows one choice's text while its tokens come.

    Args:
        tokens: the vocabulary's bytes.
    """

    def __init__(self, tokens: TokenBytes) -> None:
        self._tokens = tokens
        self._length = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def prompt(self, text: str, logprobs: Sequence[TokenLogprobs]) -> tuple[ScoredToken, ...]:
        """The tokens of an echoed prompt.

        Offsets are counted from its end: a tokenizer puts tokens, or a space, before a text that are not
        part of it.
        """
        scored = list(self._follow(logprobs, special=True))
        self._length += len(self._decoder.decode(b"", final=True))
        before, self._length = self._length - len(text), len(text)
        return tuple(replace(one, offset=max(0, one.offset - before)) for one in scored)

    def new(self, logprobs: Sequence[TokenLogprobs]) -> tuple[ScoredToken, ...]:
        """The next new tokens; special ones are not shown in the text."""
        return tuple(self._follow(logprobs, special=False))

    def _follow(self, logprobs: Sequence[TokenLogprobs], *, special: bool) -> Iterator[ScoredToken]:
        for one in logprobs:
            data = self._tokens[one.token]
            top = tuple((self._tokens[token], logprob) for token, logprob in one.top)
            yield ScoredToken(data, one.logprob, top, self._length)
            if special or one.token not in self._tokens.special:
                self._length += len(self._decoder.decode(data))
