"""The page in a real browser: what it loads, draws and prints, in light, in dark and on a phone."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reporting.folders import HOSTILE

MOST_SECONDS = 1.0
SMALLEST_TEXT = 9.0
"""Pixels of a chart's text."""
CONTRAST, CHART_CONTRAST = 4.5, 3.0
"""WCAG 2.2, 1.4.3 and 1.4.11: of text and of graphics."""


class Page:
    """An opened page, and what the browser said about it."""

    def __init__(self, page: Any, path: Path) -> None:
        self.page = page
        self.said: list[str] = []
        self.requested: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: self.requested.append(request.url))
        self.url = path.absolute().as_uri()
        self.protocol = page.context.new_cdp_session(page)
        # Processor time of the page's own thread, in which other processes of a busy machine have no part.
        self.protocol.send("Performance.enable", {"timeDomain": "threadTicks"})
        page.goto(self.url)

    def evaluate(self, script: str) -> Any:
        return self.page.evaluate(script)

    def worked(self) -> float:
        """Seconds of processor time that the page's main thread has spent on tasks."""
        metrics = self.protocol.send("Performance.getMetrics")["metrics"]
        return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    contexts = []

    def open_page(path: Path, scheme: str = "light", width: int = 1200, height: int = 900) -> Page:
        contexts.append(browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height}))
        return Page(contexts[-1].new_page(), path)

    yield open_page
    for context in contexts:
        context.close()


def test_it_opens_at_once_and_asks_for_nothing(large: Path, open_page: Open) -> None:
    seconds = []
    for _ in range(3):
        page = open_page(large)
        seconds.append(page.worked())
        assert page.said == []
        own = [url for url in page.requested if not url.startswith("data:")]
        assert own == [page.url]
    assert 0 < min(seconds) < MOST_SECONDS


def test_every_chart_is_drawn(large: Path, open_page: Open) -> None:
    charts = open_page(large).evaluate(
        """[...document.querySelectorAll('figure svg')].map(svg => ({
            title: svg.querySelector('title').textContent,
            described: svg.getAttribute('aria-labelledby').split(' ')
                .every(id => document.getElementById(id).textContent.length > 5),
            role: svg.getAttribute('role'),
            width: svg.getBoundingClientRect().width,
            height: svg.getBoundingClientRect().height,
            marks: [...svg.querySelectorAll('path, use, image')]
                .filter(mark => mark.getBoundingClientRect().width + mark.getBoundingClientRect().height > 1)
                .length,
            texts: [...svg.querySelectorAll('text')].map(text => text.textContent),
        }))"""
    )
    titles = [chart["title"] for chart in charts]
    for expected in (
        "Error of each decoder layer",
        "Signal to noise",
        "Alpha of q_kv_a",
        "Activation ranges of down",
        "Int8 weights of mlp.experts.*.up_proj",
        "Tokens of each expert",
        "Tokens by layer",
        "What costs most",
    ):
        assert expected in titles
    assert len(titles) == len(set(titles)) >= 20
    for chart in charts:
        assert chart["role"] == "img"
        assert chart["described"]
        assert chart["width"] > 250
        assert chart["height"] > 80
        assert chart["marks"] > 15, chart["title"]
        assert len(chart["texts"]) > 5
    texts = {chart["title"]: chart["texts"] for chart in charts}
    assert {"decoder layer", "relative error", "1e-3"} <= set(texts["Error of each decoder layer"])
    assert {"expert", "calibration tokens"} <= set(texts["Tokens of each expert"])
    assert {"before", "after", "greatest magnitude"} <= set(texts["Activation ranges of down"])
    assert {"int8 level", "% of weights"} <= set(texts["Int8 weights of mlp.experts.*.up_proj"])


def test_ids_are_unique(large: Path, open_page: Open) -> None:
    ids = open_page(large).evaluate("[...document.querySelectorAll('[id]')].map(found => found.id)")
    assert len(ids) == len(set(ids))


COLORS = """[...document.querySelectorAll(%r)].map(found => {
    const style = getComputedStyle(found);
    let ground = found;
    while (ground && getComputedStyle(ground).backgroundColor === 'rgba(0, 0, 0, 0)') {
        ground = ground.parentElement;
    }
    return [style[%r], getComputedStyle(ground).backgroundColor];
})"""


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours as a browser writes them."""

    def luminance(color: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def test_contrast_is_measured_as_wcag_does() -> None:
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)
    assert contrast("rgb(119, 119, 119)", "rgb(255, 255, 255)") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_charts_stand_out(large: Path, open_page: Open, scheme: str) -> None:
    page = open_page(large, scheme)
    for selector in ("p", "h1", "h2", "dt", "span", "td", "th", "caption", "a", "summary", "pre", "li"):
        colors = page.evaluate(COLORS % (selector, "color"))
        assert colors, selector
        assert min(contrast(*pair) for pair in colors) >= CONTRAST, selector
    texts = page.evaluate(COLORS % ("figure svg text", "fill"))
    assert min(contrast(*pair) for pair in texts) >= CONTRAST
    variables = page.evaluate(
        """['--first', '--second', '--third', '--alarm'].map(name => {
            const probe = document.body.appendChild(document.createElement('i'));
            probe.style.color = `var(${name})`;
            const color = getComputedStyle(probe).color;
            probe.remove();
            return color;
        })"""
    )
    ground = page.evaluate("getComputedStyle(document.querySelector('section')).backgroundColor")
    assert min(contrast(color, ground) for color in variables) >= CHART_CONTRAST
    assert (contrast(ground, "rgb(255, 255, 255)") < 2) == (scheme == "light")


def test_light_and_dark_differ(large: Path, open_page: Open) -> None:
    script = """['body', 'section', 'figure svg text'].map(
        selector => getComputedStyle(document.querySelector(selector)))
        .flatMap(style => [style.backgroundColor, style.fill])"""
    light, dark = (open_page(large, scheme).evaluate(script) for scheme in ("light", "dark"))
    assert light[0] != dark[0]
    assert light[2] != dark[2]
    assert light[5] != dark[5]


@pytest.mark.parametrize("width", [360, 390, 768])
def test_a_phone_needs_no_sideways_scrolling(large: Path, open_page: Open, width: int) -> None:
    page = open_page(large, width=width, height=800)
    page.evaluate("document.querySelectorAll('details').forEach(found => found.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    sizes = page.evaluate(
        """[...document.querySelectorAll('figure svg text')].map(
            text => parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a)"""
    )
    assert min(sizes) >= SMALLEST_TEXT


def test_text_in_charts_does_not_overlap(large: Path, open_page: Open) -> None:
    overlapping = open_page(large).evaluate(
        """[...document.querySelectorAll('figure svg')].flatMap(svg => {
            const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent,
                text.getBoundingClientRect()]);
            return boxes.flatMap(([one, a], i) => boxes.slice(i + 1).filter(([, b]) =>
                Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
                Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
                .map(([other]) => `${svg.querySelector('title').textContent}: ${one} / ${other}`));
        })"""
    )
    assert overlapping == []


def test_it_prints_in_light_colours(large: Path, open_page: Open) -> None:
    page = open_page(large, "dark")
    document = page.page.pdf(format="A4")
    assert document.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", document)) <= 40
    page.page.emulate_media(media="print", color_scheme="dark")
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert contrast(ink, "rgb(255, 255, 255)") >= CONTRAST


def test_hostile_names_stay_text(hostile: Path, open_page: Open) -> None:
    page = open_page(hostile)
    page.evaluate("document.querySelectorAll('details').forEach(found => found.open = true)")
    page.page.wait_for_timeout(100)
    assert page.said == []
    assert [url for url in page.requested if not url.startswith("data:")] == [page.url]
    assert page.count("script, iframe, object, embed, main img, form, base, link") == 0
    assert page.count("[onload], [onerror], [onclick], a:not([href^='#'])") == 0
    text = page.evaluate("document.body.innerText")
    for name in HOSTILE[:4]:
        assert name in text
    assert "\N{REPLACEMENT CHARACTER}" in text
    assert page.evaluate("document.querySelector('h1').textContent") == "<img src=x onerror=alert(5)>"
    titles = page.evaluate("[...document.querySelectorAll('figure svg title')].map(t => t.textContent)")
    assert f"Alpha of {HOSTILE[0]}" in titles


def test_scripts_are_forbidden_even_if_one_gets_in(large: Path, open_page: Open, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    text = large.read_text(encoding="utf-8").replace(
        "</body>", "<script>document.title = 'in'</script></body>"
    )
    broken.write_text(text, encoding="utf-8")
    page = open_page(broken)
    assert page.page.title() != "in"
    assert "Content Security Policy" in page.said[0]
