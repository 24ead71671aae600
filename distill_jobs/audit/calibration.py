"""Expected calibration error and reliability diagrams.

A first choice's confidence is its probability. Confidences go into 15 bins of equal width, and

    ECE = Σ_bins (positions in the bin / all positions) · |mean confidence - share of right first choices|

(Naeini et al. 2015; Guo et al. 2017). Noise within bins makes it larger than it is (Kumar et al. 2019): ``debiased``
takes that off, and the interval holds both.
"""

from typing import Any

import numpy as np
import torch

from distill_jobs.audit.intervals import folded
from distill_jobs.audit.pieces import BINS, bin_of
from distill_jobs.audit.resample import Resampler
from distill_jobs.audit.scores import Scores

_HISTOGRAM = ("bin_count", "bin_confidence", "bin_correct")


def calibration(scores: Scores, resampler: Resampler) -> dict[str, Any]:
    """For every arm the ECE with its interval, the ECE of every seed, and the bins of all seeds together.

    A bin has its bounds ``lower`` and ``upper``, its ``count`` of positions, and the means of ``confidence`` and
    ``accuracy`` (null in an empty bin).
    """
    found = {}
    for role, names in scores.arms.items():
        bins = np.stack([_bins(scores, name) for name in names], axis=-1)
        told, seeds = ece(bins, scores.positions, resampler)
        found[role] = {"ece": told, "seeds": seeds, "bins": _diagram(bins.sum(axis=(1, 3)))}
    return found


def ece(bins: np.ndarray, positions: np.ndarray, resampler: Resampler) -> tuple[dict[str, Any], list[float]]:
    """The ECE of an arm, and that of each of its S seeds.

    Args:
        bins: counts, sums of confidence and sums of right choices, [3, P, BINS, S].
        positions: [P].
    """
    off = bins[1] - bins[2]
    sums = resampler.sums(np.column_stack([off.reshape(len(off), -1), positions]))
    point = (sums.whole[:-1] / sums.whole[-1]).reshape(off.shape[1:])
    drawn = (sums.drawn[:, :-1] / sums.drawn[:, -1:]).reshape(-1, *off.shape[1:])
    return folded(_distance, point, drawn, resampler.units), _distance(point).tolist()


def _distance(parts: np.ndarray) -> np.ndarray:
    whole: np.ndarray = np.abs(parts).sum(axis=-2)
    return whole


def _bins(scores: Scores, name: str) -> np.ndarray:
    """[3, P, BINS]."""
    if scores.language:
        return np.stack([scores.of_model(name, what) for what in _HISTOGRAM])
    confidence, right = scores.of_model(name, "confidence"), scores.of_model(name, "correct")
    rows, at = np.arange(len(confidence)), bin_of(torch.from_numpy(confidence)).numpy()
    bins = np.zeros((3, len(confidence), BINS))
    for which, values in enumerate((np.ones(len(rows)), confidence, right)):
        bins[which, rows, at] = values
    return bins


def _diagram(whole: np.ndarray) -> list[dict[str, Any]]:
    diagram = []
    for b, (count, confidence, right) in enumerate(whole.T.tolist()):
        means = {"confidence": confidence / count, "accuracy": right / count} if count else {}
        diagram.append(
            {
                "lower": b / BINS,
                "upper": (b + 1) / BINS,
                "count": round(count),
                **{"confidence": None, "accuracy": None, **means},
            }
        )
    return diagram
