"""What the audit looks at, and how large a gap may be. Imports neither torch nor ray."""

from typing import Annotated, Literal

from pydantic import Field

from distill_jobs.spec.base import Positive, Share
from distill_jobs.spec.gate import GateComparison

Difference = Literal[
    "accuracy_difference", "demographic_parity_difference", "equalized_odds_difference", "nll_difference"
]
Limit = Annotated[float, Field(gt=0)]


class Audit(GateComparison):
    """The reckoning on the held-out split.

    ``max_gap`` fails the job, after all its stages, where the student's largest difference between two groups exceeds
    it: one limit for all differences, or a limit by difference. ``intersections`` are lists of slice columns that are
    judged together. A group of fewer than ``min_slice_rows`` rows (documents) is flagged, not judged. ``positive`` is
    the class that rates are about; by default the last of two, and none where there are more.

    A classifying teacher is confidently wrong where it gives a wrong class at least the probability ``confident``; a
    language model where its entropy is at most ``low_entropy`` nats and it gives the right token at most the
    probability ``tiny_gold``.
    """

    max_gap: Limit | dict[Difference, Limit] | None = None
    intersections: tuple[Annotated[tuple[str, ...], Field(min_length=2)], ...] = ()
    min_slice_rows: Annotated[int, Field(ge=2)] = 50
    positive: str | int | None = None
    confident: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.9
    low_entropy: Annotated[float, Field(gt=0.0)] = 1.0
    tiny_gold: Annotated[Share, Field(gt=0.0)] = 0.001
    draws: Annotated[Positive, Field(ge=200)] = 1000

    def limits(self, known: tuple[str, ...]) -> dict[str, float]:
        """The limit of each of the ``known`` differences that has one."""
        if self.max_gap is None:
            return {}
        if isinstance(self.max_gap, dict):
            return {str(name): limit for name, limit in self.max_gap.items() if name in known}
        return dict.fromkeys(known, self.max_gap)
