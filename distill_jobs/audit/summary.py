"""From per-row scores to ``evaluation.json``: quality by model, by slice, and the student's gain with its interval."""

import math
from typing import Any

import numpy as np

from distill_jobs.audit.resample import paired_gain
from distill_jobs.audit.scores import Columns, Scores, rows_of


def summarise(task: str, scores: Scores, speeds: dict[str, dict[str, Any]], slices: tuple[str, ...]) -> dict[str, Any]:
    """Build the evaluation.

    Args:
        speeds: size and speed by model; seeds of one arm share the measurement of the first.
    """
    language = task == "causal_lm"
    metric = "perplexity" if language else "accuracy"
    columns = scores.columns
    names = [name for members in scores.arms.values() for name in members]
    arms = {arm: scores.arms[arm] for arm in ("student", "baseline")}
    everything = np.ones(len(columns["positions"]), dtype=bool)
    evaluation: dict[str, Any] = {
        "task": task,
        "metric": metric,
        "better": "lower" if language else "higher",
        "rows": rows_of(columns),
        "tokens": int(columns["positions"].sum()),
        "models": {name: {**_quality(columns, name, language), **_speed(speeds, name)} for name in names},
        "summary": {"teacher": {"value": _value(columns, "teacher", metric, everything)}},
        "slices": {},
    }
    for arm, members in arms.items():
        values = [_value(columns, name, metric, everything) for name in members]
        evaluation["summary"][arm] = {"mean": float(np.mean(values)), "seeds": values}
    evaluation["summary"]["gain"] = _gain(scores, metric)
    for name in slices:
        evaluation["slices"][name] = _by_slice(columns, arms, metric, columns[f"slice.{name}"])
    return evaluation


def _quality(scores: Columns, name: str, language: bool) -> dict[str, float]:
    positions = scores["positions"].sum()
    mean = {what: float(scores[f"{name}.{what}"].sum() / positions) for what in ("nll", "correct", "agree", "kl")}
    quality = {
        "nll": mean["nll"],
        "accuracy": mean["correct"],
        "agreement": mean["agree"],
        "kl_to_teacher": mean["kl"],
    }
    return {**quality, "perplexity": _perplexity(mean["nll"])} if language else quality


def _value(scores: Columns, name: str, metric: str, rows: np.ndarray) -> float:
    positions = scores["positions"][rows].sum()
    if metric == "accuracy":
        return float(scores[f"{name}.correct"][rows].sum() / positions)
    return _perplexity(float(scores[f"{name}.nll"][rows].sum() / positions))


def _perplexity(nll: float) -> float:
    # Far beyond any vocabulary, and still a number that JSON can hold.
    return math.exp(min(nll, 50.0))


def _gain(scores: Scores, metric: str) -> dict[str, Any]:
    """The student's value minus the baseline's; for perplexity the interval is that of the mean log-loss, carried over.

    ``low`` and ``high`` are null where there are too few held-out units to say how far it may be off.
    The seeds are paired: student and baseline of one seed start from the same weights and see the same batches.
    """
    what = "correct" if metric == "accuracy" else "nll"
    student, baseline = (scores.of_arm(arm, what).T for arm in ("student", "baseline"))
    reference = float(baseline.mean(0).sum() / scores.positions.sum())

    def shape(difference: float) -> float:
        if metric == "accuracy":
            return difference
        return _perplexity(reference + difference) - _perplexity(reference)

    gain = paired_gain(student, baseline, scores.positions, scores.units).as_dict(shape)
    apart = gain["low"] is not None and not gain["low"] <= 0 <= gain["high"]
    return {"mean": gain.pop("value"), **gain, "distinguishable": apart, "seeds": len(student)}


def _by_slice(scores: Columns, arms: dict[str, tuple[str, ...]], metric: str, column: np.ndarray) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for value in sorted(set(column.tolist())):
        rows = column == value
        if not scores["positions"][rows].sum():
            continue
        found[str(value)] = {
            "rows": rows_of(scores, rows),
            "teacher": _value(scores, "teacher", metric, rows),
            **{
                arm: float(np.mean([_value(scores, name, metric, rows) for name in members]))
                for arm, members in arms.items()
            },
        }
    return found


def _speed(speeds: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """The measurement of the model's architecture: a baseline is built as the student is."""
    return next((s for timed, s in speeds.items() if (timed == "teacher") == (name == "teacher")), {})
