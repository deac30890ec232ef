"""How a chart is drawn: SVG by matplotlib, in the page's colours, with values where the pointer is.

An SVG element in the page needs no script, so the page can forbid them all; it is sharp on paper; and colours
that are CSS variables follow the reader's light or dark setting.
"""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Size = tuple[float, float, float]
"""Inches wide, and high for a height of 1; points of its text."""

PHONE: Size = (5.0, 1.0, 12.0)
"""As wide as a phone, or a column of three, shows it without shrinking its text to nothing."""
CARD: Size = (11.2, 1.1, 10.5)
"""As wide as the card on a screen."""

HEIGHT = 2.7
"""Inches, of a chart that says nothing else."""

INK, MUTED, GRID = "#010101", "#020202", "#030303"
FIRST, SECOND, THIRD, ALARM = "#040404", "#050505", "#060606", "#070707"
SERIES = (FIRST, SECOND, THIRD, "#080808", "#090909", "#0a0a0a", "#0b0b0b", ALARM)
"""Of models side by side; as many as there are at most."""
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    FIRST: "--first",
    SECOND: "--second",
    THIRD: "--third",
    ALARM: "--alarm",
    SERIES[3]: "--fourth",
    SERIES[4]: "--fifth",
    SERIES[5]: "--sixth",
    SERIES[6]: "--seventh",
}
"""What is drawn in these colours takes the page's CSS variables of these names."""

_NARROW = 100
"""A logarithmic axis over less than two decades has labels between the powers of ten, too."""

_POINTS = 72
"""Of an inch: with as many dots, what matplotlib computes is what its SVG has."""

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"


@dataclass(frozen=True)
class Value:
    """What is said where the pointer is within a band of a chart.

    Attributes:
        low: where the band begins, in the axis' own numbers.
        high: where it ends.
        text: what is said.
        across: whether the band is of the vertical axis.
    """

    low: float
    high: float
    text: str
    across: bool = False


def draw(
    identity: str,
    title: str,
    description: str,
    paint: Callable[["Axes"], None],
    values: Sequence[Value] = (),
    *,
    height: float = HEIGHT,
    whole: bool = False,
) -> str:
    """Draw one chart.

    Args:
        identity: of the element in the page, letters, digits and dashes; the same one gives the same bytes.
        title: what a screen reader calls it.
        description: what it shows, in a sentence.
        paint: draws into the axes.
        values: what is said where the pointer is.
        height: inches.
        whole: for the whole width of the card, which has a second one for a phone.

    Returns:
        An `svg` element for an HTML page; for the whole width two, of which the page shows one.
    """
    words = title, description
    if not whole:
        return _svg(identity, "", PHONE, height, words, paint, values)
    return _svg(identity, "card", CARD, height, words, paint, values) + _svg(
        f"{identity}-phone", "phone", PHONE, height, words, paint, values
    )


def _svg(
    identity: str,
    kind: str,
    size: Size,
    height: float,
    words: tuple[str, str],
    paint: Callable[["Axes"], None],
    values: Sequence[Value],
) -> str:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    width, stretch, points = size
    settings: Any = {**_settings(points), "svg.hashsalt": identity}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(width, stretch * height), dpi=_POINTS)
        axes = figure.add_subplot()
        paint(axes)
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    root = _for_page(target.getvalue(), identity, words)
    if kind:
        root.set("class", kind)
    if values:
        root.append(_bands(axes, values, _POINTS * stretch * height))
    return _text(root)


def _bands(axes: "Axes", values: Sequence[Value], height: float) -> ET.Element:
    """Transparent bands over the axes: a browser shows the title of the one that the pointer is in."""
    group = ET.Element(f"{{{_SVG}}}g", {"class": "values", "fill": "none", "pointer-events": "all"})
    box = axes.get_window_extent()
    for value in values:
        # The other number is one that a logarithmic axis has, too.
        points = ((1, end) if value.across else (end, 1) for end in (value.low, value.high))
        ends = [axes.transData.transform(point)[int(value.across)] for point in points]
        first, last = (box.y0, box.y1) if value.across else (box.x0, box.x1)
        low, high = (min(max(end, first), last) for end in sorted(ends))
        x, width = (box.x0, box.width) if value.across else (low, high - low)
        y, tall = (height - high, high - low) if value.across else (height - box.y1, box.height)
        numbers = {"x": x, "y": y, "width": width, "height": tall}
        rect = ET.SubElement(group, f"{{{_SVG}}}rect", {k: f"{v:.1f}" for k, v in numbers.items()})
        ET.SubElement(rect, f"{{{_SVG}}}title").text = value.text
    return group


def _settings(points: float) -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        # Names of layers and files are no formulas.
        "text.parse_math": False,
        "font.size": points,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "axes.titlesize": points + 0.5,
        "axes.titlecolor": INK,
        "axes.titlelocation": "left",
        "axes.grid": True,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "text.color": INK,
        "legend.frameon": False,
        "legend.fontsize": points,
        "lines.linewidth": 1.6,
        "legend.borderaxespad": 0,
        "legend.handlelength": 1.3,
        "legend.columnspacing": 1.2,
        "figure.constrained_layout.use": True,
    }


def _for_page(svg: str, identity: str, words: tuple[str, str]) -> ET.Element:
    """Without what only a file needs, and with what a screen reader needs."""
    root = ET.fromstring(svg)
    for child in [*root]:
        if child.tag == f"{{{_SVG}}}metadata":
            root.remove(child)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", svg))
    for element in root.iter():
        # Names that nothing refers to are the same in every chart.
        if "id" in element.attrib and element.attrib["id"] not in used:
            del element.attrib["id"]
    for name in ("width", "height"):
        del root.attrib[name]
    names = dict(zip(("title", "desc"), words, strict=True))
    for place, (tag, text) in enumerate(names.items()):
        element = ET.Element(f"{{{_SVG}}}{tag}", {"id": f"{identity}-{tag}"})
        element.text = text
        root.insert(place, element)
    root.attrib |= {
        "id": identity,
        "role": "img",
        "aria-labelledby": " ".join(f"{identity}-{tag}" for tag in names),
    }
    return root


def _text(root: ET.Element) -> str:
    """The element, in the page's colours and its font."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    text = ET.tostring(root, encoding="unicode")
    text = re.sub(r"(font: [0-9.]+px )[^;\"]+", r"\1system-ui, sans-serif", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return text


def power(value: float, _: Any = None) -> str:
    """A tick of a logarithmic axis: `1e-3`."""
    mantissa, _, exponent = f"{value:.0e}".partition("e")
    return f"{mantissa}e{int(exponent)}"


def legend_above(axes: "Axes", columns: int) -> None:
    """Put the legend between the title and what is drawn, where it hides nothing."""
    axes.set_title(axes.get_title(loc="left"), pad=22)
    axes.legend(ncols=columns, loc="lower left", bbox_to_anchor=(0, 1.01))


def logarithmic(axes: "Axes", values: list[float]) -> None:
    """Make the vertical axis logarithmic, with room around the values and a few plain labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = min(values) / 1.5, max(values) * 1.5
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    narrow = high / low < _NARROW
    axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5) if narrow else (1,), numticks=6))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(power))


def whole_numbers(axes: "Axes") -> None:
    """Label the horizontal axis at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
