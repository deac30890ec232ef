"""From logits to the next token: greedy, or temperature with nucleus (top-p) sampling."""

import numpy as np
from numpy.typing import NDArray

from msquant.errors import EngineError
from msquant.inference.engine_protocol import Sampling


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        sampling: temperature, top-p and seed.
        sequence: the prompt's index, so that equal prompts are continued differently.
    """

    def __init__(self, sampling: Sampling, sequence: int = 0) -> None:
        self._temperature = sampling.temperature
        self._top_p = sampling.top_p
        self._random = np.random.default_rng((sampling.seed, sequence))

    def next_token(self, logits: NDArray[np.float32]) -> int:
        """Choose a token from logits `[V]`.

        Raises:
            EngineError: the logits hold NaN or infinity.
        """
        if not np.isfinite(logits).all():
            raise EngineError(
                "the model computed logits that are NaN or infinite",
                remedy="check the checkpoint with `msquant inspect`",
            )
        if self._temperature == 0:
            return int(np.argmax(logits))
        probabilities = top_p_probabilities(logits, self._temperature, self._top_p)
        cumulative = np.cumsum(probabilities)
        draw = self._random.random() * cumulative[-1]
        return int(np.searchsorted(cumulative, draw, side="right"))


def top_p_probabilities(logits: NDArray[np.float32], temperature: float, top_p: float) -> NDArray[np.float64]:
    """The probabilities to sample from, float64 `[V]`, summing to 1 (nucleus sampling, arXiv 1904.09751).

    Kept are the most probable tokens up to and with the one whose cumulative probability reaches `top_p`;
    all others get 0. The most probable one is always kept.
    """
    scaled = (logits.astype(np.float64) - logits.max()) / temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    if top_p < 1:
        order = np.argsort(probabilities, kind="stable")
        # Summed from the smallest, so that a long tail of tiny probabilities is not rounded away.
        dropped = order[np.cumsum(probabilities[order]) <= 1 - top_p]
        probabilities[dropped[dropped != order[-1]]] = 0
        probabilities /= probabilities.sum()
    return probabilities
