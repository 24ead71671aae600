"""What each trial's score would be at its end: measured, or carried on from where the trial was ended early.

Early stopping leaves few trials at their end, and those are the good ones: a surface fitted to them alone would know
nothing of where the bad settings lie.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.sweep import Trial, within

FEWEST_WHOLE = 3


@dataclass(frozen=True)
class Estimate:
    """A trial's score at its end, and the variance that this has beyond the score of one that came there."""

    parameters: Mapping[str, Any]
    score: float
    variance: float


def estimates(trials: Sequence[Trial], space: Mapping[str, Any]) -> list[Estimate]:
    """Those of all trials in the ``space`` (Optuna's distributions) that ended, or were ended early.

    The spec's own settings may lie outside: their trial is left out then.

    One that was ended early has the score of its last look, and what the trials that came to their end have gained on
    average from that share of their training on. The variance is that of another draw of this gain. Where fewer than
    ``FEWEST_WHOLE`` came to their end nothing is carried on.
    """
    own = [trial for trial in trials if trial.score is not None and within(trial.parameters, space)]
    whole = [trial for trial in own if trial.state == "finished"]
    found = [Estimate(trial.parameters, float(trial.score or 0.0), 0.0) for trial in whole]
    if len(whole) < FEWEST_WHOLE:
        return found
    for trial in own:
        if trial.state != "pruned":
            continue
        gains = np.array([_gain(other, trial.curve[-1]["share"]) for other in whole])
        spread = float(gains.var(ddof=1)) * (1 + 1 / len(gains))
        found.append(Estimate(trial.parameters, float(trial.score or 0.0) + float(gains.mean()), spread))
    return found


def _gain(trial: Trial, share: float) -> float:
    """What a trial gained from its look nearest to ``share`` to its end."""
    if not trial.curve:
        return 0.0
    look = min(trial.curve, key=lambda look: abs(look["share"] - share))
    return float(trial.score or 0.0) - float(look["score"])
