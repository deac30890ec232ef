"""A request as steps of the engine: what the worker's thread does for it, one token at a time."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from msquant.errors import EngineError
from msquant.inference.chat_template import chat_ids
from msquant.inference.embedded import EmbeddedEngine
from msquant.inference.engine_protocol import FinishReason
from msquant.server.api_errors import ApiError
from msquant.server.requests import ChatRequest, CompletionRequest
from msquant.server.scored_tokens import ScoredToken, Scorer

PROMPT_BYTES = 8
"""For each token that a prompt may have, so many bytes are taken: a text that is longer is not tokenized to
find out how many it has. Texts have 3 to 5."""
LEAST_PROMPT_BYTES = 65_536
"""So many are taken in any case; they cost some hundredths of a second."""
MAX_LOGPROBS = 131_072
"""So many log probabilities may be in one answer, which take some 15 MB."""


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for; None is whatever the model takes.

    Attributes:
        prompt_tokens: of one prompt.
        max_tokens: of one answer.
    """

    prompt_tokens: int | None = None
    max_tokens: int | None = None

    def longest_answer(self, room: int) -> int:
        """So many tokens may be asked for of a model that takes `room` tokens."""
        return min(self.max_tokens or room, room)


@dataclass(frozen=True)
class Encoded:
    """One of the prompts is tokenized; other requests have their turn."""


@dataclass(frozen=True)
class Started:
    """The request is accepted; its prompts have so many tokens together."""

    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """The text that `tokens` more tokens added to a choice, which ends here if there is a reason.

    Attributes:
        choice: index of the choice.
        text: may be empty.
        tokens: new ones, those of an echoed prompt not counted.
        finish_reason: why the choice ends.
        scored: the tokens with their log probabilities, those of an echoed prompt included; None if they
            were not asked for.
    """

    choice: int
    text: str
    tokens: int
    finish_reason: FinishReason | None = None
    scored: tuple[ScoredToken, ...] | None = None


CheckBytes = Callable[[int], None]
"""Refuses a prompt of so many bytes."""

Steps = Generator[Encoded | Started | Piece, None, None]


def complete(engine: EmbeddedEngine, request: CompletionRequest, limits: RequestLimits, seed: int) -> Steps:
    """Continue the prompts of a request, one after the other.

    Raises:
        ApiError: 400 for what the model cannot take, 500 if the engine fails.
    """

    def encode(check: CheckBytes) -> Iterator[list[int]]:
        for prompt in request.prompts:
            if isinstance(prompt, str):
                check(len(prompt.encode()))
            yield engine.encode(prompt) if isinstance(prompt, str) else prompt

    return _generate(engine, encode, request, limits, seed)


def chat(engine: EmbeddedEngine, request: ChatRequest, limits: RequestLimits, seed: int) -> Steps:
    """Answer a chat; see `complete`."""

    def encode(check: CheckBytes) -> Iterator[list[int]]:
        turns = [message.turn() for message in request.messages]
        check(sum(len(turn["content"].encode()) for turn in turns))
        yield chat_ids(engine.tokenizer, turns)

    return _generate(engine, encode, request, limits, seed)


def _generate(
    engine: EmbeddedEngine,
    encode: Callable[[CheckBytes], Iterator[list[int]]],
    request: CompletionRequest | ChatRequest,
    limits: RequestLimits,
    seed: int,
) -> Steps:
    room = engine.config.longest
    wanted, most = request.wanted_tokens, limits.longest_answer(room)
    if wanted is not None and wanted > most:
        raise ApiError(400, f"max_tokens is {wanted}, the server's limit is {most}", param="max_tokens")
    param = "messages" if isinstance(request, ChatRequest) else "prompt"
    most_tokens = min(limits.prompt_tokens or room, room)

    def check_bytes(count: int) -> None:
        if count > (allowed := max(LEAST_PROMPT_BYTES, PROMPT_BYTES * most_tokens)):
            raise _too_long(f"{count} bytes", f"{allowed} bytes for {most_tokens} tokens", param)

    try:
        prompts = []
        for ids in encode(check_bytes):
            if limits.prompt_tokens is not None and len(ids) > limits.prompt_tokens:
                raise _too_long(f"{len(ids)} tokens", str(limits.prompt_tokens), param)
            prompts.append(ids)
            yield Encoded()
        tokens = min(most if request.usual_tokens is None else request.usual_tokens, most)
        tokens = tokens if wanted is None else wanted
        _check_logprobs(request, prompts, tokens, room)
        sampling = request.sampling(tokens, seed)
        answers = [engine.answer(ids, sampling, i) for i, ids in enumerate(prompts)]
    except EngineError as error:
        raise ApiError.of(error, 400, param) from error
    yield Started(sum(len(ids) for ids in prompts))
    for i, answer in enumerate(answers):
        scorer = None if request.alternatives is None else Scorer(engine.token_bytes)
        echoed = isinstance(request, CompletionRequest) and request.echoes
        seen = 0
        for text in answer:
            if echoed and isinstance(request, CompletionRequest):
                prompt = _text(engine, request.prompts[i])
                scored = scorer.prompt(prompt, answer.prompt_logprobs) if scorer else None
                yield Piece(i, prompt, 0, scored=scored)
                echoed = False
            tokens = len(answer.token_ids) - seen
            scored = scorer.new(answer.logprobs[seen:]) if scorer else None
            yield Piece(i, text, tokens, answer.finish_reason, scored)
            seen += tokens


def _check_logprobs(
    request: CompletionRequest | ChatRequest, prompts: list[list[int]], tokens: int, room: int
) -> None:
    if request.alternatives is None:
        return
    count = sum((len(ids) if request.echoes else 0) + min(tokens, room - len(ids)) for ids in prompts)
    if (count := count * (1 + request.alternatives)) > MAX_LOGPROBS:
        raise ApiError(
            400,
            f"the answer may have {count} log probabilities, the server's limit is {MAX_LOGPROBS}; ask for "
            "fewer tokens (max_tokens), prompts or alternatives",
            param="logprobs",
        )


def _too_long(size: str, limit: str, param: str) -> ApiError:
    message = f"a prompt has {size}, the server's limit is {limit}"
    return ApiError(400, message, param=param, code="context_length_exceeded")


def _text(engine: EmbeddedEngine, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else str(engine.tokenizer.decode(prompt))
