"""Log probabilities by the real OpenAI client, against transformers on torch."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from msquant.flows.engines import load_embedded
from msquant.inference.chat_template import chat_ids
from msquant.inference.embedded import EmbeddedEngine
from tests.fixtures.tiny_model import CHAT_TEMPLATE
from tests.server.running import MODEL, RunningServer, running

PROMPT = "The with statement"
# Characters of two to four bytes, none of which is one of the tiny vocabulary's tokens.
FOREIGN = "naïve 数 🙂 end"
GREEDY: dict[str, Any] = {"model": MODEL, "max_tokens": 12, "temperature": 0}
QUESTION = [{"role": "user", "content": "Who are you?"}]
TOLERANCE = 1e-4
"""Nats: float32 in another order of sums. The values of different tokens are some 0.01 to 10 apart."""


@pytest.fixture(scope="module")
def folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in floating point, with a chat template."""
    folder = shutil.copytree(tiny_llama, tmp_path_factory.mktemp("float") / "llama")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": CHAT_TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> EmbeddedEngine:
    return load_embedded(folder)


@pytest.fixture(scope="module")
def server(engine: EmbeddedEngine) -> Iterator[RunningServer]:
    with running(engine) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: RunningServer) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def judge(folder: Path) -> Any:
    """Log probabilities `[tokens, V]` of the token after each of the ids, by transformers on torch."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def judge(ids: list[int]) -> Any:
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)

    return judge


def greedy_ids(engine: EmbeddedEngine, ids: list[int], count: int) -> list[int]:
    from msquant.inference.engine_protocol import Sampling

    return list(engine.tokens(ids, Sampling(max_tokens=count)))


def in_chats(engine: EmbeddedEngine, token: int) -> str:
    """A token as a chat shows it; the random model writes parts of characters too."""
    return engine.token_bytes[token].decode(errors="backslashreplace")


def in_completions(engine: EmbeddedEngine, token: int) -> str:
    data = engine.token_bytes[token]
    return f"bytes:{in_chats(engine, token)}" if "\ufffd" in data.decode(errors="replace") else data.decode()


def test_completions_have_those_of_transformers(
    client: openai.OpenAI, engine: EmbeddedEngine, judge: Any
) -> None:
    choice = client.completions.create(prompt=PROMPT, logprobs=3, **GREEDY).choices[0]
    ids = engine.encode(PROMPT)
    new = greedy_ids(engine, ids, 12)
    expected = judge(ids + new)[len(ids) - 1 : -1]
    found = choice.logprobs
    assert found is not None
    assert found.tokens == [in_completions(engine, token) for token in new]
    assert found.token_logprobs == pytest.approx(
        [float(row[token]) for row, token in zip(expected, new, strict=True)], abs=TOLERANCE
    )
    for row, top in zip(expected, found.top_logprobs, strict=True):
        assert list(top.values()) == pytest.approx(row.topk(3).values.tolist(), abs=TOLERANCE)
        assert list(top) == [in_completions(engine, token) for token in row.topk(3).indices.tolist()]
    for token, start in zip(found.tokens, found.text_offset, strict=True):
        assert token.startswith("bytes:") or choice.text.startswith(token, start)
    assert found.text_offset[-1] >= len(choice.text) - len(found.tokens[-1])


def test_an_echoed_prompt_is_scored_too(client: openai.OpenAI, engine: EmbeddedEngine, judge: Any) -> None:
    """With and without new tokens, as text and as tokens, of a prompt that fills the model as well."""
    long = (engine.encode("word " * 40) * 3)[:256]
    assert len(long) == 256
    for prompt, most in ((PROMPT, 4), (PROMPT, 0), (engine.encode(PROMPT), 4), (long, 0)):
        ids = engine.encode(prompt) if isinstance(prompt, str) else prompt
        whole = ids + (greedy_ids(engine, ids, most) if most else [])
        options = GREEDY | {"max_tokens": most}
        answer = client.completions.create(prompt=prompt, logprobs=1, echo=True, **options)
        choice = answer.choices[0]
        found = choice.logprobs
        assert found is not None
        assert found.tokens == [in_completions(engine, token) for token in whole]
        assert choice.text == engine.tokenizer.decode(whole)
        count = len(ids)
        assert found.text_offset[:count] == [len("".join(found.tokens[:i])) for i in range(count)]
        assert found.token_logprobs[0] is None
        assert found.top_logprobs[0] is None
        rows = judge(whole)[:-1]
        expected = [float(row[token]) for row, token in zip(rows, whole[1:], strict=True)]
        assert found.token_logprobs[1:] == pytest.approx(expected, abs=TOLERANCE)
        for row, top in zip(rows, found.top_logprobs[1:], strict=True):
            assert max(top.values()) == pytest.approx(float(row.max()), abs=TOLERANCE)
        assert choice.finish_reason == "length"
        assert answer.usage
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), most)


def test_an_echo_alone(client: openai.OpenAI) -> None:
    choice = client.completions.create(prompt=PROMPT, echo=True, **(GREEDY | {"max_tokens": 0})).choices[0]
    assert (choice.text, choice.logprobs, choice.finish_reason) == (PROMPT, None, "length")


def test_a_long_prompt_in_pieces(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    from msquant.inference import batch

    options = {"prompt": PROMPT * 4, "echo": True, "logprobs": 2, **GREEDY}
    whole = client.completions.create(**options).choices[0].logprobs
    monkeypatch.setattr(batch, "PREFILL_TOKENS", 5)
    pieces = client.completions.create(**options).choices[0].logprobs
    assert whole is not None
    assert pieces is not None
    assert pieces.tokens == whole.tokens
    assert pieces.token_logprobs[1:] == pytest.approx(whole.token_logprobs[1:], abs=TOLERANCE)


def test_several_prompts_and_streams_say_the_same(client: openai.OpenAI) -> None:
    options = {"prompt": [PROMPT, FOREIGN], "logprobs": 2, "echo": True, **GREEDY}
    answer = client.completions.create(**options)
    for i in range(2):
        joined: dict[str, list[Any]] = {}
        text = ""
        for chunk in client.completions.create(stream=True, **options):
            if chunk.choices[0].index == i:
                text += chunk.choices[0].text
                part = chunk.choices[0].logprobs
                for name, values in part.model_dump().items() if part else ():
                    joined.setdefault(name, []).extend(values)
        expected = answer.choices[i].logprobs
        assert expected is not None
        assert text == answer.choices[i].text
        assert joined == expected.model_dump()


def test_parts_of_characters(client: openai.OpenAI) -> None:
    """They are written as OpenAI does it, and every one knows the character that it belongs to."""
    choice = client.completions.create(
        prompt=FOREIGN, logprobs=0, echo=True, **(GREEDY | {"max_tokens": 0})
    ).choices[0]
    found = choice.logprobs
    assert found is not None
    assert [token for token in found.tokens if token.startswith("bytes:")][:2] == [
        "bytes:\\xc3",
        "bytes:\\xaf",
    ]
    joined = b"".join(
        token.removeprefix("bytes:").encode().decode("unicode_escape").encode("latin-1")
        if token.startswith("bytes:")
        else token.encode()
        for token in found.tokens
    )
    assert joined.decode() == FOREIGN == choice.text
    starts = {offset for token, offset in zip(found.tokens, found.text_offset, strict=True) if "xf0" in token}
    assert starts == {FOREIGN.index("🙂")}


def test_the_sampled_token_is_among_them(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "prompt": PROMPT, "max_tokens": 48, "temperature": 0.6, "seed": 3}
    found = client.completions.create(logprobs=1, **options).choices[0].logprobs
    assert found is not None
    assert {len(top) for top in found.top_logprobs} == {1, 2}
    for token, logprob, top in zip(found.tokens, found.token_logprobs, found.top_logprobs, strict=True):
        assert logprob <= max(top.values())
        assert token in top


def test_chats_have_those_of_transformers(client: openai.OpenAI, engine: EmbeddedEngine, judge: Any) -> None:
    options: dict[str, Any] = {"messages": QUESTION, "logprobs": True, "top_logprobs": 4, **GREEDY}
    choice = client.chat.completions.create(**options).choices[0]
    ids = chat_ids(engine.tokenizer, QUESTION)
    new = greedy_ids(engine, ids, 12)
    rows = judge(ids + new)[len(ids) - 1 : -1]
    assert choice.logprobs is not None
    content = choice.logprobs.content
    assert content is not None
    joined = b"".join(bytes(entry.bytes or []) for entry in content)
    assert joined.decode(errors="replace") == choice.message.content
    for row, token, entry in zip(rows, new, content, strict=True):
        assert entry.token == in_chats(engine, token)
        assert entry.logprob == pytest.approx(float(row[token]), abs=TOLERANCE)
        best = row.topk(4)
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx(
            best.values.tolist(), abs=TOLERANCE
        )
        assert [one.token for one in entry.top_logprobs] == [
            in_chats(engine, i) for i in best.indices.tolist()
        ]
    streamed = [
        entry
        for chunk in client.chat.completions.create(stream=True, **options)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == content
    plain = client.chat.completions.create(messages=QUESTION, logprobs=True, **GREEDY).choices[0].logprobs
    assert plain is not None
    assert [entry.top_logprobs for entry in plain.content or []] == [[]] * 12
    assert client.chat.completions.create(messages=QUESTION, **GREEDY).choices[0].logprobs is None


def test_the_token_that_ends_an_answer(
    client: openai.OpenAI, engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no part of a chat's content, but one of a completion's tokens."""
    ids, chat = greedy_ids(engine, engine.encode(PROMPT), 3), chat_ids(engine.tokenizer, QUESTION)
    chat = greedy_ids(engine, chat, 3)
    monkeypatch.setattr(engine, "config", replace(engine.config, eos_token_ids=(ids[2], chat[2])))
    choice = client.completions.create(prompt=PROMPT, logprobs=1, **GREEDY).choices[0]
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == [in_completions(engine, token) for token in ids]
    answer = client.chat.completions.create(messages=QUESTION, logprobs=True, **GREEDY).choices[0]
    assert answer.finish_reason == "stop"
    assert answer.logprobs is not None
    assert [entry.token for entry in answer.logprobs.content or []] == [
        in_chats(engine, token) for token in chat[:2]
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: Input should be less than or equal to 20"),
        ({"logprobs": True, "top_logprobs": -1}, "greater than or equal to 0"),
        ({"logprobs": 5}, "logprobs: Input should be a valid boolean"),
        ({"top_logprobs": 2}, "'top_logprobs' needs 'logprobs' to be true"),
        ({"logprobs": False, "top_logprobs": 2}, "'top_logprobs' needs 'logprobs' to be true"),
    ],
)
def test_refused(client: openai.OpenAI, options: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(messages=QUESTION, **GREEDY, **options)  # type: ignore[call-overload]
    assert message in caught.value.message


def test_more_than_an_answer_may_have(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match=r"196608 log probabilities, .* 131072; ask for fewer"):
        client.completions.create(
            prompt=[[1] * 156] * 128, echo=True, logprobs=5, **(GREEDY | {"max_tokens": 100})
        )
