"""What every inference engine takes and gives back, whatever runs underneath."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from msquant.errors import EngineError

FinishReason = Literal["stop", "length"]
OnText = Callable[[int, str], None]
"""Called with a prompt's index and the text that its newest tokens added."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the names and defaults are those of vLLM's `SamplingParams`.

    Attributes:
        max_tokens: at most so many tokens are generated for each prompt.
        temperature: 0 takes the most probable token; otherwise logits are divided by it before sampling.
        top_p: samples only from the most probable tokens that together reach this probability.
        seed: of the sampling; the same seed gives the same text.
        ignore_eos: go on after an end-of-sequence token, to compare or to time a fixed number of tokens.
        stop: strings that end the text; it ends before the first of them, wherever tokens begin and end.
        logprobs: keep the log probability of each new token, and those of so many of the most probable ones
            beside it; None keeps nothing.
        prompt_logprobs: the same of the prompt's tokens; `max_tokens` may then be 0.

    Raises:
        EngineError: a value is out of its range.
    """

    max_tokens: int = 16
    temperature: float = 0.0
    top_p: float = 0.95
    seed: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        least = 1 if self.prompt_logprobs is None else 0
        if self.max_tokens < least:
            raise EngineError(
                f"max_tokens is {self.max_tokens}, it must be at least {least}", where="--max-tokens"
            )
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise EngineError(
                f"temperature is {self.temperature}, it must be 0 or a positive number",
                where="--temperature",
                remedy="use 0 for the most probable token, about 0.7 for varied text",
            )
        if not 0 < self.top_p <= 1:
            raise EngineError(
                f"top_p is {self.top_p}, it must be above 0 and at most 1",
                where="--top-p",
                remedy="use 1 to sample from all tokens",
            )
        if self.seed < 0:
            raise EngineError(f"seed is {self.seed}, it must not be negative", where="--seed")
        for name, count in (("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)):
            if count is not None and count < 0:
                raise EngineError(f"{name} is {count}, it must not be negative")
        if "" in self.stop:
            raise EngineError("a stop string is empty", where="--stop", remedy="give a text to stop at")


@dataclass(frozen=True)
class Completion:
    """What an engine generated for one prompt.

    Attributes:
        prompt: the prompt as it was given.
        text: the generated text without the prompt and without the token or the stop string that ended it.
        token_ids: all generated tokens, with the one that ended the text.
        finish_reason: `stop` after an end-of-sequence token or a stop string, `length` when `max_tokens` or
            the longest sequence that the model takes was reached.
        seconds: wall time from the prompt to the last token; an engine that runs prompts together reports
            the time of all of them.
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens a second, the prompt's own processing included."""
        return len(self.token_ids) / self.seconds if self.seconds > 0 else 0.0


class Engine(Protocol):
    """A loaded model that continues prompts."""

    @property
    def name(self) -> str:
        """What the engine is called on the command line."""
        ...

    def generate(
        self, prompts: Sequence[str], sampling: Sampling, on_text: OnText | None = None
    ) -> list[Completion]:
        """Continue every prompt; the results are in the prompts' order.

        An exception that `on_text` raises ends generation and comes out of this call.

        Raises:
            EngineError: there is no prompt, one is empty or too long, or the engine failed.
        """
        ...

    def close(self) -> None:
        """Free the model and end what was started for it; the engine cannot be used afterwards."""
        ...


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise EngineError if there is no prompt, or an empty one."""
    remedy = 'give a text to continue, for example --prompt "I am"'
    if not prompts:
        raise EngineError("there is no prompt", where="--prompt", remedy=remedy)
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise EngineError(f"prompt {i + 1} of {len(prompts)} is empty", where="--prompt", remedy=remedy)
