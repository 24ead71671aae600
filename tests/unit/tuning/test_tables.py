"""What the last screen says: sentences that know their noise."""

from typing import Any

import pytest

from distill_jobs.tuning.tables import saved_sentence, surface_sentence, verdict


def judged(**changes: Any) -> dict[str, Any]:
    gain = {"value": 0.004, "low": 0.001, "high": 0.007, "level": 0.95}
    student = {
        "finalists": [{"name": "default", "scores": [0.8, 0.81, 0.82]}],
        "best": "student-003",
        "default": "default",
        "settings": {"distill.alpha": 0.3, "distill.loss": {"forward_kl": {}}},
        "gain": gain,
        "distinguishable": True,
    }
    return {"metric": "accuracy", "student": {**student, **changes}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "(alpha 0.3, loss forward_kl) beat the spec's own by +0.40 percentage points (95 % interval +0.10 to"),
        ({"distinguishable": False}, "no more than the noise of 3 seeds"),
        ({"best": "default"}, "No settings tried were better than the spec's own, by the mean over 3 seeds"),
        ({"gain": {"value": 0.004, "low": None, "high": None}}, "with one seed nobody can tell whether that is noise"),
        ({"gain": {"value": None, "low": None, "high": None, "why": "it failed"}}, "can't be compared"),
    ],
)
def test_the_verdict_of_a_search(changes: dict[str, Any], said: str) -> None:
    assert said in verdict(judged(**changes), "student")


def test_money_and_surface() -> None:
    saved = {"capture_usd": 2.0, "trainings": 3, "against_capture_each": {"value": 4.0}}
    assert "saved $4.00 against a capture for each, and $10.00 against a live" in saved_sentence(
        {**saved, "against_live": {"value": 10.0}}
    )
    assert "$1.00 more than a live teacher" in saved_sentence({**saved, "against_live": {"value": -1.0}})
    surface = {"metric": "accuracy", "why": None, "mean": [[0.8, 0.9]], "high": [[0.81, 0.93]], "explains": 0.5}
    assert "from 80.00\u00a0% to 90.00\u00a0%, each ± 3.00 percentage points" in surface_sentence(surface)
    assert "foretells nothing" in surface_sentence({**surface, "explains": -0.1})
    assert surface_sentence({"why": "too few"}) == "No response surface over T and alpha: too few."
