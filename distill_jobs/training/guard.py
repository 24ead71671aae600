"""Steps that would spoil a run: a loss or gradient that is not finite, or a loss far above the recent ones."""

import math
from collections import deque
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

import numpy as np

from distill_jobs.spec.train import OnBadStep

RECENT = 64
"""Losses of good steps, the latest ones, that a spike is told by."""
FEWEST = 16
"""So many of them must be there before anything counts as a spike."""
_LEAST_SPREAD = 0.01  # of the mean: where all losses are the same, any other would be a spike
LARGEST = float(np.finfo(np.float64).max)
"""The limit of a loss that only has to be finite."""


@dataclass(frozen=True)
class Trouble:
    """Why a step is bad.

    Attributes:
        what: ``loss`` or ``gradient`` (not finite), or ``spike``.
        loss: of the step.
        limit: the loss that it should have stayed below; None for a gradient.
    """

    what: str
    loss: float
    limit: float | None = None

    def said(self) -> str:
        """For an error's sentence."""
        if self.what == "gradient":
            return "the gradient is not finite"
        above = f", above {self.limit:.4g}" if self.what == "spike" else ""
        return f"the loss is {self.loss:.4g}{above}"


class Guard:
    """Tells bad steps from good ones, the same on all ranks as long as it is told the same.

    Attributes:
        bad: bad steps so far.
    """

    def __init__(self, spec: OnBadStep) -> None:
        self.spec, self.bad = spec, 0
        self._recent: deque[float] = deque(maxlen=RECENT)

    def look(self, loss: float) -> Trouble | None:
        """What is wrong with a step of this mean loss over all ranks."""
        if not math.isfinite(loss):
            return Trouble("loss", loss, LARGEST)
        if self.spec.spike is None or len(self._recent) < FEWEST:
            return None
        mean = fmean(self._recent)
        limit = mean + self.spec.spike * max(pstdev(self._recent, mean), _LEAST_SPREAD * abs(mean))
        return Trouble("spike", loss, limit) if loss > limit else None

    def passed(self, loss: float) -> None:
        """A step of this loss was good."""
        if self.spec.spike is not None:
            self._recent.append(loss)

    def count(self) -> bool:
        """One more bad step: whether the run may go on after it."""
        self.bad += 1
        return self.spec.action != "stop" and self.bad <= self.spec.max

    def state(self) -> dict[str, Any]:
        """In plain values."""
        return {"bad": self.bad, "recent": list(self._recent)}

    def restore(self, state: dict[str, Any]) -> None:
        self.bad = state["bad"]
        self._recent = deque(state["recent"], maxlen=RECENT)
