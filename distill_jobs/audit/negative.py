"""Negative knowledge: where the teacher is confidently wrong, and how often its very mistake is made again.

On the held-out split, over the positions where the teacher is confidently wrong:

- *repeats* of an arm: the share of them at which its first choice is the teacher's;
- *excess*: the student's repeats less the baseline's: mistakes that were taken over, beyond those that anyone makes who
  learns from such data. This is the negative transfer that a gate ought to cut;
- *ratio to baseline*: the student's repeats over the baseline's;
- *ratio to agreement*: an arm's repeats over its agreement with the teacher at all other positions;
- the *negative-transfer ratio*: the student's ratio to agreement over the baseline's. Above 1 the student took over
  more of the teacher's mistakes than its ordinary likeness to the teacher accounts for; at 1, just as much.

Ratios have Fieller's interval and are told only where what they are divided by is distinguishable from 0.
"""

from typing import Any

from distill_jobs.audit.intervals import Estimate, nothing, ratio
from distill_jobs.audit.measures import Measures

TRANSFER = ("excess", "ratio_to_baseline", "negative_transfer_ratio")
_NEVER = "the baseline is not shown to make these mistakes at all"


class Negative:
    """What became of the teacher's confident mistakes."""

    def __init__(self, measures: Measures, least: int) -> None:
        """``least`` mistakes are needed to say more of them than their number."""
        self.measures, self.least = measures, least

    def heldout(self, column: str | None = None, value: str | None = None) -> dict[str, Any]:
        """Rates and ratios on the held-out split or a slice of it."""
        measures = self.measures
        inside = slice(None) if column is None else measures.columns[column] == value
        mistakes, positions = int(measures.mistakes[inside].sum()), int(measures.scores.positions[inside].sum())
        rate = measures.of("teacher", "mistake_rate", column, value)
        found: dict[str, Any] = {
            "positions": positions,
            "mistakes": mistakes,
            "rate": rate.as_dict(least=0.0, most=1.0),
            "small": mistakes < self.least,
            "arms": {},
        }
        for role in measures.scores.students:
            repeats = measures.of(role, "repeats", column, value)
            agreement = measures.of(role, "elsewhere", column, value)
            found["arms"][role] = {
                "repeats": repeats.as_dict(least=0.0, most=1.0),
                "agreement_elsewhere": agreement.as_dict(least=0.0, most=1.0),
                "ratio_to_agreement": ratio(repeats, agreement, "it is not shown to agree with the teacher at all"),
            }
            if role != "baseline":
                found["arms"][role] |= self.transfer(role, column, value)
        return found

    def excess(self, role: str, column: str | None = None, value: str | None = None) -> Estimate:
        """The repeats of an arm less the baseline's."""
        of = self.measures.of
        return of(role, "repeats", column, value) - of("baseline", "repeats", column, value)

    def transfer(self, role: str, column: str | None = None, value: str | None = None) -> dict[str, Any]:
        """``excess``, ``ratio_to_baseline`` and ``negative_transfer_ratio`` of an arm."""
        of = self.measures.of
        own, base = (of(arm, "repeats", column, value) for arm in (role, "baseline"))
        if own.spread()[0] == base.spread()[0] == 0:
            unmoved = nothing("they repeat all of them, or none: what others would show is not known")
            known = {
                "excess": own.value - base.value,
                "ratio_to_baseline": own.value / base.value if base.value else None,
            }
            return {name: {**unmoved, "value": known.get(name)} for name in TRANSFER}
        likeness, usual = (of(arm, "elsewhere", column, value) for arm in (role, "baseline"))
        return {
            "excess": (own - base).as_dict(),
            "ratio_to_baseline": ratio(own, base, _NEVER),
            "negative_transfer_ratio": ratio(own / likeness, base / usual, _NEVER),
        }

    def as_dict(self, thresholds: dict[str, float], train: dict[str, Any] | None) -> dict[str, Any]:
        """The part ``negative`` of ``audit.json``; ``train`` is what the store says (``negative.json``)."""
        measures = self.measures
        return {
            "thresholds": thresholds,
            "train": train or nothing("there is no store: the teacher was asked live"),
            "heldout": self.heldout(),
            "slices": {c: {v: self.heldout(c, v) for v in measures.values(c)} for c in measures.columns},
        }
