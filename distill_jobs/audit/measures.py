"""Every measure of every arm, on the whole held-out split or a part of it, as paired estimates."""

from collections.abc import Callable
from functools import cache

import numpy as np

from distill_jobs.audit.intervals import Estimate
from distill_jobs.audit.resample import Resampler, Sums
from distill_jobs.audit.scores import Scores, rows_of

JOINED = " × "


class Measures:
    """A measure is a sum over a sum, both over pieces.

    Attributes:
        columns: slice columns and intersections (named ``sex × race``): the value of each piece, [P] of text.
    """

    def __init__(
        self,
        scores: Scores,
        resampler: Resampler,
        slices: tuple[str, ...] = (),
        intersections: tuple[tuple[str, ...], ...] = (),
        confident: float = 1.0,
        positive: int | None = None,
    ) -> None:
        self.scores, self.resampler = scores, resampler
        self._confident, self.positive = confident, positive
        self.columns = {name: scores.columns[f"slice.{name}"].astype(str) for name in slices}
        for names in intersections:
            parts = [self.columns[name].tolist() for name in names]
            self.columns[JOINED.join(names)] = np.array([JOINED.join(p) for p in zip(*parts, strict=True)])
        self.of, self._sums, self.values = cache(self._of), cache(self._sums_of), cache(self._values)
        self.mistakes = self._mistakes()

    def _values(self, column: str) -> list[str]:
        """The values of a slice column that hold any scored position, sorted."""
        return sorted(set(self.columns[column][self.scores.positions > 0].tolist()))

    def rows_by(self, column: str) -> dict[str, int]:
        """Rows of the data by value."""
        return {v: rows_of(self.scores.columns, self.columns[column] == v) for v in self.values(column)}

    def units_of(self, column: str, value: str) -> int:
        """Resampled units (rows; documents) of a slice."""
        chosen = self.columns[column] == value
        units = self.scores.units
        return int(chosen.sum()) if units is None else len(np.unique(units[chosen].astype(str)))

    def _of(self, role: str, what: str, column: str | None = None, value: str | None = None) -> Estimate:
        """A measure of an arm, one point for each seed; ``value`` keeps to the pieces whose ``column`` is that.

        ``what`` is one of ``MEASURES``: ``accuracy``, ``nll``, ``kl``, ``entropy``, ``agreement``; ``fidelity_right``
        and ``fidelity_wrong``, agreement where the teacher is right and where it is wrong; ``repeats``, the teacher's
        own mistake made again where it is confidently wrong; ``elsewhere``, agreement at all other positions;
        ``mistake_rate``, how often it is confidently wrong, which is the same for every arm; of a classifier with a
        positive class ``selection_rate``, ``true_positive_rate`` and ``false_positive_rate``.
        """
        if column is None:
            return self.resampler.ratio(*MEASURES[what](self, role))
        sums, at, width = self._sums(role, what, column), self.values(column).index(str(value)), self._width(role)
        return sums.ratio(slice(at * width, (at + 1) * width - 1), (at + 1) * width - 1)

    def rest(self, role: str, what: str, column: str, value: str) -> Estimate:
        """The same over all pieces whose ``column`` is something else."""
        sums, at, width = self._sums(role, what, column), self.values(column).index(value), self._width(role)
        others = [k for k in range(len(self.values(column))) if k != at]
        whole, drawn, units = (
            np.sum([part[..., k * width : (k + 1) * width] for k in others], axis=0)
            for part in (sums.whole, sums.drawn, sums.units)
        )
        return Sums(whole, drawn, units).ratio(slice(0, -1), -1)

    def _sums_of(self, role: str, what: str, column: str) -> Sums:
        """For each value of a column the sums above of every seed, and the sum below."""
        above, below = MEASURES[what](self, role)
        pair = np.column_stack([above, below])
        inside = [self.columns[column] == value for value in self.values(column)]
        return self.resampler.sums(np.concatenate([pair * chosen[:, None] for chosen in inside], axis=1))

    def _width(self, role: str) -> int:
        return len(self.scores.arms[role]) + 1

    def outcomes(self, role: str, what: str, inside: np.ndarray) -> tuple[float, float]:
        """What a measure counts among the pieces ``inside`` [P]: positions, and those of them that it says yes to."""
        above, below = MEASURES[what](self, role)
        return float(below[inside].sum()), float(above[inside].mean(axis=1).sum())

    def _mistakes(self) -> np.ndarray:
        """[P], positions where the teacher is confidently wrong."""
        scores = self.scores
        if scores.language:
            return np.asarray(scores.columns["mistakes"], dtype=np.float64)
        sure = scores.of_model("teacher", "confidence") >= self._confident
        return np.asarray(sure & (scores.of_model("teacher", "correct") == 0), dtype=np.float64)

    def where_right(self, role: str) -> np.ndarray:
        """Agreement with the teacher where it is right, [P, S]."""
        if self.scores.language:
            return self.scores.of_arm(role, "agree_right")
        both: np.ndarray = self.scores.of_arm(role, "agree") * self.scores.of_arm("teacher", "correct")
        return both

    def repeats(self, role: str) -> np.ndarray:
        """How often the teacher's confident mistakes are made again, [P, S]."""
        if self.scores.language:
            return self.scores.of_arm(role, "repeats")
        again: np.ndarray = self.scores.of_arm(role, "agree") * self.mistakes[:, None]
        return again

    def chosen(self, role: str) -> np.ndarray:
        """Where a classifier says the positive class, [P, S]."""
        return np.asarray(self.scores.of_arm(role, "predicted") == self.positive, dtype=np.float64)

    def gold(self) -> np.ndarray:
        """Where the positive class is right, [P]."""
        return np.asarray(self.scores.columns["label"] == self.positive, dtype=np.float64)


Pair = tuple[np.ndarray, np.ndarray]


def _mean(what: str) -> Callable[[Measures, str], Pair]:
    return lambda m, role: (m.scores.of_arm(role, what), m.scores.positions)


def _right(measures: Measures, role: str) -> Pair:
    return measures.where_right(role), measures.scores.of_model("teacher", "correct")


def _wrong(measures: Measures, role: str) -> Pair:
    agree = measures.scores.of_arm(role, "agree") - measures.where_right(role)
    return agree, measures.scores.positions - measures.scores.of_model("teacher", "correct")


def _elsewhere(measures: Measures, role: str) -> Pair:
    agree = measures.scores.of_arm(role, "agree") - measures.repeats(role)
    return agree, measures.scores.positions - measures.mistakes


def _positive_rate(truth: bool) -> Callable[[Measures, str], Pair]:
    def pair(measures: Measures, role: str) -> Pair:
        gold = measures.gold() if truth else 1.0 - measures.gold()
        return measures.chosen(role) * gold[:, None], gold

    return pair


MEASURES: dict[str, Callable[[Measures, str], Pair]] = {
    "accuracy": _mean("correct"),
    "nll": _mean("nll"),
    "kl": _mean("kl"),
    "entropy": _mean("entropy"),
    "agreement": _mean("agree"),
    "fidelity_right": _right,
    "fidelity_wrong": _wrong,
    "repeats": lambda m, role: (m.repeats(role), m.mistakes),
    "elsewhere": _elsewhere,
    "mistake_rate": lambda m, _: (m.mistakes[:, None], m.scores.positions),
    "selection_rate": lambda m, role: (m.chosen(role), m.scores.positions),
    "true_positive_rate": _positive_rate(True),
    "false_positive_rate": _positive_rate(False),
}
"""What each measure sums over pieces, above [P, S] and below [P]."""
