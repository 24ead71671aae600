"""The last round: the best settings of the search, and those of the spec, with several seeds each.

The best score of many trials is partly luck, and the more trials the more of it (the winner's curse). So no trial's
own score decides: the finalists are trained again with other seeds than that of the search, and their means do.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cluster.sweep import Trial
from distill_jobs.tuning.space import Parameters
from distill_jobs.tuning.trial import SEED

LEVEL = 0.95
DEFAULT = "default"


@dataclass(frozen=True)
class Finalist:
    """Settings that are trained with all seeds; ``name`` is that of their trial, or ``default``."""

    name: str
    parameters: Parameters


def finalists(trials: Sequence[Trial], default: Finalist, better: str, count: int) -> list[Finalist]:
    """The spec's own settings first, then the ``count`` best trials that came to their end."""
    told = [trial for trial in trials if trial.state == "finished" and trial.parameters != default.parameters]
    ordered = sorted(told, key=lambda trial: _worth(trial.score, better), reverse=True)
    return [default, *(Finalist(trial.name, trial.parameters) for trial in ordered[:count])]


def points(chosen: Sequence[Finalist], role: str, seeds: Sequence[int]) -> dict[str, Parameters]:
    """The trials of the last round, by name."""
    return {_name(role, finalist, seed): {**finalist.parameters, SEED: seed} for finalist in chosen for seed in seeds}


def judge(
    chosen: Sequence[Finalist], role: str, seeds: Sequence[int], trials: Mapping[str, Trial], better: str
) -> dict[str, Any]:
    """The best finalist by its mean over seeds, and whether its lead over the spec's own settings is more than noise.

    Every finalist starts from the same seeds and sees the same batches with them, so the noise of a difference is that
    which is left after each finalist's and each seed's own mean have been taken away (a two-way layout without
    repeats). Its interval is Student's t, not widened for the choice among the finalists, and of the seeds alone: the
    rows of the validation split are the same for all.

    Returns:
        ``finalists``: each with ``scores`` by seed and the ``mean`` with its interval; ``best`` and ``default``: names;
        ``gain``: the best's mean minus the default's, with its interval; ``distinguishable``; ``noise``: the standard
        deviation of one score over seeds. A finalist that failed with any seed is left out of the choice.
    """
    rows = []
    for finalist in chosen:
        scores = [trials[_name(role, finalist, seed)].score for seed in seeds]
        rows.append({"name": finalist.name, "parameters": finalist.parameters, "scores": scores})
    whole = [row for row in rows if all(score is not None for score in row["scores"])]
    if not whole:
        return {"finalists": rows, "best": None, "default": DEFAULT, "noise": None}
    table = np.array([row["scores"] for row in whole], dtype=float)
    spread, freedom = _spread(table - table.mean(1, keepdims=True), len(whole) * (len(seeds) - 1))
    for row, scores in zip(whole, table, strict=True):
        row["mean"] = interval(float(scores.mean()), spread / math.sqrt(len(seeds)), freedom)
    best = max(range(len(whole)), key=lambda i: _worth(table[i].mean(), better))
    found = {"finalists": rows, "best": whole[best]["name"], "default": DEFAULT, "noise": spread if freedom else None}
    if whole[0]["name"] != DEFAULT:
        why = "training with the spec's own settings failed"
        unknown = {"value": None, "low": None, "high": None, "level": LEVEL, "why": why}
        return {**found, "gain": unknown, "distinguishable": False}
    left = table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()
    spread, freedom = _spread(left, (len(whole) - 1) * (len(seeds) - 1))
    lead = float(table[best].mean() - table[0].mean())
    gain: dict[str, Any] = interval(lead, spread * math.sqrt(2 / len(seeds)), freedom if best else 0)
    apart = gain["low"] is not None and not gain["low"] <= 0 <= gain["high"]
    return {**found, "gain": gain, "distinguishable": apart}


def interval(value: float, error: float, freedom: int) -> dict[str, Any]:
    """A value with Student's t interval; without one where there is nothing to tell its noise by."""
    if freedom < 1:
        return {"value": value, "low": None, "high": None, "level": LEVEL, "why": "one seed, or one candidate alone"}
    from scipy.stats import t

    reach = float(t.ppf((1 + LEVEL) / 2, freedom)) * error
    return {"value": value, "low": value - reach, "high": value + reach, "level": LEVEL}


def _spread(residuals: np.ndarray, freedom: int) -> tuple[float, int]:
    return (math.sqrt(float((residuals**2).sum()) / freedom), freedom) if freedom > 0 else (0.0, 0)


def _worth(score: float | None, better: str) -> float:
    if score is None:
        return -math.inf
    return score if better == "higher" else -score


def _name(role: str, finalist: Finalist, seed: int) -> str:
    own = finalist.name.removeprefix(f"{role}-")
    return f"{role}-{own}-seed-{seed}"
