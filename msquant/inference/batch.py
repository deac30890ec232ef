"""Sequences that are continued together: one step of the model computes a token for each of them."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from msquant.errors import EngineError
from msquant.inference.sampling import Sampler

# So many tokens of prompts go through the model at a time, which bounds the memory of activations and scores.
PREFILL_TOKENS = 512


class BatchModel(Protocol):
    """A whole model in memory."""

    def new_cache(self) -> Any:
        """The empty key-value cache of a sequence."""
        ...

    def next_logits(self, batch: Sequence[tuple[Any, Sequence[int]]]) -> NDArray[np.float32]:
        """Logits of the token after each sequence's last, `[sequences, V]`.

        Args:
            batch: of each sequence, its cache, which is extended in place, and the tokens that follow.
        """
        ...

    def logits(self, cache: Any, tokens: Sequence[int], count: int) -> NDArray[np.float32]:
        """Logits of the token after each of the last `count` of one sequence's tokens, `[count, V]`.

        Args:
            cache: of the sequence, which is extended in place.
            tokens: that follow.
            count: at least 1.
        """
        ...


class DecodeBatch:
    """Continues sequences as their iterators are advanced, in one thread.

    When one needs a token, one is computed for every other that has none in store either. So iterators that
    are advanced in turn take one step of the model for each round.
    """

    def __init__(self, model: BatchModel) -> None:
        self._model = model
        self._active: list[_Sequence] = []

    def tokens(self, ids: Sequence[int], sampler: Sampler, room: int, ends: Collection[int]) -> Iterator[int]:
        """Continue `ids` by at most `room` tokens, and by none after one of `ends`.

        Nothing is computed and no memory is taken before the first token is asked for. A sampler that scores
        the prompt has done so before the first token.

        Args:
            ids: at least one token.
            sampler: chooses the tokens.
            room: 0 computes the prompt alone.
            ends: tokens.

        Raises:
            EngineError: while iterating: the logits of this sequence are not finite.
        """
        sequence = _Sequence(ids, sampler, room, ends, self._model.new_cache())
        self._active.append(sequence)
        try:
            while True:
                while sequence.waits:
                    self._step()
                if sequence.failure is not None:
                    raise sequence.failure
                if sequence.token is None:
                    return
                token, sequence.token = sequence.token, None
                yield token
        finally:
            self._active.remove(sequence)

    def logits(self, ids: Sequence[int], count: int) -> Iterator[NDArray[np.float32]]:
        """Logits after each of the last `count` of `ids`, in order, in blocks of rows `[rows, V]`."""
        cache, first = self._model.new_cache(), len(ids) - count
        for start in range(0, len(ids), PREFILL_TOKENS):
            piece = ids[start : start + PREFILL_TOKENS]
            if (rows := start + len(piece) - max(start, first)) > 0:
                yield self._model.logits(cache, piece, rows)
            else:
                self._model.next_logits([(cache, piece)])

    def _step(self) -> None:
        moving: list[tuple[_Sequence, int]] = []
        left = PREFILL_TOKENS
        waiting = [sequence for sequence in self._active if sequence.waits]
        # Those past their prompt first: a long prompt is computed in pieces beside them.
        for sequence in sorted(waiting, key=lambda sequence: len(sequence.pending)):
            if count := min(len(sequence.pending), left):
                left -= count
                moving.append((sequence, count))
        together = [(sequence, count) for sequence, count in moving if not sequence.scoring]
        if together:
            logits = self._model.next_logits(
                [(sequence.cache, sequence.pending[:count]) for sequence, count in together]
            )
            for (sequence, count), row in zip(together, logits, strict=True):
                sequence.advance(count, row[None])
        for sequence, count in moving:
            if sequence.scoring:
                rows = self._model.logits(sequence.cache, sequence.pending[:count], count)
                sequence.advance(count, rows)


class _Sequence:
    """One sequence between its prompt and its last token.

    Attributes:
        cache: its keys and values.
        pending: tokens that the model has not seen yet.
        token: the newest, until it is taken.
        scoring: whether the logits after each of the pending tokens are needed.
        finished: whether the last token has been made.
        failure: why there is none.
    """

    def __init__(
        self, ids: Sequence[int], sampler: Sampler, room: int, ends: Collection[int], cache: Any
    ) -> None:
        self.cache = cache
        self.pending = list(ids)
        self.token: int | None = None
        self.scoring = sampler.scores_prompt
        self.finished = False
        self.failure: EngineError | None = None
        self._sampler, self._room, self._ends = sampler, room, ends
        if self.scoring:
            sampler.begin_prompt(self.pending[0])

    @property
    def waits(self) -> bool:
        """Whether it needs a step of the model."""
        return self.token is None and not self.finished and self.failure is None

    def advance(self, count: int, logits: NDArray[np.float32]) -> None:
        """Take note that the model has seen `count` pending tokens.

        Args:
            count: tokens.
            logits: after each of them while `scoring`, otherwise after the last, `[rows, V]`.
        """
        seen = self.pending[1 : count + 1]
        del self.pending[:count]
        try:
            if self.scoring:
                self._sampler.score_prompt(logits[: len(seen)], seen)
            if self.pending:
                return
            self.scoring = False
            if self._room == 0:
                self.finished = True
                return
            self.token = self._sampler.next_token(logits[-1])
        except EngineError as error:
            self.failure = error
            return
        self.pending = [self.token]
        self._room -= 1
        self.finished = self._room == 0 or self.token in self._ends
