"""The page as a text, where there is no browser to open it."""

from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

from tests.reporting.folders import HOSTILE

MOST_BYTES = 2_000_000
FORBIDDEN = {"script", "iframe", "object", "embed", "img", "form", "base", "link"}


class Elements(HTMLParser):
    """Counts elements and ids, and collects what would be fetched or run."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.ids: Counter[str] = Counter()
        self.classes: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.policy = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        values = {name: value or "" for name, value in attrs}
        self.ids.update([values["id"]] if "id" in values else [])
        self.classes.update([values["class"]] if tag == "svg" and "class" in values else [])
        self.addresses += [values[name] for name in ("src", "href", "xlink:href") if name in values]
        self.handlers += [name for name in values if name.startswith("on")]
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]


def test_a_large_page_is_small_and_whole(large: Path) -> None:
    found = Elements(large)
    assert large.stat().st_size < MOST_BYTES
    # Charts for the whole card have a second one for a phone.
    assert found.tags["figure"] >= 20
    assert found.classes["card"] == found.classes["phone"] == found.tags["svg"] - found.tags["figure"] >= 5
    assert found.tags["section"] == 10
    assert max(found.ids.values()) == 1
    assert "default-src 'none'" in found.policy
    assert "script-src" not in found.policy


def test_nothing_hostile_becomes_an_element(large: Path, hostile: Path) -> None:
    for page in (large, hostile):
        found = Elements(page)
        assert not FORBIDDEN & set(found.tags)
        assert found.handlers == []
        assert all(address.startswith(("#", "data:image/png;base64,")) for address in found.addresses)
    text = hostile.read_text(encoding="utf-8")
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert HOSTILE[3] in text
    assert not any(character in text for character in "\x00\x1b")
