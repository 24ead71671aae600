"""Measures by group for teacher, baseline and student side by side, the gaps between groups, and what they come from.

Classification with a positive class (two classes: the last, or ``audit.positive``; more classes: ``audit.positive``
against all others): accuracy, true and false positive rate, selection rate, and fairlearn's demographic parity and
equalised odds differences. Classification without one: accuracy. Language models: negative log-likelihood and
perplexity. The values of classifiers are fairlearn's (Bird et al. 2020), and their intervals those of ``intervals``.

A group is small, flagged and not judged, where it or the rest of its column has fewer than ``audit.min_slice_rows``
rows (for rates: rows with the class that they are about; language models: documents), or a rate counts fewer than 5
rows of either outcome in any arm, since no normal approximation holds there.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from distill_jobs.audit.fairness import RATES, by_group
from distill_jobs.audit.intervals import Estimate, folded, widest
from distill_jobs.audit.labels import FALSE_ALARMS, LABELS, TESTS, holm, label_of
from distill_jobs.audit.measures import Measures
from distill_jobs.spec.audit import Audit

_EACH_OUTCOME = 5
DIFFERENCES = {
    "accuracy_difference": ("accuracy",),
    "demographic_parity_difference": ("selection_rate",),
    "equalized_odds_difference": ("true_positive_rate", "false_positive_rate"),
    "nll_difference": ("nll",),
}
"""The largest difference between two judged groups of a column, and the measures that it is the largest of."""


class Bias:
    """The gaps between the groups of every slice column and intersection."""

    def __init__(self, measures: Measures, spec: Audit) -> None:
        self.measures, self.spec = measures, spec
        self.language = measures.scores.language
        rates = RATES if measures.positive is not None else RATES[:1]
        self.metrics = ("nll",) if self.language else rates
        self.arms = tuple(measures.scores.arms)
        self._flag, self._rates = cache(self._flag_of), cache(self._rates_of)

    def as_dict(self, positive: str | None) -> dict[str, Any]:
        """The part ``bias`` of ``audit.json``; ``positive`` is the name of the positive class."""
        gaps = self.gaps()
        judged = [gap for gap in gaps if gap["judged"]]
        columns = {}
        for column in self.measures.columns:
            own = [gap for gap in gaps if gap["column"] == column]
            columns[column] = {
                "groups": self._groups(column),
                "gaps": [_public(gap) for gap in own],
                "differences": self._differences(column, own),
            }
        return {
            "positive": positive,
            "metrics": list(self.metrics),
            "min_slice_rows": self.spec.min_slice_rows,
            "correction": {"method": "Holm", "tests": len(TESTS) * len(judged), "false_alarms": FALSE_ALARMS},
            "labels": {label: sum(gap["label"] == label for gap in judged) for label in LABELS},
            "columns": columns,
            "limit": self._limit(columns),
        }

    def gaps(self) -> list[dict[str, Any]]:
        """The gaps of all columns, with estimates as ``sizes``; those that can be judged are tested as one family."""
        gaps = [gap for column in self.measures.columns for gap in self._gaps(column)]
        judged = [gap for gap in gaps if gap["judged"]]
        if judged:
            raw = np.array([[gap["sizes"][test].p_value() for test in TESTS] for gap in judged])
            adjusted = holm(raw.ravel()).reshape(raw.shape)
            for gap, own in zip(judged, adjusted.tolist(), strict=True):
                gap["p"] = dict(zip(TESTS, own, strict=True))
                shown = {test: p <= FALSE_ALARMS for test, p in gap["p"].items()}
                gap["label"] = label_of({test: gap["sizes"][test].value for test in TESTS}, shown)
        return gaps

    def _groups(self, column: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        most = np.inf if self.language else 1.0
        for value, rows in self.measures.rows_by(column).items():
            arms = {}
            for role in self.arms:
                told = {
                    what: self._of(role, what, column, value).as_dict(least=0.0, most=most) for what in self.metrics
                }
                if self.language:
                    told["perplexity"] = self._of(role, "nll", column, value).as_dict(_perplexity, least=0.0)
                arms[role] = told
            small = bool(self._flag(self.metrics[0], column, value))
            found[value] = {"rows": rows, "units": self.measures.units_of(column, value), "small": small, "arms": arms}
        return found

    def _of(self, role: str, what: str, column: str, value: str) -> Estimate:
        found = self.measures.of(role, what, column, value)
        if self.language or not np.isfinite(found.point).all():
            return found
        return replace(found, point=self._rates(role, column)[what][value])

    def _rates_of(self, role: str, column: str) -> dict[str, dict[str, np.ndarray]]:
        """By measure and group the values of every seed, [S]."""
        scores, by = self.measures.scores, self.measures.columns[column]
        columns, models = scores.columns, scores.arms[role]
        each = [by_group(columns["label"], columns[f"{name}.predicted"], by, self.measures.positive) for name in models]
        return {what: {v: np.array([one[what][v] for one in each]) for v in each[0][what]} for what in self.metrics}

    def _gaps(self, column: str) -> list[dict[str, Any]]:
        values = self.measures.values(column)
        if len(values) < 2:
            return []
        found = []
        # Of two groups either is the rest of the other: one gap says it.
        for value in values[:1] if len(values) == 2 else values:
            for what in self.metrics:
                flag = self._flag(what, column, value)
                sizes = {
                    role: self.measures.of(role, what, column, value) - self.measures.rest(role, what, column, value)
                    for role in self.arms
                }
                sizes["change"] = sizes["student"] - sizes["baseline"]
                gap = {"column": column, "group": value, "metric": what, "judged": not flag, "sizes": sizes}
                found.append({**gap, "flag": flag, "p": None, "label": None})
        return found

    def _flag_of(self, what: str, column: str, value: str) -> str | None:
        """Why a group is not judged by a measure; None where it is."""
        inside = self.measures.columns[column] == value
        for chosen, whose in ((inside, "it has"), (~inside, "the rest of its column has")):
            counted = self._counted(what, chosen)
            if counted < self.spec.min_slice_rows:
                unit = "documents" if self.language else "rows"
                least = f"audit.min_slice_rows {self.spec.min_slice_rows:,}"
                return f"{whose} {counted:,} {unit} to judge by, fewer than {least}"
            if self.language:
                continue
            for role in self.arms:
                below, above = self.measures.outcomes(role, what, chosen)
                if min(above, below - above) < _EACH_OUTCOME:
                    return f"{whose} fewer than {_EACH_OUTCOME} rows of one outcome"
        return None

    def _counted(self, what: str, chosen: np.ndarray) -> int:
        units = self.measures.scores.units
        if units is not None:
            return len(np.unique(units[chosen].astype(str)))
        return int(self.measures.outcomes("teacher", what, chosen)[0])

    def _differences(self, column: str, gaps: list[dict[str, Any]]) -> dict[str, Any]:
        """By difference: every arm's value, and the label of the widest of the student's gaps that it is made of."""
        found = {}
        for name, parts in DIFFERENCES.items():
            if not set(parts) <= set(self.metrics):
                continue
            groups = [v for v in self.measures.values(column) if not any(self._flag(what, column, v) for what in parts)]
            if len(groups) < 2:
                continue
            arms = {role: self._difference(role, parts, column, groups) for role in self.arms}
            # Of two groups the first stands for both.
            own = [gap for gap in gaps if gap["metric"] in parts and gap["group"] in groups]
            gap = max(own, key=lambda gap: abs(gap["sizes"]["student"].value))
            found[name] = {**arms, "groups": groups, "label": gap["label"], "widest": gap["group"]}
        return found

    def _difference(self, role: str, parts: tuple[str, ...], column: str, groups: list[str]) -> dict[str, Any]:
        """The largest difference between groups, of the measure of ``parts`` of which it is largest."""
        told, spans = [], []
        for what in parts:
            # Of fairlearn's values by group: so these are its differences, over the groups that are judged.
            each = [self._of(role, what, column, value) for value in groups]
            point, drawn = np.stack([e.point for e in each]), np.stack([e.drawn for e in each], axis=1)
            mean = point.mean(axis=0)
            told.append(folded(_span, point - mean, drawn - mean, self.measures.resampler.units))
            spans.append(_span(point))
        # The larger of the two is each seed's own.
        return {**widest(told), "value": float(np.max(spans, axis=0).mean())}

    def _limit(self, columns: dict[str, Any]) -> dict[str, Any] | None:
        """What exceeds ``audit.max_gap``, by the student's difference as measured; None where no limit is set."""
        limits = self.spec.limits(tuple(name for name, parts in DIFFERENCES.items() if set(parts) <= set(self.metrics)))
        if not limits:
            return None
        over = [
            {"column": column, "metric": name, "gap": told["student"], "limit": limits[name]}
            for column, each in columns.items()
            for name, told in each["differences"].items()
            if name in limits and told["student"]["value"] > limits[name]
        ]
        return {"max_gap": limits, "over": over}


def _public(gap: dict[str, Any]) -> dict[str, Any]:
    """A gap as plain values: every arm's size and the change with intervals."""
    sizes = {name: estimate.as_dict() for name, estimate in gap["sizes"].items()}
    return {name: gap[name] for name in ("group", "metric", "judged", "flag", "p", "label")} | sizes


def _span(values: np.ndarray) -> np.ndarray:
    span: np.ndarray = np.ptp(values, axis=-2)
    return span


def _perplexity(nll: float) -> float:
    return float(np.exp(min(nll, 50.0)))
