"""Chat templates: the prompt is what transformers makes, and one BOS token is one."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from msquant.errors import EngineError
from msquant.inference.chat_template import chat_ids, chat_prompt, chat_text
from tests.fixtures.tiny_model import BOS, EOS

MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Who are you?"},
]


@pytest.fixture
def tokenizer(chat_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(chat_model)


def test_text_and_tokens_are_those_of_transformers(tokenizer: Any) -> None:
    assert chat_text(tokenizer, MESSAGES) == (
        f"{BOS}system: Be short.{EOS}{BOS}user: Who are you?{EOS}{BOS}assistant: "
    )
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert chat_ids(tokenizer, MESSAGES) == expected
    assert tokenizer.encode(chat_prompt(tokenizer, MESSAGES)) == expected


def test_a_tokenizer_that_adds_bos_adds_it_once(tokenizer: Any) -> None:
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]
    )
    assert tokenizer.encode("I")[:1] == [tokenizer.bos_token_id]
    expected = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)
    assert expected[:2].count(tokenizer.bos_token_id) == 1
    assert chat_ids(tokenizer, MESSAGES) == expected
    assert tokenizer.encode(chat_prompt(tokenizer, MESSAGES)) == expected


def test_unknown_role(tokenizer: Any) -> None:
    with pytest.raises(EngineError, match="role 'robot' is unknown") as caught:
        chat_text(tokenizer, [{"role": "robot", "content": "hi"}])
    assert "system, user, assistant" in str(caught.value.remedy)


def test_no_message(tokenizer: Any) -> None:
    with pytest.raises(EngineError, match="no message"):
        chat_text(tokenizer, [])


def test_no_template(tiny_llama: Path) -> None:
    with pytest.raises(EngineError, match="has no chat template") as caught:
        chat_text(AutoTokenizer.from_pretrained(tiny_llama), MESSAGES)
    assert caught.value.where == "tokenizer_config.json"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('users only') }}", "users only"),
        ("{% for %}", "Expected"),
        ("{{ messages[0].role.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_template_that_refuses_or_is_wrong(tokenizer: Any, template: str, reason: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(EngineError, match=f"refuses these messages: .*{reason}"):
        chat_text(tokenizer, MESSAGES)
