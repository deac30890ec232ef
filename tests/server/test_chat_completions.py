"""`/v1/chat/completions` by the real OpenAI client."""

from typing import Any

import openai
import pytest

from msquant.inference.chat_template import chat_ids
from msquant.inference.embedded import EmbeddedEngine
from msquant.inference.engine_protocol import Sampling
from tests.server.running import MODEL, RunningServer

QUESTION = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who are you?"}]
GREEDY: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def expected(engine: EmbeddedEngine) -> str:
    return "".join(engine.answer(chat_ids(engine.tokenizer, QUESTION), Sampling(max_tokens=12)))


def test_answer_follows_the_template(client: openai.OpenAI, engine: EmbeddedEngine, expected: str) -> None:
    answer = client.chat.completions.create(messages=QUESTION, **GREEDY)
    assert answer.choices[0].message.content == expected
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert answer.object == "chat.completion"
    assert answer.usage
    assert answer.usage.prompt_tokens == len(chat_ids(engine.tokenizer, QUESTION))
    assert answer.usage.completion_tokens == 12


def test_streamed_answer(client: openai.OpenAI, expected: str) -> None:
    chunks = list(client.chat.completions.create(messages=QUESTION, stream=True, **GREEDY))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)


def test_an_answer_can_be_sent_back(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(messages=QUESTION, **GREEDY).choices[0].message
    turns = [*QUESTION, first, {"role": "user", "content": "And then?"}]
    second = client.chat.completions.create(messages=turns, **GREEDY)
    again = [*QUESTION, first.model_dump(), {"role": "user", "content": "And then?", "name": None}]
    assert client.chat.completions.create(messages=again, **GREEDY).choices == second.choices


def test_parts_and_the_newer_names(client: openai.OpenAI, expected: str) -> None:
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]
    messages = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": parts}]
    options = {"model": MODEL, "max_completion_tokens": 12, "temperature": 0}
    answer = client.chat.completions.create(messages=messages, **options)  # type: ignore[call-overload]
    assert answer.choices[0].message.content == expected


def test_without_a_limit_the_model_is_filled(client: openai.OpenAI, engine: EmbeddedEngine) -> None:
    long = [{"role": "user", "content": "word " * 75}]
    assert 230 < len(chat_ids(engine.tokenizer, long)) < 256
    answer = client.chat.completions.create(
        model=MODEL, messages=long, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage
    assert answer.usage.total_tokens == engine.config.max_position_embeddings == 256


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least 1 item"),
        ([{"role": "robot", "content": "hi"}], "'system', 'developer', 'user' or 'assistant'"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "'text'"),
        ([{"role": "assistant", "content": "hi"}], "must not begin with the assistant"),
        ([{"role": "user", "content": "word " * 300}], "leaves no room"),
        (["hi"], "messages.0"),
    ],
)
def test_refused_messages(client: openai.OpenAI, messages: list[Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=messages, **GREEDY)
    assert message in caught.value.message


@pytest.mark.parametrize("name", ["tools", "response_format", "functions"])
def test_what_is_not_supported(client: openai.OpenAI, name: str) -> None:
    value: Any = {"response_format": {"type": "json_object"}}.get(name, [{"name": "f"}])
    with pytest.raises(openai.BadRequestError, match=f"'{name}' is not supported"):
        client.chat.completions.create(messages=QUESTION, **GREEDY, **{name: value})  # type: ignore[arg-type]


def test_no_chat_template(
    client: openai.OpenAI, engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine.tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="has no chat template"):
        client.chat.completions.create(messages=QUESTION, **GREEDY)
