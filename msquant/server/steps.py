"""A request as steps of the engine: what the worker's thread does for it, one token at a time."""

from collections.abc import Callable, Generator
from dataclasses import dataclass

from msquant.errors import EngineError
from msquant.inference.chat import chat_ids
from msquant.inference.embedded import EmbeddedEngine
from msquant.inference.engine import FinishReason
from msquant.server.errors import ApiError
from msquant.server.requests import ChatRequest, CompletionRequest


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; None is whatever the model takes.

    Attributes:
        prompt_tokens: of one prompt.
        max_tokens: of one answer.
    """

    prompt_tokens: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Started:
    """The request is accepted; its prompts have so many tokens together."""

    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """The text that `tokens` more tokens added to a choice, which ends here if there is a reason."""

    choice: int
    text: str
    tokens: int
    finish_reason: FinishReason | None = None


Steps = Generator[Started | Piece, None, None]


def complete(engine: EmbeddedEngine, request: CompletionRequest, limits: Limits, seed: int) -> Steps:
    """Continue the prompts of a request, one after the other.

    Raises:
        ApiError: 400 for what the model cannot take, 500 if the engine fails.
    """

    def encode() -> list[list[int]]:
        return [engine.encode(prompt) if isinstance(prompt, str) else prompt for prompt in request.prompts]

    return _generate(engine, encode, request, limits, seed)


def chat(engine: EmbeddedEngine, request: ChatRequest, limits: Limits, seed: int) -> Steps:
    """Answer a chat; see `complete`."""

    def encode() -> list[list[int]]:
        return [chat_ids(engine.tokenizer, [message.turn() for message in request.messages])]

    return _generate(engine, encode, request, limits, seed)


def _generate(
    engine: EmbeddedEngine,
    encode: Callable[[], list[list[int]]],
    request: CompletionRequest | ChatRequest,
    limits: Limits,
    seed: int,
) -> Steps:
    wanted = request.wanted_tokens
    if limits.max_tokens is not None and (wanted or 0) > limits.max_tokens:
        raise ApiError(
            400, f"max_tokens is {wanted}, the server's limit is {limits.max_tokens}", param="max_tokens"
        )
    param = "messages" if isinstance(request, ChatRequest) else "prompt"
    try:
        prompts = encode()
        for ids in prompts:
            if limits.prompt_tokens is not None and len(ids) > limits.prompt_tokens:
                raise ApiError(
                    400,
                    f"a prompt has {len(ids)} tokens, the server's limit is {limits.prompt_tokens}",
                    param=param,
                    code="context_length_exceeded",
                )
        room = engine.config.max_position_embeddings
        tokens = min(wanted or request.usual_tokens or room, limits.max_tokens or room, room)
        sampling = request.sampling(tokens, seed)
        answers = [engine.answer(ids, sampling, i) for i, ids in enumerate(prompts)]
    except EngineError as error:
        raise ApiError.of(error, 400, param) from error
    yield Started(sum(len(ids) for ids in prompts))
    for i, answer in enumerate(answers):
        if isinstance(request, CompletionRequest) and request.echo:
            yield Piece(i, _text(engine, request.prompts[i]), 0)
        seen = 0
        for text in answer:
            yield Piece(i, text, len(answer.token_ids) - seen, answer.finish_reason)
            seen = len(answer.token_ids)


def _text(engine: EmbeddedEngine, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else str(engine.tokenizer.decode(prompt))
