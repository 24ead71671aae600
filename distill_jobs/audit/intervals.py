"""Estimates with intervals, from a paired bootstrap over held-out units and the spread over training seeds.

Held-out units (rows; documents of a language model) are crossed with seeds: every seed's model is scored on the same
units. With a_s the effect of a seed, b_i of a unit and e_si of both, the mean over S seeds and n units has the variance

    σ²_a/S + σ²_b/n + σ²_e/(S·n)  =  V_seeds + V_units - V_both

V_units is the variance, under resampling of units, of the mean over seeds (it estimates the last two terms); V_seeds
is the variance of the seeds' own values over S (it estimates the first and the last); V_both is that of the seeds'
deviations under resampling, which both of them count. The interval is t_ν · √V around the estimate, with
Satterthwaite's (1946) degrees of freedom

    ν = V² / (V_seeds²/(S-1) + V_units²/(n-1) + V_both²/((S-1)(n-1))),  S-1 at least,

and V is V_units at least. Arms are compared through their difference unit by unit and seed by seed, so that what they
share cancels.

Why no percentiles of a bootstrap over seeds: three seeds drawn with replacement show two thirds of their variance,
and percentiles know nothing of t. In simulation (3 seeds, nominal 95%) such an interval held the truth in 79% to 88%
of repetitions where seeds are what varies most, and this one in 94% to 95%; where they vary little both are above 95%
(98% at most here). With 2 seeds it is 88% at the worst, which is why three are asked for; with 5, 94%.
``tests/unit/audit/test_coverage.py`` prints the figures.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq
from scipy.stats import t as student_t

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A statistic of every seed, on the units as they are and on R resamples of them.

    Estimates made with one ``Resampler`` share its resamples, so that sums and differences of them are paired. A
    statistic without seeds (the teacher's) has S = 1 and is the same beside every seed.

    Attributes:
        point: [S].
        drawn: [R, S].
        units: n, the units that it rests on.
    """

    point: np.ndarray
    drawn: np.ndarray
    units: int

    @property
    def value(self) -> float:
        """The mean over seeds."""
        return float(self.point.mean())

    def __sub__(self, other: "Estimate") -> "Estimate":
        return self._with(other, np.subtract)

    def __add__(self, other: "Estimate") -> "Estimate":
        return self._with(other, np.add)

    def __truediv__(self, other: "Estimate") -> "Estimate":
        with np.errstate(divide="ignore", invalid="ignore"):
            return self._with(other, np.divide)

    def __mul__(self, factor: float) -> "Estimate":
        return Estimate(self.point * factor, self.drawn * factor, self.units)

    def _with(self, other: "Estimate", work: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> "Estimate":
        return Estimate(work(self.point, other.point), work(self.drawn, other.drawn), min(self.units, other.units))

    def spread(self) -> tuple[float, float]:
        """The standard error of ``value`` and its degrees of freedom; NaN where there is too little to say."""
        seeds, n, drawn = len(self.point), self.units, with_some(self.drawn)
        if n < 2 or not len(drawn) or not np.isfinite(self.point).all():
            return math.nan, math.nan
        mean = drawn.mean(axis=1)
        # Resampling n units shows (n-1)/n of their variance.
        of_units = float(mean.var(ddof=1)) * n / (n - 1)
        if seeds == 1:
            return math.sqrt(of_units), float(n - 1)
        of_seeds = float(self.point.var(ddof=1)) / seeds
        deviations = (drawn - mean[:, None]).var(axis=0, ddof=1).sum() * n / (n - 1)
        of_both = float(deviations) / (seeds - 1) / seeds
        whole = max(of_seeds + of_units - of_both, of_units)
        if whole == 0:
            return 0.0, float(n - 1)
        terms = of_seeds**2 / (seeds - 1) + of_units**2 / (n - 1) + of_both**2 / ((seeds - 1) * (n - 1))
        return math.sqrt(whole), max(whole**2 / terms, seeds - 1.0)

    def interval(self, level: float = LEVEL) -> tuple[float, float]:
        """The ends of the interval; NaN where there is none."""
        error, freedom = self.spread()
        half = error * float(student_t.ppf(0.5 + level / 2, freedom)) if error else error
        return self.value - half, self.value + half

    def p_value(self) -> float:
        """Two-sided, of the hypothesis that the truth is 0; by the same t as the interval. 1 where nothing varies."""
        error, freedom = self.spread()
        if not error > 0:
            return 1.0
        return float(2 * student_t.sf(abs(self.value) / error, freedom))

    def as_dict(
        self, shape: Callable[[float], float] = float, least: float = -math.inf, most: float = math.inf
    ) -> dict[str, Any]:
        """``value``, ``low``, ``high`` and ``level``; the bounds are null, with ``why``, where there are none.

        Args:
            shape: a rising function for all three (``exp`` makes a perplexity of a mean log-likelihood).
            least, most: what the statistic can be; bounds are cut there. Where a rate is 0 or 1 in all units, so that
                nothing varies, they are those of Clopper and Pearson (1934).
        """
        low, high = self.interval()
        if low == high and (least, most) == (0.0, 1.0) and self.value in (0.0, 1.0):
            end = ((1 - LEVEL) / 2) ** (1 / self.units)
            low, high = (0.0, 1.0 - end) if self.value == 0 else (end, 1.0)
        if not math.isfinite(self.value):
            return nothing("there is nothing to count here")
        if not math.isfinite(low):
            return {**nothing("too few units to say how far it may be off"), "value": shape(self.value)}
        ends = (shape(min(max(end, least), most)) for end in (self.value, low, high))
        return {**dict(zip(("value", "low", "high"), ends, strict=True)), "level": LEVEL}


def with_some(drawn: np.ndarray) -> np.ndarray:
    """The resamples [R, …] that hold anything to count; none where more than 1 in 100 does not."""
    finite = np.isfinite(drawn).all(axis=tuple(range(1, drawn.ndim)))
    return drawn[finite] if finite.sum() >= _MOST_FILLED * len(drawn) else drawn[:0]


def nothing(why: str) -> dict[str, Any]:
    """An estimate that can't be had."""
    return {"value": None, "low": None, "high": None, "level": LEVEL, "why": why}


_FAR, _MOST_FILLED = 1e6, 0.99
Statistic = Callable[[np.ndarray], np.ndarray]
"""A number ≥ 0 from K parts: [..., K, S] to [..., S]."""


def folded(statistic: Statistic, point: np.ndarray, drawn: np.ndarray, units: int) -> dict[str, Any]:
    """The estimate of a statistic that cannot be negative, and that noise in its parts therefore makes larger.

    (A calibration error, a sum of distances; the largest difference between groups.) ``value`` is as measured.
    ``debiased`` is that less what resampling adds to it (Efron & Tibshirani 1993, ch. 10). That takes off too little
    where the parts are all noise, so the interval begins a half width below what remains when noise is added to parts
    that were shrunk first, from x to sign(x)·√(x² - variance)₊; it ends a half width above ``value``, and is cut at 0.
    The half width is that of the statistic itself, or of the sum or difference that it is as measured, whichever is
    wider: at a fold resamples spread too little, and where two parts are nearly the largest the one chosen may.

    Args:
        point: the parts, [K, S], around a common mean of 0 where only their differences matter.
        drawn: the parts of every resample, [R, K, S].
    """
    drawn = with_some(drawn)
    noise, value = drawn - point, statistic(point)
    # So far apart that no resample changes a sign or which is largest.
    each = (Estimate(value, statistic(scale * point + noise), units) for scale in (1.0, _FAR))
    found = max(each, key=lambda one: one.interval()[1])
    told = found.as_dict(least=0.0)
    if told["low"] is None:
        return told
    signal = np.sign(point) * np.sqrt(np.maximum(0.0, point**2 - drawn.var(axis=0)))
    least, likely = (
        max(0.0, float((value - statistic(parts + noise).mean(axis=0) + statistic(parts)).mean()))
        for parts in (signal, point)
    )
    half = found.interval()[1] - found.value
    return {**told, "debiased": likely, "low": max(0.0, min(least, likely) - half)}


def widest(told: list[dict[str, Any]]) -> dict[str, Any]:
    """The estimate of the largest of several statistics: each of its numbers the largest of theirs."""
    if any(one["low"] is None for one in told):
        return max(told, key=lambda one: one["value"] or 0.0)
    return {name: max(one[name] for one in told) for name in told[0]}


def ratio(above: Estimate, below: Estimate, undefined: str) -> dict[str, Any]:
    """The ratio of two paired means, with Fieller's (1954) interval: every ρ that a test of above - ρ·below = 0 passes.

    It behaves where the denominator is small, as a bootstrap of the ratio does not: where the denominator itself is not
    distinguishable from 0, no ratio is told at all.

    Args:
        undefined: why there is none then.
    """
    low, high = below.interval()
    if not math.isfinite(low) or low <= 0 <= high or below.value == 0:
        return nothing(undefined)
    value = above.value / below.value
    if not math.isfinite(value):
        return nothing("there is nothing to count here")

    def outside(rho: float) -> float:
        """Above 0 where the test refuses ρ."""
        rest = above - below * rho
        error, freedom = rest.spread()
        return abs(rest.value) - error * float(student_t.ppf(0.5 + LEVEL / 2, freedom))

    ends = [_end(outside, value, direction) for direction in (-1.0, 1.0)]
    if None in ends:
        return {**nothing("too little to say how far it may be off, on one side at least"), "value": value}
    return {"value": value, "low": ends[0], "high": ends[1], "level": LEVEL}


def _end(outside: Callable[[float], float], value: float, direction: float) -> float | None:
    step = max(1e-9, 1e-6 * abs(value))
    inner = value
    if outside(value) >= 0:  # Nothing varies: the interval is the value itself.
        return value
    while step < 1e6 * max(1.0, abs(value)):
        outer = value + direction * step
        if outside(outer) > 0:
            return float(brentq(outside, inner, outer, xtol=1e-10, rtol=1e-9))
        inner, step = outer, 3 * step
    return None
