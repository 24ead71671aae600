"""How far the student is from its ceiling, the teacher, and from the ground, a baseline without one.

Arms are ``teacher``, ``student``, ``baseline``, and ``gate-<name>`` where such were trained. Everything is on the
held-out split, and every interval is paired (see ``intervals``).
"""

import math
from typing import Any

from distill_jobs.audit.intervals import LEVEL, Estimate, ratio
from distill_jobs.audit.measures import Measures
from distill_jobs.audit.scores import rows_of
from distill_jobs.words import difference, percent

ENOUGH_SEEDS = 3
_SHARES = ("accuracy", "agreement", "fidelity_right", "fidelity_wrong")


class Ceiling:
    """The quality of all arms and what lies between them."""

    def __init__(self, measures: Measures) -> None:
        self.measures, self.scores = measures, measures.scores
        self.metric = "perplexity" if self.scores.language else "accuracy"
        self.better = "lower" if self.scores.language else "higher"
        self._base = "nll" if self.scores.language else "accuracy"

    def quality(self, role: str) -> Estimate:
        """Accuracy, or for language models the mean negative log-likelihood (nats), of every seed."""
        return self.measures.of(role, self._base)

    def gained(self, role: str, over: str) -> Estimate:
        """By how much ``role`` is better than ``over``: accuracy, or nats a token; positive is better."""
        return (self.quality(role) - self.quality(over)) * (-1.0 if self.better == "lower" else 1.0)

    def gap_closed(self, role: str) -> dict[str, Any]:
        """(role - baseline) / (teacher - baseline), of accuracy or of log-likelihood."""
        return ratio(
            self.gained(role, "baseline"),
            self.gained("teacher", "baseline"),
            "the teacher is not distinguishable from the baseline: there is no gap to close",
        )

    def arm(self, role: str) -> dict[str, Any]:
        """All measures of one arm as plain values."""
        found: dict[str, Any] = {
            "seeds": [name.partition("/")[2] for name in self.scores.arms[role]] if role != "teacher" else [],
            "quality": self.told(role),
            "nll": self.measures.of(role, "nll").as_dict(least=0.0),
            "kl_to_teacher": self.measures.of(role, "kl").as_dict(least=0.0),
        }
        for what in _SHARES:
            found[what] = self.measures.of(role, what).as_dict(least=0.0, most=1.0)
        return found

    def told(self, role: str, value: str | None = None, column: str | None = None) -> dict[str, Any]:
        """The quality of an arm as people read it, on the whole split or a slice of it."""
        estimate = self.measures.of(role, self._base, column, value)
        if self.scores.language:
            # e to the mean over seeds of the log-likelihood; far beyond any vocabulary it is cut off.
            return estimate.as_dict(lambda nll: math.exp(min(nll, 50.0)), least=0.0)
        return estimate.as_dict(least=0.0, most=1.0)

    def contrast(self, role: str, over: str) -> dict[str, Any]:
        """The gain of one arm over another, and whether it is distinguishable from nothing."""
        estimate = self.gained(role, over)
        found = estimate.as_dict()
        shown = found["low"] is not None and not found["low"] <= 0 <= found["high"]
        return {**found, "p": estimate.p_value(), "distinguishable": shown}

    def as_dict(self, learning_rate: dict[str, Any]) -> dict[str, Any]:
        """The part ``ceiling`` of ``audit.json``."""
        scores = self.scores
        seeds = len(scores.arms["student"])
        contrasts = {
            "gain": self.contrast("student", "baseline"),
            "student_over_teacher": self.contrast("student", "teacher"),
            "teacher_over_baseline": self.contrast("teacher", "baseline"),
        }
        found = {
            "metric": self.metric,
            "better": self.better,
            "in": "nats a token" if scores.language else "accuracy",
            "rows": rows_of(scores.columns),
            "positions": int(scores.positions.sum()),
            "unit": "document" if scores.language else "row",
            "units": self.measures.resampler.units,
            "draws": self.measures.resampler.draws,
            "seeds": seeds,
            "enough_seeds": seeds >= ENOUGH_SEEDS,
            "learning_rate": learning_rate,
            "arms": {role: self.arm(role) for role in scores.arms},
            **contrasts,
            "gap_closed": self.gap_closed("student"),
            "slices": {column: self._slice(column) for column in self.measures.columns},
        }
        return {**found, "sentences": sentences(found)}

    def _slice(self, column: str) -> dict[str, Any]:
        found = {}
        for value, rows in self.measures.rows_by(column).items():
            arms = {role: {"quality": self.told(role, value, column)} for role in self.scores.arms}
            if self.scores.language:
                for role, told in arms.items():
                    told["nll"] = self.measures.of(role, "nll", column, value).as_dict(least=0.0)
            found[value] = {"rows": rows, "units": self.measures.units_of(column, value), "arms": arms}
        return found


def sentences(found: dict[str, Any]) -> list[str]:
    """What the numbers say, plainly: the gain, the teacher surpassed or not, the way left to the ceiling, the seeds."""
    unit = "nats a token" if found["better"] == "lower" else "percentage points"
    said = [_gain(found["gain"], unit), _teacher(found["student_over_teacher"], unit), _closed(found)]
    if found["seeds"] == 1:
        said.append(
            "All of it rests on one seed: how much another would change is not known, and no interval holds it."
        )
    elif not found["enough_seeds"]:
        said.append(f"It rests on {found['seeds']} seeds; intervals hold their level from {ENOUGH_SEEDS} on.")
    said.append(str(found["learning_rate"]["sentence"]))
    return said


def _gain(gain: dict[str, Any], unit: str) -> str:
    told = f"{_number(gain['value'], unit)} {unit} {_interval(gain, unit)}"
    if not gain["distinguishable"]:
        return f"The student's gain over the no-teacher baseline is not distinguishable from nothing: {told}."
    verb = "better" if gain["value"] > 0 else "worse"
    return f"The student is {verb} than the no-teacher baseline, by {told}."


def _teacher(over: dict[str, Any], unit: str) -> str:
    told = f"{_number(over['value'], unit)} {unit} {_interval(over, unit)}"
    if not over["distinguishable"]:
        return f"The student is not distinguishable from its teacher: {told}."
    if over["value"] > 0:
        return f"The student surpasses its teacher, by {told}."
    return f"The student stays below its teacher: {told}."


def _closed(found: dict[str, Any]) -> str:
    closed, lead = found["gap_closed"], found["teacher_over_baseline"]["value"]
    if closed["value"] is None:
        return f"How much of the gap was closed is not defined: {closed['why']}."
    ends = (
        ""
        if closed["low"] is None
        else f" ({percent(LEVEL, 0)} interval {100 * closed['low']:.0f} to {100 * closed['high']:.0f})"
    )
    if lead < 0:
        told = "The teacher is worse than the baseline: there is no gap to close, and of the way down to it the student"
        return f"{told} went {100 * closed['value']:.0f} %{ends}."
    return f"Of the gap between baseline and teacher the student closes {100 * closed['value']:.0f} %{ends}."


def _interval(found: dict[str, Any], unit: str) -> str:
    if found["low"] is None:
        return "(no interval)"
    return f"({percent(LEVEL, 0)} interval {_number(found['low'], unit)} to {_number(found['high'], unit)})"


def _number(value: float, unit: str) -> str:
    return difference("accuracy", value) if unit == "percentage points" else f"{value:+.4f}".replace("-", "−")
