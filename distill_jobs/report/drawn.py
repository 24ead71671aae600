"""A ``Plot`` as SVG: stands still, prints, and takes the colours of the page's theme."""

import math
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from distill_jobs import words
from distill_jobs.report.plot import Axis, Plot, Series, Surface
from distill_jobs.report.svg import GRID, INK, STUDENT, canvas, styled, to_svg

_LABEL = 30
_LEGEND_LETTERS = 54  # that stand in a row of the legend
_SHADES = 7
_DECADES = 3
_DASH = {"solid": "-", "dash": (0, (4, 3)), "dot": (0, (1, 2))}
_SAY = {"number": words.plain, "percent": words.share, "money": words.dollars}


def draw(plot: Plot) -> Markup:
    """The plot as an ``<svg>`` element."""
    with styled():
        figure, axes = canvas(plot.height)
        if plot.surface is not None:
            _shade(axes, plot.surface)
        for mark in plot.marks:
            _mark(axes, mark.across, mark.at, mark.word)
        for series in plot.series:
            _series(axes, series, plot)
        if plot.diagonal:
            axes.plot([0, 1], [0, 1], color=GRID, linewidth=1, zorder=0)
        _axis(axes.xaxis, plot.x, ticks(plot, "x"))
        _axis(axes.yaxis, plot.y, ticks(plot, "y"))
        if plot.y.names is not None:
            axes.set_ylim(len(plot.y.names) - 0.4, -0.6)
            axes.grid(axis="y", visible=False)
        named = [len(series.name) for series in plot.series if series.name]
        if len(named) > 1:
            columns = max(1, min(len(named), 3, _LEGEND_LETTERS // max(named)))
            figure.legend(frameon=False, fontsize=8, ncols=columns, loc="outside lower center", handlelength=1.6)
        return to_svg(figure, plot.name, plot.title, plot.said)


def spread(plot: Plot) -> str:
    """Along which axis the intervals of a plot lie."""
    return "x" if plot.y.names is not None else "y"


def offsets(plot: Plot) -> dict[int, float]:
    """How far each series of points or bars stands off its category, so that they don't cover each other."""
    many = [i for i, series in enumerate(plot.series) if series.kind != "line"]
    if plot.stacked or (plot.y.names is None and plot.x.names is None) or len(many) < 2:
        return {}
    step = 0.62 / len(many)
    return {series: (place - (len(many) - 1) / 2) * step for place, series in enumerate(many)}


def before(plot: Plot, series: Series) -> list[float]:
    """Where each bar of a series begins: at 0, or where those before it end in their category."""
    if not plot.stacked:
        return [0.0] * len(series.x)
    earlier = plot.series[: plot.series.index(series)]
    return [sum(x for each in earlier for x, y in zip(each.x, each.y, strict=True) if y == at) for at in series.y]


def ticks(plot: Plot, which: str) -> list[float]:
    """Where a logarithmic axis is marked: at 1, 2 and 5 times powers of ten, or at these alone over many of them."""
    axis = plot.x if which == "x" else plot.y
    values = [value for series in plot.series for value in (series.x if which == "x" else series.y) if value > 0]
    if not axis.log or not values:
        return []
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1, 2, 5) if high - low <= _DECADES else (1,)
    marked = [step * 10.0**power for power in range(low, high + 1) for step in steps]
    return [at for at in marked if min(values) / 2 <= at <= max(values) * 2]


def short(text: str, most: int = _LABEL) -> str:
    """``text`` on one line that fits beside an axis."""
    clean = " ".join(text.split())
    return clean if len(clean) <= most else clean[: most - 1] + "…"


def say(axis: Axis, value: float) -> str:
    """A number of an axis, as its ticks say it."""
    return _SAY[axis.kind](value)


def _series(axes: Any, series: Series, plot: Plot) -> None:
    off = offsets(plot).get(plot.series.index(series), 0.0)
    upright = plot.y.names is not None
    x = np.asarray(series.x, dtype=float) + (0.0 if upright else off)
    y = np.asarray(series.y, dtype=float) + (off if upright else 0.0)
    alpha = 0.35 if series.faint else 0.9
    if series.kind == "line":
        axes.plot(x, y, color=series.colour, linestyle=_DASH[series.dash], alpha=alpha, label=series.name or None)
        return
    if series.kind == "bars":
        size = 0.62 / max(1, len(offsets(plot)))
        if upright:
            axes.barh(y, x, size, before(plot, series), color=series.colour, alpha=alpha, label=series.name or None)
        else:
            axes.bar(x, y, width=size, color=series.colour, alpha=alpha, label=series.name or None)
    else:
        axes.plot(
            x, y, series.marker, color=series.colour, markersize=5.5, alpha=alpha, label=series.name or None, zorder=3
        )
    _intervals(axes, series, x, y, spread(plot))
    for px, py, label in zip(x, y, series.labels, strict=False):
        axes.annotate(
            short(label), (px, py), (6, 0 if upright else 4), textcoords="offset points", va="center", fontsize=8
        )


def _intervals(axes: Any, series: Series, x: Any, y: Any, along: str) -> None:
    for place, (low, high) in enumerate(zip(series.low or (), series.high or (), strict=True)):
        if low is None or high is None:
            continue
        ends = ([low, high], [y[place]] * 2) if along == "x" else ([x[place]] * 2, [low, high])
        axes.plot(*ends, color=series.colour, linewidth=2.2, alpha=0.3 if series.faint else 0.55, zorder=2)


def _axis(axis: Any, given: Axis, marked: list[float]) -> None:
    axis.set_label_text(given.title)
    if given.names is not None:
        axis.set_major_locator(FixedLocator(list(range(len(given.names)))))
        axis.set_ticklabels([short(name) for name in given.names], color=INK)
        return
    if given.log:
        axis._set_axes_scale("log")
        axis.set_major_locator(FixedLocator(marked))
        axis.set_minor_locator(NullLocator())
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: say(given, value)))


def _mark(axes: Any, across: str, at: float, word: str) -> None:
    line = axes.axvline if across == "x" else axes.axhline
    line(at, color=INK, linewidth=0.9, linestyle=(0, (4, 3)), alpha=0.7)
    if word:
        place = ((at, 1.0), (4, -2)) if across == "x" else ((0.0, at), (4, 4))
        frame = axes.get_xaxis_transform() if across == "x" else axes.get_yaxis_transform()
        axes.annotate(
            short(word), place[0], place[1], xycoords=frame, textcoords="offset points", fontsize=8,
            va="top" if across == "x" else "bottom",
        )  # fmt: skip


def _shade(axes: Any, surface: Surface) -> None:
    z = np.asarray(surface.z, dtype=float)
    if not surface.higher_is_better:
        z = -z
    edges = np.linspace(np.nanmin(z), np.nanmax(z), _SHADES + 1)
    if edges[0] == edges[-1]:
        return
    # Shades of one colour over whatever the page's ground is: they read in the light and in the dark.
    for shade in range(1, _SHADES):
        levels = [edges[shade], edges[-1] + 1.0]
        axes.contourf(surface.x, surface.y, z, levels=levels, colors=[STUDENT], alpha=0.12)
