"""The charts of a report: what is drawn, of which numbers, with which axes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from msquant.reporting.data import ExpertsRow, Report
from msquant.reporting.drawing import (
    ALARM,
    FIRST,
    INK,
    MUTED,
    SECOND,
    SERIES,
    THIRD,
    Value,
    draw,
    legend_above,
    logarithmic,
    whole_numbers,
)
from msquant.reporting.histograms import Histogram
from msquant.reporting.manifest_data import Group, Layer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_PANELS = 24
"""Charts of one sort; a model has a handful of groups and a dozen kinds of projections."""
_BARS = 12
_LONGEST_LABEL = 34
_LAYER = "decoder layer"
_MARKERS = "osDv^Px*"
_ROW = 3
"""Charts that stand side by side on a screen; fewer have the whole width."""
_LEVEL_BANDS = 32
"""Parts of a histogram that have a value each."""


@dataclass(frozen=True)
class Charts:
    """SVG elements by section; empty where there is nothing to draw."""

    noise: tuple[str, ...]
    errors: tuple[str, ...]
    alphas: tuple[str, ...]
    ranges: tuple[str, ...]
    histograms: tuple[str, ...]
    experts: tuple[str, ...]
    ranking: tuple[str, ...]
    frontier: tuple[str, ...]

    @property
    def count(self) -> int:
        """Of all charts."""
        return sum(map(len, vars(self).values()))


def charts(report: Report) -> Charts:
    """Draw all charts of a report."""
    groups = [(name, _of_group(report.layers, name)) for name in report.groups[:_MOST_PANELS]]
    counted = [found for found in report.histograms[:_MOST_PANELS] if found.read]
    few = len(groups) < _ROW
    return Charts(
        noise=tuple(_noise(report)),
        errors=tuple(_errors(report)),
        alphas=tuple(_alphas(f"alpha-{i}", name, found, few) for i, (name, found) in enumerate(groups)),
        ranges=tuple(
            chart
            for i, (name, found) in enumerate(groups)
            if (chart := _ranges(f"range-{i}", name, found, few)) is not None
        ),
        histograms=tuple(
            _histogram(f"histogram-{i}", found, len(counted) < _ROW) for i, found in enumerate(counted)
        ),
        experts=tuple(_experts(report)),
        ranking=tuple(_ranking(report)),
        frontier=tuple(_frontier(report)),
    )


def layer_values(texts: Mapping[int, str]) -> list[Value]:
    """A band for each decoder layer that says its number and its text."""
    return [Value(index - 0.5, index + 0.5, f"layer {index}: {text}") for index, text in texts.items()]


def comparison_charts(labels: Sequence[str], runs: Sequence[Report]) -> list[str]:
    """The decoder layers of several runs over one another.

    Args:
        labels: what each is called.
        runs: as many as there are colours, at most.
    """
    found = [run.evaluation.layers if run.evaluation else [] for run in runs]
    own = [{layer.index: layer.own_snr for layer in layers if layer.own_snr is not None} for layers in found]
    all_before = [{layer.index: layer.snr for layer in layers if layer.snr is not None} for layers in found]
    return [
        _overlaid(identity, title, dict(zip(labels, series, strict=True)))
        for identity, title, series in (
            ("own", "Signal to noise of each decoder layer's own", own),
            ("all", "Signal to noise with all layers before it", all_before),
        )
        if any(series)
    ]


def _overlaid(identity: str, title: str, series: Mapping[str, Mapping[int, float]]) -> str:
    def paint(axes: "Axes") -> None:
        for (label, points), color, marker in zip(series.items(), SERIES, _MARKERS, strict=False):
            x, y = [*points], [*points.values()]
            axes.plot(x, y, color=color, marker=marker, markersize=4, label=_short(label))
        axes.set(title=title, xlabel=_LAYER, ylabel="dB, higher is better")
        whole_numbers(axes)
        # Above it there is room for two labels of a phone's width.
        axes.set_title(title, pad=10 + 20 * -(-len(series) // 2))
        axes.legend(ncols=2, loc="lower left", bbox_to_anchor=(0, 1.01))

    description = f"{title}, in dB, of {', '.join(series)}."
    return draw(identity, title, description, paint, _decibels(series), height=3.4, whole=True)


def _decibels(series: Mapping[str, Mapping[int, float]]) -> list[Value]:
    """What each decoder layer has in each of some series."""
    return layer_values(
        {
            index: ", ".join(
                f"{label} {points[index]:.1f} dB" for label, points in series.items() if index in points
            )
            for index in sorted(set().union(*series.values()))
        }
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
        whole_numbers(axes)
        for index, error in _apart(points, max(1, len(points) // 8)):
            axes.annotate(str(index), (index, error), (0, 4), textcoords="offset points", ha="center")

    description = (
        f"Relative error of the output of {len(points)} decoder layers, from {min(errors):.1e} to "
        f"{max(errors):.1e}; the dashed line is the median."
    )
    values = layer_values({index: f"{error:.2e}" for index, error in points})
    return [draw("errors", "Error of each decoder layer", description, paint, values, whole=True)]


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
        "its own": {layer.index: layer.own_snr for layer in layers if layer.own_snr is not None},
        "with all before it": {layer.index: layer.snr for layer in layers if layer.snr is not None},
    }
    if not any(series.values()):
        return []

    def paint(axes: "Axes") -> None:
        for (label, points), color in zip(series.items(), (FIRST, SECOND), strict=True):
            if points:
                axes.plot([*points], [*points.values()], "o-", color=color, markersize=3.5, label=label)
        own = [(index, -snr) for index, snr in series["its own"].items()]
        for index, snr in _apart(own, max(1, len(own) // 8)):
            axes.annotate(str(index), (index, -snr), (0, -14), textcoords="offset points", ha="center")
        axes.set(title="Signal to noise", xlabel=_LAYER, ylabel="dB, higher is better")
        whole_numbers(axes)
        legend_above(axes, 2)

    description = "Signal-to-noise of each decoder layer's output in dB."
    return [draw("noise", "Signal to noise", description, paint, _decibels(series), whole=True)]


def _alphas(identity: str, name: str, found: list[tuple[int, Group]], whole: bool) -> str:
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
        whole_numbers(axes)

    description = f"The smoothing strength alpha chosen for {name} in each of {len(points)} decoder layers."
    values = layer_values({index: f"alpha {alpha:g}" for index, alpha in points})
    return draw(identity, f"Alpha of {name}", description, paint, values, height=1.75, whole=whole)


def _ranges(identity: str, name: str, found: list[tuple[int, Group]], whole: bool) -> str | None:
    series: dict[str, list[tuple[int, float, float]]] = {"before": [], "after": []}
    for index, group in found:
        for label, ranges in (("before", group.before), ("after", group.after)):
            median, largest = (ranges.median or 0, ranges.largest or 0) if ranges else (0, 0)
            if median > 0 and largest > 0:
                series[label].append((index, median, largest))
    drawn = [value for points in series.values() for _, *pair in points for value in pair]
    if not drawn:
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
        logarithmic(axes, drawn)
        whole_numbers(axes)
        legend_above(axes, 2)

    description = (
        f"Greatest magnitudes of the channels that {name} reads, before and after smoothing: the largest "
        "channel is the solid line, the median channel the dotted one."
    )
    texts: dict[int, str] = {}
    for label, points in series.items():
        for index, median, largest in points:
            before = f"{texts[index]}; " if index in texts else ""
            texts[index] = f"{before}{label}: largest {largest:.4g}, median {median:.4g}"
    values = layer_values(texts)
    return draw(identity, f"Activation ranges of {name}", description, paint, values, whole=whole)


def _histogram(identity: str, found: Histogram, whole: bool) -> str:
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
    step = max(1, len(found.levels) // _LEVEL_BANDS)
    values = [
        Value(
            low - 0.5,
            low + step - 0.5,
            f"{f'levels {low} to {low + step - 1}' if step > 1 else f'level {low}'}: "
            f"{shares[place : place + step].sum():.3g} % of weights",
        )
        for place, low in list(enumerate(found.levels))[::step]
    ]
    title = f"Int{found.bits} weights of {found.kind}"
    return draw(identity, title, description, paint, values, height=2.1, whole=whole)


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
        whole_numbers(axes)
        legend_above(axes, 2)

    description = (
        f"Routed experts with fewer than {minimum} calibration tokens in {len(rows)} layers: "
        f"{sum(before)} by the router, {sum(after)} after they were given the tokens nearest to them."
    )
    values = layer_values(
        {
            row.layer: f"{few} experts below {minimum} by the router, {row.few} with the nearest tokens"
            for row, few in zip(rows, before, strict=True)
        }
    )
    return draw("coverage", "Experts below the bar", description, paint, values, height=3.2, whole=True)


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
    values = [
        Value(row.layer - 0.5, row.layer + 0.5, f"layer {row.layer}: {_spread(row)}", across=True)
        for row in rows
    ]
    return draw("experts", "Tokens of each expert", description, paint, values, height=3.2, whole=True)


def _spread(row: ExpertsRow) -> str:
    fewest, median, most = row.spread
    return f"fewest tokens {fewest}, median {median}, most {most}"


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
        whole_numbers(axes)
        legend_above(axes, 4)

    description = (
        f"The fewest, the median and the most calibration tokens of an expert in each of {len(rows)} layers; "
        f"fewer than {minimum} are too few."
    )
    values = layer_values({row.layer: _spread(row) for row in rows})
    return draw("expert-spread", "Tokens by layer", description, paint, values, height=3.2, whole=True)


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
    values = [
        Value(
            place - 0.5,
            place + 0.5,
            f"{row.name}: {row.share:.2%} of the noise"
            + (f", {row.snr:.1f} dB of its own" if row.snr is not None else ""),
            across=True,
        )
        for place, row in enumerate(rows)
    ]
    height = 0.9 + 0.24 * len(rows)
    return [draw("ranking", "What costs most", description, paint, values, height=height, whole=True)]


def _frontier(report: Report) -> list[str]:
    """Size against predicted KL, and where the folder is; a KL of 0 has no place on a logarithmic axis."""
    rows = [row for row in report.frontier.rows if row.kl > 0] if report.frontier else []
    if not rows:
        return []
    measured = [text.kl for text in (report.evaluation.texts if report.evaluation else []) if text.kl]
    sizes, losses = [row.nbytes / 1e6 for row in rows], [row.kl for row in rows]
    here = report.size.tensors / 1e6

    def paint(axes: "Axes") -> None:
        axes.plot(sizes, losses, "o-", color=FIRST, markersize=4, label="predicted")
        if measured:
            axes.plot([here], [max(measured)], "D", color=SECOND, markersize=6, label="this folder, measured")
            legend_above(axes, 2)
        axes.set(title="Size against KL", xlabel="MB", ylabel="KL of the worst text, nats")
        logarithmic(axes, [*losses, *measured])

    edges = [(low + high) / 2 for low, high in pairwise(sizes)]
    values = [
        Value(low, high, f"{row.nbytes / 1e6:.1f} MB: KL {row.kl:.4g}, {row.listed}")
        for row, low, high in zip(rows, [sizes[0], *edges], [*edges, sizes[-1]], strict=True)
    ]
    description = f"Predicted KL of {len(rows)} choices of schemes, from the smallest folder to the largest."
    return [draw("frontier", "Size against KL", description, paint, values, height=3.2, whole=True)]


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_LABEL else f"{name[:_LONGEST_LABEL]}..."
