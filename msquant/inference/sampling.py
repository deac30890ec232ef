"""From logits to the next token: greedy, or temperature with nucleus (top-p) sampling."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from msquant.inference.engine_protocol import Sampling
from msquant.inference.logprobs import TokenLogprobs, require_finite, token_logprobs


class Sampler:
    """Chooses the tokens of one sequence.

    Args:
        sampling: temperature, top-p and seed, and which log probabilities are kept.
        sequence: the prompt's index, so that equal prompts are continued differently.

    Attributes:
        logprobs: of each token that was chosen; empty unless they are asked for.
        prompt_logprobs: of each of the prompt's tokens; likewise.
    """

    def __init__(self, sampling: Sampling, sequence: int = 0) -> None:
        self._temperature = sampling.temperature
        self._top_p = sampling.top_p
        self._logprobs, self._prompt_logprobs = sampling.logprobs, sampling.prompt_logprobs
        self.logprobs: list[TokenLogprobs] = []
        self.prompt_logprobs: list[TokenLogprobs] = []
        self._random = np.random.default_rng((sampling.seed, sequence))

    def next_token(self, logits: NDArray[np.float32]) -> int:
        """Choose a token from logits `[V]`.

        Raises:
            EngineError: the logits hold NaN or infinity.
        """
        require_finite(logits)
        token = self._choose(logits)
        if self._logprobs is not None:
            self.logprobs += token_logprobs(logits[None], [token], self._logprobs)
        return token

    @property
    def scores_prompt(self) -> bool:
        """Whether the logits after each of the prompt's tokens are needed."""
        return self._prompt_logprobs is not None

    def begin_prompt(self, token: int) -> None:
        """Take note of a prompt's first token."""
        self.prompt_logprobs.append(TokenLogprobs(token, None))

    def score_prompt(self, logits: NDArray[np.float32], tokens: Sequence[int]) -> None:
        """Take note of the prompt's next tokens, and of the logits `[tokens, V]` in their places.

        Raises:
            EngineError: the logits hold NaN or infinity.
        """
        self.prompt_logprobs += token_logprobs(logits, tokens, self._prompt_logprobs or 0)

    def _choose(self, logits: NDArray[np.float32]) -> int:
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
