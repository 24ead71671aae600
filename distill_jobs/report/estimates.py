"""Estimates as people read them: a number with its interval below it, and a plot's series of them.

An estimate is ``{"value", "low", "high", "level"}``; a null value or bound bears its reason in ``why``.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from distill_jobs import words
from distill_jobs.report.plot import Series
from distill_jobs.report.svg import MARKER, OTHER, ROLE

Estimate = dict[str, Any]
Say = Callable[[float], str]

ARMS = ("teacher", "student", "baseline")


def told(estimate: Estimate | None, say: Say) -> str:
    """The value, and its interval on a line of its own; a dash where there is none."""
    if estimate is None or estimate.get("value") is None:
        return "–"
    if estimate.get("low") is None or estimate.get("high") is None:
        return say(estimate["value"])
    return f"{say(estimate['value'])}\n{say(estimate['low'])} to {say(estimate['high'])}"


def flat(estimate: Estimate, say: Say, unit: str = "") -> str:
    """The same in a sentence: ``0.31 nats (95 % interval 0.12 to 0.50)``."""
    if estimate.get("value") is None:
        return f"not known ({estimate.get('why', 'nothing to go by')})"
    value = f"{say(estimate['value'])}{unit and ' '}{unit}"
    if estimate.get("low") is None or estimate.get("high") is None:
        return f"{value} (no interval)"
    level = words.percent(estimate.get("level", 0.95), 0)
    return f"{value} ({level} interval {say(estimate['low'])} to {say(estimate['high'])})"


def less_noise(estimate: Estimate) -> Estimate:
    """Of a measure that noise makes larger: the value without what noise adds, which its interval lies around."""
    return {**estimate, "value": estimate.get("debiased", estimate["value"])}


def reasons(estimates: Iterable[Estimate]) -> list[str]:
    """Why some of them have no value or no interval, each reason once."""
    return list(dict.fromkeys(str(each["why"]) for each in estimates if each.get("why")))


def series(
    role: str,
    estimates: Sequence[tuple[int, Estimate, str]],
    scale: float = 1.0,
    faint: bool = False,
    named: bool = True,
) -> Series:
    """Estimates of one arm beside names: each with its place among them, and what it says when pointed at."""
    there = [(place, each, text) for place, each, text in estimates if each.get("value") is not None]

    def ends(end: str) -> list[float | None]:
        return [None if each.get(end) is None else scale * each[end] for _, each, _ in there]

    return Series(
        role if named else "",
        ROLE.get(role, OTHER),
        [scale * each["value"] for _, each, _ in there],
        [place for place, _, _ in there],
        low=ends("low"),
        high=ends("high"),
        told=[text for _, _, text in there],
        marker=MARKER.get(role, "^"),  # type: ignore[arg-type]
        faint=faint,
    )


def share(value: float) -> str:
    """A rate."""
    return words.percent(value, 2)


def pp(value: float) -> str:
    """A difference of rates, in percentage points."""
    return words.difference("accuracy", value)


def number(value: float) -> str:
    """Nats, ratios and the like."""
    return f"{value:.3f}".replace("-", "−")


def signed(value: float) -> str:
    """Differences of such."""
    return f"{value:+.4f}".replace("-", "−")


def unsigned(value: float) -> str:
    """A difference of rates that can't be negative, in percentage points."""
    return words.difference("accuracy", value, signed=False)
