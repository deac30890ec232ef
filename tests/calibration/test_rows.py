"""Rows to texts: the columns that are known, templates, and conversations through a tokenizer's template."""

from typing import Any

import pytest

from msquant.calibration.rows import Exchange, RowText, Template
from msquant.errors import CalibrationError
from tests.fixtures.tiny_model import tiny_tokenizer

# The part of Qwen3's own template (tokenizer_config.json) that the switch changes.
THINKING_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
PLAIN_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
REFUSING = "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}x"


def _tokenizer(template: str | None) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def _text(row: dict[str, Any], template: Template | Exchange | None = None, chat: str | None = None) -> str:
    tokenizer = _tokenizer(chat) if chat else None
    text, rendered = RowText(template, tokenizer).text(row, 1, "here, row 1")
    assert rendered == (chat is not None and text.startswith("<|"))
    return text


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"text": "one", "id": 3}, "one"),
        ({"content": "one"}, "one"),
        ({"text": None}, ""),
        ({"messages": []}, ""),
        ({"messages": None, "id": 1}, ""),
        ({"question": "why?", "answer": "so"}, "why?\n\nso"),
        ({"prompt": "a", "completion": "b"}, "a\n\nb"),
        ({"instruction": "a", "output": "b", "input": ""}, "a\n\nb"),
        ({"instruction": "a", "output": "c", "input": "b"}, "a\n\nb\n\nc"),
        ({"instruction": "a", "output": "b"}, "a\n\nb"),
        ({"inputs_pretokenized": "a"}, "a"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "a\n\nb"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "a\n\nb"),
    ],
)
def test_columns_that_are_known(row: dict[str, Any], text: str) -> None:
    assert _text(row) == text


def test_conversations_go_through_the_chat_template() -> None:
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert _text(row, chat=PLAIN_TEMPLATE) == "<|user|>a<|end|><|assistant|>b<|end|>"
    assert _text({"question": "a", "answer": "b"}, chat=PLAIN_TEMPLATE) == (
        "<|user|>a<|end|><|assistant|>b<|end|>"
    )
    assert _text({"text": "raw"}, chat=PLAIN_TEMPLATE) == "raw"


def test_thoughts_are_on_and_off_in_turn_where_the_template_has_them() -> None:
    rows = RowText(tokenizer=_tokenizer(THINKING_TEMPLATE))
    row = {"question": "a", "answer": "b"}
    first, second = (rows.text(row, number, "here")[0] for number in (1, 2))
    assert first == "<|user|>a<|end|><|assistant|>b<|end|>"
    assert second == "<|user|>a<|end|><|assistant|><think></think>b<|end|>"


def test_a_conversation_that_ends_with_the_user_is_rendered_whole() -> None:
    row = {"messages": [{"role": "user", "content": "a"}]}
    assert _text(row, chat=THINKING_TEMPLATE) == "<|user|>a<|end|>"


def test_templates() -> None:
    row = {"q": "why?", "a": {"text": ["so", "or"]}, "n": 3}
    assert _text(row, Template("{q}\\n{a.text.1} {n} {{}}")) == "why?\nor 3 {}"
    exchange = Exchange(Template("{q}"), Template("{n}"))
    assert _text(row, exchange, chat=PLAIN_TEMPLATE) == "<|user|>why?<|end|><|assistant|>3<|end|>"


@pytest.mark.parametrize("template", ["", "no column", "{", "a } b", "{}", "{a} {b"])
def test_a_template_that_is_none(template: str) -> None:
    with pytest.raises(CalibrationError, match=r"names no column|a brace that is open"):
        Template(template)


def test_a_template_reaches_no_attribute() -> None:
    with pytest.raises(CalibrationError, match=r"there is no column 'q\.__class__'"):
        Template("{q.__class__}").fill({"q": "x"}, "here")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"body": "x", "id": 1}, "no column is known to hold text; the columns are 'body', 'id'"),
        ({"text": 3}, "'text' holds int, not text"),
        ({"messages": "hello"}, "'messages' holds no list of turns"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "turn 1 .* has the role 'narrator'"),
        ({"messages": [{"role": "user", "content": None}]}, "as content NoneType"),
        ({"question": ["x"], "answer": "y"}, "'question' holds list, not text"),
    ],
)
def test_a_row_that_is_no_text_is_named(row: dict[str, Any], what: str) -> None:
    with pytest.raises(CalibrationError, match=what) as caught:
        _text(row)
    assert caught.value.where == "here, row 1"


def test_an_unknown_column_of_a_template_lists_the_real_ones() -> None:
    with pytest.raises(CalibrationError, match="no column 'query'; the columns are 'question', 'answer'"):
        _text({"question": "a", "answer": "b"}, Template("{query}"))


def test_a_chat_template_that_raises_is_named_with_the_row() -> None:
    row = {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
    with pytest.raises(CalibrationError, match=r"refuses .* \(system, user\): no system, please") as caught:
        RowText(tokenizer=_tokenizer(REFUSING)).text(row, 1, "mine.jsonl, row 1")
    assert caught.value.where == "mine.jsonl, row 1"
    assert "--no-chat-template" in (caught.value.remedy or "")
