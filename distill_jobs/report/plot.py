"""A plot in plain values. ``drawn`` makes it SVG that prints, ``live`` a figure to explore; both show the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Bound = float | None


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
        title: what it shows, with its unit.
        kind: how its numbers are written: ``number``, ``percent`` (of shares) or ``money`` (US dollars).
        log: logarithmic.
        names: categories in place of numbers, at 0, 1, ...; down an upright axis the first is on top.
    """

    title: str = ""
    kind: Literal["number", "percent", "money"] = "number"
    log: bool = False
    names: Sequence[str] | None = None


@dataclass(frozen=True)
class Series:
    """Points, a line or bars of one colour.

    Attributes:
        colour: one of the colours of ``svg.py``.
        low, high: interval of each point along the axis that has no names (``y`` where neither has).
        told: what each point says when it is pointed at.
        faint: drawn weakly, for what is judged on too little.
    """

    name: str
    colour: str
    x: Sequence[float]
    y: Sequence[float]
    kind: Literal["points", "line", "bars"] = "points"
    low: Sequence[Bound] | None = None
    high: Sequence[Bound] | None = None
    told: Sequence[str] = ()
    marker: Literal["o", "s", "D", "^", "v", "*"] = "o"
    dash: Literal["solid", "dash", "dot"] = "solid"
    faint: bool = False
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class Surface:
    """Heights over a grid: ``z[i][j]`` at ``x[j]``, ``y[i]``; the more colour the better."""

    x: Sequence[float]
    y: Sequence[float]
    z: Sequence[Sequence[float]]
    title: str
    higher_is_better: bool
    kind: Literal["number", "percent", "money"] = "number"


@dataclass(frozen=True)
class Mark:
    """A line across the plot at ``at`` of the axis ``across``, with a word."""

    across: Literal["x", "y"]
    at: float
    word: str = ""


@dataclass(frozen=True)
class Plot:
    """The whole. ``name`` is unique on its page; ``said`` is for who can't see it; ``diagonal`` draws y = x;
    ``stacked`` bars follow each other; ``wide``: live, there is room for long names; ``height`` is in inches."""

    name: str
    title: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    said: str
    height: float = 2.8
    wide: bool = False
    stacked: bool = False
    surface: Surface | None = None
    marks: Sequence[Mark] = ()
    diagonal: bool = False
