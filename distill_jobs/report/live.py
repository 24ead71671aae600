"""A ``Plot`` to explore: a plotly figure as JSON, and what a page needs to draw it without asking anybody.

Plotly's own script travels in the page once, compressed; the browser unpacks it when a figure comes into view. The
page's policy lets these scripts run and no other, and lets nothing be fetched.
"""

import base64
import functools
import gzip
import hashlib
import json
import math
from dataclasses import dataclass
from importlib import resources
from typing import Any

from markupsafe import Markup

from distill_jobs.report.blocks import Chart
from distill_jobs.report.drawn import draw, offsets, say, short, spread, ticks
from distill_jobs.report.plot import Axis, Mark, Plot, Series
from distill_jobs.report.svg import GRID, INK, STUDENT, THEME

_NARROW, _WIDE = 30, 60  # letters of a name beside an axis
_MARKER = {"o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "*": "star"}
_COLOUR = {**THEME, INK: "var(--ink)"}  # plotly knows no currentColor
_PIXELS = 96  # CSS pixels in an inch
_LEGEND = 60  # pixels below the plot, under the axis' title


@dataclass(frozen=True)
class Scripts:
    """What the page carries: plotly compressed, the script that draws, and the policy that lets only them run."""

    plotly: str
    own: Markup
    policy: str


def chart(plot: Plot, title: str = "", caption: str = "") -> Chart:
    """The plot as a block: still and live."""
    return Chart(draw(plot), title or plot.title, caption, live=Markup(embedded(figure(plot))))


@functools.cache
def scripts() -> Scripts:
    """The scripts of a page with live figures."""
    from plotly.offline import get_plotlyjs

    plotly = get_plotlyjs()
    own = resources.files(__package__).joinpath("templates/live.js").read_text(encoding="utf-8")
    packed = base64.b64encode(gzip.compress(plotly.encode(), 9, mtime=0)).decode()
    return Scripts(packed, Markup(own), policy(own, plotly))


def policy(*allowed: str) -> str:
    """The content security policy of a page on which only the ``allowed`` inline scripts run."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in allowed]
    ours = " ".join(f"'sha256-{each}'" for each in hashes) or "'none'"
    return (
        f"default-src 'none'; script-src {ours}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def embedded(values: Any) -> str:
    """JSON that nothing in it can break out of its ``<script>`` element."""
    text = json.dumps(values, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def figure(plot: Plot) -> dict[str, Any]:
    """The plotly figure; its colours are the style sheet's names, which the page's script looks up."""
    shifts = offsets(plot)
    traces = [_surface(plot)] if plot.surface is not None else []
    traces += [_trace(plot, series, shifts.get(i, 0.0)) for i, series in enumerate(plot.series)]
    lines = [_line(mark.across, mark.at) for mark in plot.marks]
    if plot.diagonal:
        corner = {"type": "line", "x0": 0, "y0": 0, "x1": 1, "y1": 1, "layer": "below"}
        lines.append({**corner, "line": {"color": _COLOUR[GRID], "width": 1}})
    named = sum(bool(series.name) for series in plot.series) > 1
    height = round(plot.height * _PIXELS) + (70 if named else 40)
    layout = {
        "height": height,
        "margin": {"l": 8, "r": 16, "t": 30, "b": 8},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "var(--grid)", "activecolor": "var(--faint)"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": _COLOUR[INK]},
        "xaxis": _axis(plot, "x"),
        "yaxis": _axis(plot, "y"),
        "showlegend": named,
        "legend": {
            "orientation": "h",
            "x": 0,
            "y": -_LEGEND / height,
            "yanchor": "top",
            "itemsizing": "constant",
            "traceorder": "normal",
        },
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "var(--card)", "bordercolor": "var(--grid)", "align": "left"},
        "shapes": lines,
        "annotations": [_word(plot, mark) for mark in plot.marks if mark.word],
        "barmode": "stack" if plot.stacked else "overlay",
    }
    return {"data": traces, "layout": layout}


def _trace(plot: Plot, series: Series, shift: float) -> dict[str, Any]:
    upright = plot.y.names is not None
    colour = _COLOUR[series.colour]
    trace: dict[str, Any] = {
        "type": "scatter",
        "name": _text(series.name),
        "x": [float(v) + (0.0 if upright else shift) for v in series.x],
        "y": [float(v) + (shift if upright else 0.0) for v in series.y],
        "opacity": 0.4 if series.faint else 1,
        "showlegend": bool(series.name),
    }
    if series.told:
        trace |= {"hovertext": [_text(told) for told in series.told], "hovertemplate": "%{hovertext}<extra></extra>"}
    else:
        trace["hovertemplate"] = f"%{{x}}, %{{y}}<extra>{_text(series.name)}</extra>"
    if series.kind == "line":
        return {**trace, "mode": "lines", "line": {"color": colour, "dash": series.dash, "width": 2}}
    if series.low is not None and series.high is not None:
        trace[f"error_{spread(plot)}"] = _error(series, colour, spread(plot))
    if series.kind == "bars":
        size = 0.62 / max(1, len(offsets(plot)))
        return {
            **trace,
            "type": "bar",
            "orientation": "h" if upright else "v",
            "width": size,
            "marker": {"color": colour},
        }
    dots = {"color": colour, "size": 9, "symbol": _MARKER[series.marker]}
    if not series.labels:
        return {**trace, "mode": "markers", "marker": dots}
    text = {"text": [_text(short(label)) for label in series.labels], "textposition": _sides(plot, series)}
    return {**trace, "mode": "markers+text", "marker": dots, **text, "texttemplate": "%{text}", "cliponaxis": False}


def _sides(plot: Plot, series: Series) -> list[str]:
    """Beside each point the side with room for its word."""
    scale = math.log if plot.x.log else float
    values = [scale(x) for each in plot.series for x in each.x]
    middle = (min(values) + max(values)) / 2
    return ["top left" if scale(x) > middle else "top right" for x in series.x]


def _error(series: Series, colour: str, along: str) -> dict[str, Any]:
    points = series.x if along == "x" else series.y
    assert series.low is not None and series.high is not None
    bounds = list(zip(points, series.low, series.high, strict=True))
    plus = [0.0 if low is None or high is None else max(0.0, high - value) for value, low, high in bounds]
    minus = [0.0 if low is None or high is None else max(0.0, value - low) for value, low, high in bounds]
    line = {"color": colour, "thickness": 2.5, "width": 0}
    return {"type": "data", "symmetric": False, "array": plus, "arrayminus": minus, **line}


def _surface(plot: Plot) -> dict[str, Any]:
    assert plot.surface is not None
    surface = plot.surface
    weak, strong = "var(--card)", _COLOUR[STUDENT]
    ends = [[0, weak], [1, strong]] if surface.higher_is_better else [[0, strong], [1, weak]]
    axis = Axis(surface.title, surface.kind)
    names = f"{plot.x.title}, {plot.y.title}"
    told = [
        [_text(f"{names} {x:.3g}, {y:.3g}: {say(axis, z)}") for x, z in zip(surface.x, row, strict=True)]
        for y, row in zip(surface.y, surface.z, strict=True)
    ]
    return {
        "type": "heatmap",
        "x": list(surface.x),
        "y": list(surface.y),
        "z": [list(row) for row in surface.z],
        "zsmooth": "best",
        "colorscale": ends,
        "opacity": 0.85,
        "hovertext": told,
        "hovertemplate": "%{hovertext}<extra></extra>",
        "colorbar": {"title": {"text": _text(surface.title), "side": "right"}, "thickness": 12, "outlinewidth": 0},
        "showlegend": False,
    }


def _axis(plot: Plot, which: str) -> dict[str, Any]:
    given, upright = (plot.x, False) if which == "x" else (plot.y, True)
    axis: dict[str, Any] = {
        "title": {"text": _text(given.title), "standoff": 8},
        "automargin": True,
        "gridcolor": _COLOUR[GRID],
        "zerolinecolor": _COLOUR[GRID],
        "linecolor": _COLOUR[GRID],
        "tickfont": {"color": "var(--faint)"},
    }
    if given.names is not None:
        names = [_text(short(name, _WIDE if plot.wide else _NARROW)) for name in given.names]
        ends = [len(names) - 0.4, -0.6] if upright else [-0.6, len(names) - 0.4]
        return {**axis, "tickvals": list(range(len(names))), "ticktext": names, "range": ends, "showgrid": False}
    if given.log:
        marked = ticks(plot, which)
        axis |= {"type": "log", "tickvals": marked, "ticktext": [say(given, at) for at in marked]}
    if given.kind == "percent":
        axis["tickformat"] = ".4~%"
    elif given.kind == "money":
        axis |= {"tickprefix": "" if given.log else "$", "tickformat": ",.3~r"}
    return axis


def _line(across: str, at: float) -> dict[str, Any]:
    other = "y" if across == "x" else "x"
    place = {f"{across}0": at, f"{across}1": at, f"{other}0": 0, f"{other}1": 1, f"{other}ref": "paper"}
    return {"type": "line", **place, "line": {"color": _COLOUR[INK], "width": 1, "dash": "dash"}, "opacity": 0.7}


def _word(plot: Plot, mark: Mark) -> dict[str, Any]:
    axis = plot.x if mark.across == "x" else plot.y
    at = math.log10(mark.at) if axis.log else mark.at  # of annotations plotly wants the logarithm, of lines not
    place: dict[str, Any] = {"x": at, "y": 1, "yref": "paper", "xanchor": "left", "yanchor": "top"}
    if mark.across == "y":
        place = {"x": 0, "y": at, "xref": "paper", "xanchor": "left", "yanchor": "bottom"}
    return {**place, "text": _text(mark.word), "showarrow": False, "font": {"size": 11}}


def _text(text: str) -> str:
    """Text for plotly, which reads a few tags and entities in it."""
    clean = " ".join(text.split())
    return clean.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
