"""The builtin text: what it is made of, and that evaluation text is not in it."""

from pydoc_data.topics import topics

from msquant.calibration.builtin import calibration_domains, evaluation_texts


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


def test_documentation_is_half_and_no_domain_is_empty() -> None:
    domains = calibration_domains()
    weights = {domain.name: domain.weight for domain in domains}
    assert weights["documentation"] * 2 == sum(weights.values())
    assert all(
        len(text) > 500 for domain in domains for text in domain.texts if domain.name != "documentation"
    )


def test_domains_are_what_they_say() -> None:
    texts = {domain.name: "".join(domain.texts) for domain in calibration_domains()}
    compile(texts["code"].partition("\nclass ")[0], "code", "exec")
    assert "Apache License" in texts["legal"]
    assert "pip install" in texts["readme"]
    han = sum("\u4e00" <= character <= "\u9fff" for character in texts["chinese"])
    assert han > 1000
    assert not any("\u4e00" <= character <= "\u9fff" for character in texts["legal"])


def test_same_text_every_time() -> None:
    assert calibration_domains() == calibration_domains()
