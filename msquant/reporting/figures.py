"""Charts as SVG that takes its colours from the page, drawn by matplotlib.

An SVG element in the page needs no script, so the page can forbid them all; it is sharp on paper; and colours
that are CSS variables follow the reader's light or dark setting.
"""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 5.0, 2.7
"""Inches: as wide as a phone shows it without shrinking its text to nothing."""

INK, MUTED, GRID = "#010101", "#020202", "#030303"
FIRST, SECOND, THIRD, ALARM = "#040404", "#050505", "#060606", "#070707"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    FIRST: "--first",
    SECOND: "--second",
    THIRD: "--third",
    ALARM: "--alarm",
}
"""What is drawn in these colours takes the page's CSS variables of these names."""

_NARROW = 100
"""A logarithmic axis over less than two decades has labels between the powers of ten, too."""

_SVG = "http://www.w3.org/2000/svg"
_XLINK = "http://www.w3.org/1999/xlink"

_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    # Names of layers and files are no formulas.
    "text.parse_math": False,
    "font.size": 12,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 12.5,
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
    "legend.fontsize": 12,
    "lines.linewidth": 1.6,
    "legend.borderaxespad": 0,
    "legend.handlelength": 1.3,
    "legend.columnspacing": 1.2,
    "figure.constrained_layout.use": True,
}


def draw(
    identity: str, title: str, description: str, paint: Callable[["Axes"], None], height: float = HEIGHT
) -> str:
    """Draw one chart.

    Args:
        identity: of the element in the page, letters, digits and dashes; the same one gives the same bytes.
        title: what a screen reader calls it.
        description: what it shows, in a sentence.
        paint: draws into the axes.
        height: inches.

    Returns:
        An `svg` element for an HTML page.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    settings: Any = {**_SETTINGS, "svg.hashsalt": identity}
    with mpl.rc_context(settings):
        figure = Figure(figsize=(WIDTH, height))
        paint(figure.add_subplot())
        target = io.StringIO()
        figure.savefig(target, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(target.getvalue(), identity, title, description)


def _for_page(svg: str, identity: str, title: str, description: str) -> str:
    """Without what only a file needs, with what a screen reader needs, and with the page's colours."""
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
    names = {"title": title, "desc": description}
    for place, (tag, text) in enumerate(names.items()):
        element = ET.Element(f"{{{_SVG}}}{tag}", {"id": f"{identity}-{tag}"})
        element.text = text
        root.insert(place, element)
    root.attrib |= {
        "id": identity,
        "role": "img",
        "aria-labelledby": " ".join(f"{identity}-{tag}" for tag in names),
    }
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
