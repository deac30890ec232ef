"""Log probabilities of tokens, from a model's logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msquant.errors import EngineError


@dataclass(frozen=True)
class TokenLogprobs:
    """One token of a sequence, as the model expected it from those before.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability, before temperature and top-p; None of a sequence's
            first token, which nothing comes before.
        top: id and logprob of the most probable tokens in its place, the most probable first, of equal ones
            the one with the lowest id; as many as were asked for.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def require_finite(logits: NDArray[np.float32]) -> None:
    """Raise EngineError if there is NaN or infinity among logits."""
    if not np.isfinite(logits).all():
        raise EngineError(
            "the model computed logits that are NaN or infinite",
            remedy="check the checkpoint with `msquant inspect`",
        )


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logarithms of the probabilities that finite logits `[..., V]` stand for, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def token_logprobs(logits: NDArray[np.float32], tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """What a model thought of tokens before they came.

    Args:
        logits: `[rows, V]`; each row is of the place of one token.
        tokens: one for each row.
        top: so many of the most probable tokens with each.

    Raises:
        EngineError: the logits hold NaN or infinity.
    """
    require_finite(logits)
    # Row by row: the float64 copy of a long prompt's logits would be twice as large as they are.
    return [_one(log_softmax(row), token, top) for row, token in zip(logits, tokens, strict=True)]


def _one(row: NDArray[np.float64], token: int, top: int) -> TokenLogprobs:
    found: NDArray[np.intp] = np.empty(0, np.intp)
    if top:
        least = np.partition(row, -top)[-top] if top < len(row) else row.min()
        found = np.flatnonzero(row >= least)
        found = found[np.argsort(-row[found], kind="stable")][:top]
    return TokenLogprobs(token, float(row[token]), tuple((int(i), float(row[i])) for i in found))
