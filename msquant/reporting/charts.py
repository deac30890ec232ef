"""The charts of a report: what is drawn, of which numbers, with which axes; SVG, drawn by matplotlib.

An SVG element in the page needs no script, so the page can forbid them all; it is sharp on paper; and colours
that are CSS variables follow the reader's light or dark setting.
"""

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from msquant.reporting.data import ExpertsRow, Report
from msquant.reporting.histograms import Histogram
from msquant.reporting.manifest_data import Group, Layer

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


if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_PANELS = 24
"""Charts of one sort; a model has a handful of groups and a dozen kinds of projections."""
_BARS = 12
_LONGEST_LABEL = 34
_LAYER = "decoder layer"


@dataclass(frozen=True)
class Charts:
    """SVG elements by section; empty where there is nothing to draw."""

    errors: tuple[str, ...]
    alphas: tuple[str, ...]
    ranges: tuple[str, ...]
    histograms: tuple[str, ...]
    experts: tuple[str, ...]
    ranking: tuple[str, ...]

    @property
    def count(self) -> int:
        """Of all charts."""
        return sum(map(len, vars(self).values()))


def charts(report: Report) -> Charts:
    """Draw all charts of a report."""
    groups = [(name, _of_group(report.layers, name)) for name in report.groups[:_MOST_PANELS]]
    return Charts(
        errors=tuple(_errors(report) + _noise(report)),
        alphas=tuple(_alphas(f"alpha-{i}", name, found) for i, (name, found) in enumerate(groups)),
        ranges=tuple(
            chart
            for i, (name, found) in enumerate(groups)
            if (chart := _ranges(f"range-{i}", name, found)) is not None
        ),
        histograms=tuple(
            _histogram(f"histogram-{i}", found)
            for i, found in enumerate(report.histograms[:_MOST_PANELS])
            if found.read
        ),
        experts=tuple(_experts(report)),
        ranking=tuple(_ranking(report)),
    )


def _of_group(layers: Sequence[Layer], name: str) -> list[tuple[int, Group]]:
    return [(layer.index, group) for layer in layers for group in layer.groups if group.name == name]


def _errors(report: Report) -> list[str]:
    points = [(layer.index, layer.error) for layer in report.layers if layer.error and layer.error > 0]
    if not points:
        return []
    layers, errors = zip(*points, strict=True)

    def paint(axes: "Axes") -> None:
        axes.plot(layers, errors, "o-", color=FIRST, markersize=3.5)
        axes.axhline(float(np.median(errors)), color=MUTED, linewidth=1, linestyle="--")
        axes.set(title="Error of each decoder layer", xlabel=_LAYER, ylabel="relative error")
        logarithmic(axes, [*errors, 1.5 * max(errors)])
        _whole_numbers(axes)
        for index, error in _apart(points, max(1, len(points) // 8)):
            axes.annotate(str(index), (index, error), (0, 4), textcoords="offset points", ha="center")

    description = (
        f"Relative error of the output of {len(points)} decoder layers, from {min(errors):.1e} to "
        f"{max(errors):.1e}; the dashed line is the median."
    )
    return [draw("errors", "Error of each decoder layer", description, paint)]


def _apart(points: Sequence[tuple[int, float]], distance: int) -> list[tuple[int, float]]:
    """The three highest points, but for those whose labels would run into one that is higher."""
    chosen: list[tuple[int, float]] = []
    for index, value in sorted(points, key=lambda point: -point[1]):
        if len(chosen) < 3 and all(abs(index - other) >= distance for other, _ in chosen):
            chosen.append((index, value))
    return chosen


def _noise(report: Report) -> list[str]:
    layers = report.evaluation.layers if report.evaluation else []
    series = {
        "its own": [(layer.index, layer.own_snr) for layer in layers if layer.own_snr is not None],
        "with all before it": [(layer.index, layer.snr) for layer in layers if layer.snr is not None],
    }
    if not any(series.values()):
        return []

    def paint(axes: "Axes") -> None:
        for (label, points), color in zip(series.items(), (FIRST, SECOND), strict=True):
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=color, markersize=3.5, label=label)
        axes.set(title="Signal to noise", xlabel=_LAYER, ylabel="dB, higher is better")
        _whole_numbers(axes)
        legend_above(axes, 2)

    return [draw("noise", "Signal to noise", "Signal-to-noise of each decoder layer's output in dB.", paint)]


def _alphas(identity: str, name: str, found: list[tuple[int, Group]]) -> str:
    points = [(index, group.alpha) for index, group in found if group.alpha is not None]

    def paint(axes: "Axes") -> None:
        axes.plot(*zip(*points, strict=True), "o", color=FIRST, markersize=4) if points else None
        axes.set(
            title=f"Alpha of {_short(name)}",
            xlabel=_LAYER,
            ylabel="alpha",
            ylim=(-0.06, 1.06),
            yticks=(0, 0.5, 1),
        )
        _whole_numbers(axes)

    description = f"The smoothing strength alpha chosen for {name} in each of {len(points)} decoder layers."
    return draw(identity, f"Alpha of {name}", description, paint, height=1.75)


def _ranges(identity: str, name: str, found: list[tuple[int, Group]]) -> str | None:
    series: dict[str, list[tuple[int, float, float]]] = {"before": [], "after": []}
    for index, group in found:
        for label, ranges in (("before", group.before), ("after", group.after)):
            median, largest = (ranges.median or 0, ranges.largest or 0) if ranges else (0, 0)
            if median > 0 and largest > 0:
                series[label].append((index, median, largest))
    values = [value for points in series.values() for _, *pair in points for value in pair]
    if not values:
        return None

    def paint(axes: "Axes") -> None:
        for (label, points), color in zip(series.items(), (SECOND, FIRST), strict=True):
            if not points:
                continue
            layers, medians, largest = zip(*points, strict=True)
            axes.fill_between(layers, medians, largest, color=color, alpha=0.18, linewidth=0)
            axes.plot(layers, largest, color=color, label=label)
            axes.plot(layers, medians, color=color, linewidth=1, linestyle=":")
        axes.set(title=f"Inputs of {_short(name)}", xlabel=_LAYER, ylabel="greatest magnitude")
        logarithmic(axes, values)
        _whole_numbers(axes)
        legend_above(axes, 2)

    description = (
        f"Greatest magnitudes of the channels that {name} reads, before and after smoothing: the largest "
        "channel is the solid line, the median channel the dotted one."
    )
    return draw(identity, f"Activation ranges of {name}", description, paint)


def _histogram(identity: str, found: Histogram) -> str:
    shares = np.asarray(found.counts) / found.read * 100

    def paint(axes: "Axes") -> None:
        half = len(found.levels) // 2
        edges = np.arange(-half, half + 1) - 0.5
        axes.stairs(shares, edges, fill=True, color=FIRST, alpha=0.85)
        axes.set(
            title=_short(found.kind),
            xlabel=f"int{found.bits} level",
            ylabel="% of weights",
            xlim=(-1.03 * half, 1.03 * half),
        )
        axes.set_xticks((-half, -half // 2, 0, half // 2, half - 1))
        axes.set_ylim(0, float(shares.max()) * 1.08)

    description = (
        f"Share of the int{found.bits} weights of {found.kind} at each level; {found.zeros:.1%} are 0, "
        f"{found.edges:.2%} are at the ends of the range."
    )
    return draw(identity, f"Int{found.bits} weights of {found.kind}", description, paint, height=2.1)


def _experts(report: Report) -> list[str]:
    rows = [row for row in report.experts if row.tokens]
    if not rows:
        return []
    minimum = report.min_expert_tokens or 1
    return [_token_map(rows, minimum), _token_spread(rows, minimum), _coverage(rows, minimum)]


def _coverage(rows: Sequence[ExpertsRow], minimum: int) -> str:
    layers = np.array([row.layer for row in rows])
    before, after = [row.below(minimum) for row in rows], [row.few for row in rows]

    def paint(axes: "Axes") -> None:
        axes.bar(layers - 0.2, before, 0.4, color=FIRST, alpha=0.45, label="by the router")
        axes.bar(layers + 0.2, after, 0.4, color=ALARM, label="with the nearest tokens")
        axes.set(title="Experts below the bar", xlabel=_LAYER, ylabel=f"experts with fewer than {minimum}")
        axes.set_ylim(0, max(1, *before, *after) * 1.1)
        _whole_numbers(axes)
        legend_above(axes, 2)

    description = (
        f"Routed experts with fewer than {minimum} calibration tokens in {len(rows)} layers: "
        f"{sum(before)} by the router, {sum(after)} after they were given the tokens nearest to them."
    )
    return draw("coverage", "Experts below the bar", description, paint, height=3.2)


def _token_map(rows: Sequence[ExpertsRow], minimum: int) -> str:
    layers = [row.layer for row in rows]
    tokens = np.full((len(rows), max(len(row.tokens) for row in rows)), np.nan)
    for place, row in enumerate(rows):
        tokens[place, : len(row.tokens)] = row.tokens

    def paint(axes: "Axes") -> None:
        import matplotlib as mpl

        colors = mpl.colormaps["viridis"].with_extremes(under="#e5484d")
        image = axes.imshow(
            tokens,
            aspect="auto",
            interpolation="none",
            cmap=colors,
            vmin=minimum,
            vmax=max(float(np.nanquantile(tokens, 0.99)), minimum + 1),
            extent=(-0.5, tokens.shape[1] - 0.5, layers[-1] + 0.5, layers[0] - 0.5),
        )
        axes.grid(False)
        axes.set(title="Tokens of each expert", xlabel="expert", ylabel=_LAYER)
        bar = axes.figure.colorbar(image, ax=axes, extend="both", label="calibration tokens")
        bar.outline.set_visible(False)

    description = (
        f"Calibration tokens of every routed expert in {len(rows)} decoder layers; red has fewer than "
        f"{minimum}."
    )
    return draw("experts", "Tokens of each expert", description, paint, height=3.2)


def _token_spread(rows: Sequence[ExpertsRow], minimum: int) -> str:
    layers = [row.layer for row in rows]
    # An expert without a token has no place on a logarithmic axis.
    spread = np.array([np.quantile(np.maximum(row.tokens, 0.5), (0, 0.5, 1)) for row in rows])

    def paint(axes: "Axes") -> None:
        axes.fill_between(layers, spread[:, 0], spread[:, 2], color=FIRST, alpha=0.18, linewidth=0)
        for column, (label, style) in enumerate((("fewest", ":"), ("median", "-"), ("most", "--"))):
            axes.plot(layers, spread[:, column], style, color=FIRST, label=label)
        axes.axhline(minimum, color=ALARM, linewidth=1.2, label="too few")
        axes.set(title="Tokens by layer", xlabel=_LAYER, ylabel="tokens of an expert")
        logarithmic(axes, [*spread.reshape(-1), minimum])
        _whole_numbers(axes)
        legend_above(axes, 4)

    description = (
        f"The fewest, the median and the most calibration tokens of an expert in each of {len(rows)} layers; "
        f"fewer than {minimum} are too few."
    )
    return draw("expert-spread", "Tokens by layer", description, paint, height=3.2)


def _ranking(report: Report) -> list[str]:
    if report.ranking is None:
        return []
    rows = report.ranking.rows[:_BARS][::-1]

    def paint(axes: "Axes") -> None:
        bars = axes.barh(
            [_short(row.name) for row in rows], [100 * row.share for row in rows], color=THIRD, height=0.7
        )
        axes.bar_label(bars, [f"{row.share:.1%}" for row in rows], padding=3, color=INK)
        axes.set(title="What costs most", xlabel="% of the noise that all add")
        axes.margins(x=0.14)
        axes.grid(False, axis="y")

    description = f"The {len(rows)} of {len(report.ranking.rows)} that add most noise, as shares of all."
    return [draw("ranking", "What costs most", description, paint, height=0.9 + 0.24 * len(rows))]


def _whole_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else f"{name[:_LONGEST_LABEL]}..."
