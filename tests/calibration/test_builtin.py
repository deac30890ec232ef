"""The builtin text: what it is made of, and that evaluation text is not in it."""

import json
from pydoc_data.topics import topics

from msquant.calibration.builtin import calibration_domains, evaluation_texts, shipped_text
from msquant.calibration.rows import RowText
from tests.fixtures.tiny_model import tiny_tokenizer


def test_evaluation_text_is_every_second_entry() -> None:
    assert evaluation_texts() == [topics[key] for i, key in enumerate(sorted(topics)) if i % 2 == 1]


def test_no_paragraph_is_in_both() -> None:
    documentation = calibration_domains()[0].texts
    assert documentation[0] == topics[min(topics)]
    paragraphs = [
        {paragraph.strip() for text in texts for paragraph in text.split("\n\n")}
        for texts in (documentation, evaluation_texts())
    ]
    assert min(map(len, paragraphs)) > 1000
    assert not paragraphs[0] & paragraphs[1]


def test_no_domain_is_short_and_shares_are_sixteenths() -> None:
    domains = calibration_domains()
    assert sum(domain.weight for domain in domains) == 16
    assert min(len("".join(domain.texts)) for domain in domains) > 10_000


def test_domains_are_what_they_say() -> None:
    texts = {domain.name: "".join(domain.texts) for domain in calibration_domains()}
    assert list(texts) == ["documentation", "code", "dialogue", "chinese", "fiction", "math"]
    compile(texts["code"].partition("\nclass ")[0], "code", "exec")
    assert sum("\u4e00" <= character <= "\u9fff" for character in texts["chinese"]) > 10_000
    assert not any("\u4e00" <= character <= "\u9fff" for character in texts["fiction"])


def test_the_dialogue_goes_through_the_models_chat_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    plain, chat = (
        next(domain for domain in domains if domain.name == "dialogue")
        for domains in (calibration_domains(), calibration_domains(RowText(tokenizer=tokenizer)))
    )
    assert (plain.rendered, chat.rendered) == (False, True)
    assert len(plain.texts) == len(chat.texts) == 60
    assert all(text.startswith(("<|user|>", "<|system|>")) for text in chat.texts)


def test_every_conversation_alternates_and_ends_with_an_answer() -> None:
    for use in ("calibration", "evaluation"):
        for line in shipped_text(use, "dialogue.jsonl").splitlines():
            roles = [message["role"] for message in json.loads(line)["messages"]]
            turns = roles[1:] if roles[0] == "system" else roles
            assert turns == ["user", "assistant"] * (len(turns) // 2)


def test_same_text_every_time() -> None:
    assert calibration_domains() == calibration_domains()
