"""`/v1/completions` and the other paths, by the real OpenAI client, against the engine itself."""

from typing import Any

import httpx
import openai
import pytest

from msquant.inference.embedded import EmbeddedEngine
from msquant.inference.engine_protocol import Sampling
from tests.server.running import MODEL, RunningServer

PROMPT = "The with statement"
GREEDY: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return server.client()


def text_of(engine: EmbeddedEngine, prompt: str, **options: Any) -> str:
    (completion,) = engine.generate([prompt], Sampling(**({"max_tokens": 12} | options)))
    return completion.text


def test_text_is_that_of_the_engine(client: openai.OpenAI, engine: EmbeddedEngine) -> None:
    (expected,) = engine.generate([PROMPT], Sampling(max_tokens=12))
    answer = client.completions.create(prompt=PROMPT, **GREEDY)
    assert answer.choices[0].text == expected.text
    assert answer.choices[0].finish_reason == expected.finish_reason
    assert (answer.model, answer.object, answer.id[:5]) == (MODEL, "text_completion", "cmpl-")
    assert answer.usage
    assert answer.usage.prompt_tokens == len(engine.encode(PROMPT))
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_streamed_text_joins_to_the_whole(client: openai.OpenAI, engine: EmbeddedEngine) -> None:
    chunks = list(
        client.completions.create(
            prompt=PROMPT, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    *pieces, last = chunks
    assert "".join(chunk.choices[0].text for chunk in pieces) == text_of(engine, PROMPT)
    assert [chunk.choices[0].finish_reason for chunk in pieces].count("length") == 1
    assert pieces[-1].choices[0].finish_reason == "length"
    assert len(pieces) > 8, "text comes while tokens do"
    assert last.choices == []
    assert last.usage
    assert last.usage.completion_tokens == 12
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_prompts_as_text_and_as_tokens(client: openai.OpenAI, engine: EmbeddedEngine) -> None:
    prompts = ["I am", PROMPT]
    ids = [engine.encode(prompt) for prompt in prompts]
    expected = [text_of(engine, prompt) for prompt in prompts]
    for given, texts in ((prompts, expected), (ids, expected), (ids[1], expected[1:])):
        answer = client.completions.create(prompt=given, **GREEDY)  # type: ignore[call-overload]
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.index for choice in answer.choices] == list(range(len(texts)))
        assert answer.usage.completion_tokens == 12 * len(texts)
    streamed = ["", ""]
    for chunk in client.completions.create(prompt=prompts, stream=True, **GREEDY):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == expected


def test_echo_puts_the_prompt_in_front(client: openai.OpenAI, engine: EmbeddedEngine) -> None:
    expected = PROMPT + text_of(engine, PROMPT)
    for prompt in (PROMPT, engine.encode(PROMPT)):
        assert client.completions.create(prompt=prompt, echo=True, **GREEDY).choices[0].text == expected
    pieces = client.completions.create(prompt=PROMPT, echo=True, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in pieces) == expected


def test_stop_string(client: openai.OpenAI, engine: EmbeddedEngine) -> None:
    whole = text_of(engine, PROMPT)
    stop = whole[len(whole) // 2 :][:3]
    expected = whole[: whole.index(stop)]
    for given in (stop, ["not in it", stop]):
        choice = client.completions.create(prompt=PROMPT, stop=given, **GREEDY).choices[0]
        assert (choice.text, choice.finish_reason) == (expected, "stop")
    pieces = list(client.completions.create(prompt=PROMPT, stop=stop, stream=True, **GREEDY))
    assert "".join(chunk.choices[0].text for chunk in pieces) == expected
    assert pieces[-1].choices[0].finish_reason == "stop"


def test_seed_temperature_and_top_p_reach_the_engine(client: openai.OpenAI, engine: EmbeddedEngine) -> None:
    options = {"temperature": 1.5, "top_p": 0.9, "seed": 7, "max_tokens": 12}
    expected = text_of(engine, PROMPT, **options)
    for _ in range(2):
        assert client.completions.create(model=MODEL, prompt=PROMPT, **options).choices[0].text == expected
    free = {"temperature": 1.5, "max_tokens": 12, "model": MODEL, "prompt": PROMPT}
    texts = {client.completions.create(**free).choices[0].text for _ in range(3)}
    assert len(texts) > 1, "without a seed every answer has its own"


def test_sixteen_tokens_unless_told_otherwise(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="I am", temperature=0)
    assert answer.usage
    assert answer.usage.completion_tokens == 16


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "msquant"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'") as caught:
        client.models.retrieve("some/other")
    assert caught.value.code == "model_not_found"


def test_health(server: RunningServer) -> None:
    response = httpx.get(f"{server.url}/health")
    assert (response.status_code, response.json()["status"]) == (200, "ok")


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"model": "gpt-4"}, "model", "the model 'gpt-4' is not here"),
        ({"max_tokens": 0}, None, "'max_tokens' may be 0 only with 'echo'"),
        ({"max_tokens": -1, "echo": True}, "max_tokens", "greater than or equal to 0"),
        ({"max_tokens": "5"}, "max_tokens", "valid integer"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"stop": [""]}, "stop.0", "at least 1 character"),
        ({"stop": ""}, "stop.0", "at least 1 character"),
        ({"stop": ["x"] * 17}, "stop", "at most 16 items"),
        ({"stop": "x" * 257}, "stop.0", "at most 256 characters"),
        ({"prompt": ""}, None, "'prompt' must be a text or a list, and not empty"),
        ({"prompt": []}, None, "'prompt' must be a text or a list, and not empty"),
        ({"prompt": ["I am", ""]}, None, "none of them empty"),
        ({"prompt": [1, "I am"]}, None, "none of them empty"),
        ({"prompt": {"text": "I am"}}, None, "'prompt' must be a text"),
        ({"prompt": [True]}, None, "'prompt' must be a text"),
        ({"prompt": ["I am"] * 129}, None, "129 prompts, the limit is 128"),
        ({"prompt": "word " * 300}, "prompt", "leaves no room for an answer"),
        ({"prompt": [1, 512]}, "prompt", "token 512"),
        ({"prompt": [1, -1]}, "prompt", "token -1"),
        ({"n": 2}, None, "'n' is not supported"),
        ({"n": True}, None, "'n' is not supported"),
        ({"best_of": 3}, None, "'best_of' is not supported"),
        ({"logprobs": 6}, "logprobs", "less than or equal to 5"),
        ({"logprobs": -1}, "logprobs", "greater than or equal to 0"),
        ({"logprobs": True}, "logprobs", "valid integer"),
        ({"extra_body": {"top_logprobs": 2}}, "top_logprobs", "unknown parameter 'top_logprobs'"),
        ({"suffix": "end"}, None, "'suffix' is not supported"),
        ({"presence_penalty": 0.5}, None, "'presence_penalty' is not supported"),
        ({"logit_bias": {"5": 1}}, None, "'logit_bias' is not supported"),
        ({"extra_body": {"top_k": 5}}, None, "'top_k' is not supported"),
        ({"extra_body": {"colour": "red"}}, "colour", "unknown parameter 'colour'"),
        ({"stream_options": {"include": 1}}, "stream_options.include", "unknown parameter"),
    ],
)
def test_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], param: str | None, message: str
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(**({"prompt": "I am", **GREEDY} | options))
    assert caught.value.status_code == (404 if param == "model" else 400)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == param
    assert message in caught.value.message


def test_values_that_change_nothing_are_taken(client: openai.OpenAI, engine: EmbeddedEngine) -> None:
    neutral = {"n": 1, "best_of": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}}
    answer = client.completions.create(
        prompt=PROMPT, user="me", logprobs=None, suffix=None, extra_body={"top_k": -1}, **neutral, **GREEDY
    )
    assert answer.choices[0].text == text_of(engine, PROMPT)
