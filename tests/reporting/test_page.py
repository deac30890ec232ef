"""The page in a real browser: what it loads, draws and prints, in light, in dark and on a phone."""

import re
from pathlib import Path

import pytest

from msquant.reporting.write import write_comparison
from tests.fixtures.browser import Open
from tests.reporting.folders import HOSTILE, LAYERS, evaluation
from tests.reporting.test_comparison import scored

MOST_SECONDS = 1.0
SMALLEST_TEXT = 9.0
"""Pixels of a chart's text."""
CONTRAST, CHART_CONTRAST = 4.5, 3.0
"""WCAG 2.2, 1.4.3 and 1.4.11: of text and of graphics."""


def test_it_opens_at_once_and_asks_for_nothing(large: Path, open_page: Open) -> None:
    seconds = []
    for _ in range(3):
        page = open_page(large)
        seconds.append(page.worked())
        assert page.said == []
        own = [url for url in page.requested if not url.startswith("data:")]
        assert own == [page.url]
    assert 0 < min(seconds) < MOST_SECONDS


SHOWN = "[...document.querySelectorAll('figure svg')].filter(svg => svg.getBoundingClientRect().width)"
"""Of a chart for the whole card there is a second one for a phone."""


def test_every_chart_is_drawn(large: Path, open_page: Open) -> None:
    charts = open_page(large).evaluate(
        SHOWN
        + """.map(svg => ({
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


COLOR = """(() => {
    const probe = document.body.appendChild(document.createElement('i'));
    probe.style.color = 'var(%s)';
    const color = getComputedStyle(probe).color;
    probe.remove();
    return color;
})()"""


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
    variables = [page.evaluate(COLOR % name) for name in ("--first", "--second", "--third", "--alarm")]
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
        SHOWN
        + """.flatMap(svg => [...svg.querySelectorAll('text')]).map(
            text => parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a)"""
    )
    assert min(sizes) >= SMALLEST_TEXT


@pytest.mark.parametrize("width", [360, 820, 821, 1200])
def test_charts_are_as_wide_as_the_card(large: Path, open_page: Open, width: int) -> None:
    page = open_page(large, width=width)
    found = page.evaluate(
        SHOWN
        + """.map(svg => {
            const card = getComputedStyle(svg.closest('section'));
            const room = svg.closest('section').clientWidth - parseFloat(card.paddingLeft) * 2;
            const row = svg.closest('.charts');
            const columns = row ? getComputedStyle(row).gridTemplateColumns.split(' ').length : 1;
            return [svg.querySelector('title').textContent, svg.getBoundingClientRect().width / room, columns,
                Math.min(...[...svg.querySelectorAll('text')].map(
                    text => parseFloat(getComputedStyle(text).fontSize) * svg.getScreenCTM().a))];
        })"""
    )
    assert len(found) >= 20
    for title, part, columns, text in found:
        assert part == pytest.approx(1 / columns, abs=0.05), title
        assert text >= SMALLEST_TEXT, title
    alone = [title for title, _, columns, _ in found if columns == 1]
    assert {"Signal to noise", "Error of each decoder layer", "What costs most"} <= set(alone)


def test_the_value_under_the_pointer_is_said(large: Path, open_page: Open) -> None:
    page = open_page(large)
    # What a browser shows is the title of the element that the pointer is over.
    under = """([id, share]) => {
        const svg = document.getElementById(id);
        svg.scrollIntoView({block: 'center'});
        const bands = [...svg.querySelectorAll('.values rect')];
        const box = bands[Math.floor(share * bands.length)].getBoundingClientRect();
        return document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2)
            .querySelector('title').textContent;
    }"""

    def said(chart: str, share: float) -> str:
        return str(page.page.evaluate(under, [chart, share]))

    layers = evaluation()["layers"]
    for share, index in ((0, 0), (0.5, 30), (0.99, 60)):
        own, all_before = layers[index]["own_snr"], layers[index]["snr"]
        expected = f"layer {index}: its own {own:.1f} dB, with all before it {all_before:.1f} dB"
        assert said("noise", share) == expected
    assert re.fullmatch(r"layer 0: \d\.\d\de-\d\d", said("errors", 0))
    assert re.fullmatch(r"layer 30: alpha 0\.\d+", said("alpha-0", 0.5))
    assert re.fullmatch(r"layer 30: before: largest .*; after: largest .*, median .*", said("range-0", 0.5))
    assert re.fullmatch(r"levels 0 to 7: [\d.]+ % of weights", said("histogram-0", 0.5))
    assert re.fullmatch(r"layer 3: fewest tokens \d+, median \d+, most \d+", said("experts", 0))
    assert re.fullmatch(r"layer 40: \d+\.\d\d% of the noise, [\d.]+ dB of its own", said("ranking", 0.99))
    page.page.mouse.move(0, 0)
    shade = "getComputedStyle(document.querySelectorAll('#noise .values rect')[30]).fill"
    assert page.evaluate(shade) == "none"
    page.page.locator("#noise .values rect").nth(30).hover()
    assert page.evaluate(shade) != "none"


def test_the_value_of_a_layer_is_where_its_mark_is(large: Path, open_page: Open) -> None:
    apart = open_page(large).evaluate(
        """['noise', 'errors'].flatMap(id => {
            const svg = document.getElementById(id);
            const bands = [...svg.querySelectorAll('.values rect')];
            const marks = [...svg.querySelectorAll('g > use')].map(mark => mark.getBoundingClientRect())
                .filter(box => box.y + box.height < svg.querySelector('.values rect')
                    .getBoundingClientRect().bottom && box.width > 3);
            return bands.map((band, i) => {
                const box = band.getBoundingClientRect();
                const middle = box.x + box.width / 2;
                return Math.min(...marks.map(mark => Math.abs(mark.x + mark.width / 2 - middle))) / box.width;
            });
        })"""
    )
    assert len(apart) == 2 * LAYERS
    assert max(apart) < 0.2


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_runs_side_by_side_stand_out_and_fit(tmp_path: Path, open_page: Open, scheme: str) -> None:
    folders = [scored(tmp_path / f"run-{i}", 0.01 * (i + 1), i % 2) for i in range(8)]
    path, _ = write_comparison(folders, check=False)
    page = open_page(path, scheme)
    assert page.said == []
    variables = re.findall(
        r"--(?:first|second|third|fourth|fifth|sixth|seventh|alarm)(?=:)", path.read_text()
    )
    colors = {name: page.evaluate(COLOR % name) for name in variables}
    assert len(set(colors.values())) == 8
    ground = page.evaluate("getComputedStyle(document.querySelector('section')).backgroundColor")
    assert min(contrast(color, ground) for color in colors.values()) >= CHART_CONTRAST
    assert page.evaluate(OVERLAPPING) == []
    phone = open_page(path, scheme, width=360)
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    assert phone.evaluate(OVERLAPPING) == []


OVERLAPPING = (
    SHOWN
    + """.flatMap(svg => {
            const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent,
                text.getBoundingClientRect()]);
            return boxes.flatMap(([one, a], i) => boxes.slice(i + 1).filter(([, b]) =>
                Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
                Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
                .map(([other]) => `${svg.querySelector('title').textContent}: ${one} / ${other}`));
        })"""
)


def test_text_in_charts_does_not_overlap(large: Path, open_page: Open) -> None:
    assert open_page(large).evaluate(OVERLAPPING) == []


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
