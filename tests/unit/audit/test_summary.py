"""The evaluation: intervals that mean something, and sums that agree with a direct computation."""

import math
from typing import Any

import numpy as np
import pytest

from distill_jobs.audit.scores import Scores
from distill_jobs.audit.summary import summarise as summarise_scores


def summarise(task: str, columns: dict[str, np.ndarray], *rest: Any) -> dict[str, Any]:
    return summarise_scores(task, Scores.of(columns), *rest)


def scores(rows: int, seeds: int, student: float, baseline: float, seed: int = 0) -> dict[str, np.ndarray]:
    """Made-up right and wrong answers with the given probabilities of being right."""
    generator = np.random.default_rng(seed)
    columns = {
        "sample_id": np.arange(rows),
        "positions": np.ones(rows, dtype=np.int64),
        "slice.sex": np.array(["f", "m"], dtype=object)[generator.integers(2, size=rows)],
    }
    chances = {"teacher": 0.9} | {f"student/{i}": student for i in range(seeds)}
    chances |= {f"baseline/{i}": baseline for i in range(seeds)}
    for name, chance in chances.items():
        right = (generator.random(rows) < chance).astype(float)
        columns |= {f"{name}.correct": right, f"{name}.agree": right, f"{name}.kl": np.zeros(rows)}
        columns[f"{name}.nll"] = np.where(right > 0, 0.1, 2.0)
    return columns


def test_a_large_gain_is_distinguished_and_none_is_not() -> None:
    clear = summarise("classification", scores(800, 3, 0.9, 0.6), {}, ("sex",))
    assert clear["summary"]["gain"]["distinguishable"] and clear["summary"]["gain"]["low"] > 0.2
    same = scores(800, 3, 0.7, 0.7)
    for seed in range(3):
        for what in ("nll", "correct", "agree", "kl"):
            same[f"student/{seed}.{what}"] = same[f"baseline/{seed}.{what}"]
    nothing = summarise("classification", same, {}, ())["summary"]["gain"]
    assert nothing["mean"] == nothing["low"] == nothing["high"] == 0 and not nothing["distinguishable"]


def test_where_there_are_too_few_units_there_is_no_interval() -> None:
    gain = summarise("classification", scores(1, 3, 0.9, 0.6), {}, ())["summary"]["gain"]
    assert gain["low"] is gain["high"] is None and not gain["distinguishable"] and "too few units" in gain["why"]


def test_values_by_model_and_slice() -> None:
    made = scores(500, 2, 0.8, 0.7)
    speeds = {"teacher": {"latency_ms": 1.0}, "student/0": {"latency_ms": 0.1}}
    found = summarise("classification", made, speeds, ("sex",))
    assert found["models"]["student/1"]["accuracy"] == pytest.approx(made["student/1.correct"].mean())
    assert found["models"]["teacher"]["latency_ms"] == 1.0
    assert found["models"]["baseline/1"]["latency_ms"] == 0.1
    women = made["slice.sex"] == "f"
    assert found["slices"]["sex"]["f"]["rows"] == women.sum()
    assert found["slices"]["sex"]["f"]["teacher"] == pytest.approx(made["teacher.correct"][women].mean())
    assert found["metric"] == "accuracy" and found["better"] == "higher"


def test_perplexity_weighs_rows_by_their_positions() -> None:
    made = scores(50, 1, 0.8, 0.7)
    made["positions"] = np.arange(50) % 5
    for name in ("teacher", "student/0", "baseline/0"):
        made[f"{name}.nll"] = made[f"{name}.nll"] * made["positions"]
    found = summarise("causal_lm", made, {}, ())
    direct = math.exp(made["teacher.nll"].sum() / made["positions"].sum())
    assert found["models"]["teacher"]["perplexity"] == pytest.approx(direct)
    gain = found["summary"]["gain"]
    expected = found["models"]["student/0"]["perplexity"] - found["models"]["baseline/0"]["perplexity"]
    assert gain["mean"] == pytest.approx(expected) and gain["low"] <= gain["mean"] <= gain["high"]
