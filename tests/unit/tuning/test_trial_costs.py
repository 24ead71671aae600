"""Importance, response surface and money saved, on trials whose truth is known."""

import json
from typing import Any

import numpy as np
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from tuning_cases import trial

from cluster.sweep import Trial
from distill_jobs.tuning.estimates import estimates
from distill_jobs.tuning.importance import importance
from distill_jobs.tuning.picture import picture
from distill_jobs.tuning.savings import savings
from distill_jobs.tuning.surface import ALPHA, T, _Codes, _explains, _fit, surface

RATE = "student.train.learning_rate"
SPACE = {T: FloatDistribution(1, 8), ALPHA: FloatDistribution(0, 1), RATE: FloatDistribution(1e-4, 1e-2, log=True)}


def truth(t: float, alpha: float) -> float:
    return 0.9 - 0.01 * (t - 4) ** 2 - 0.02 * (alpha - 0.5) ** 2


def trials(count: int, noise: float = 0.002, seed: int = 0) -> list[Trial]:
    generator = np.random.default_rng(seed)
    made = []
    for number in range(count):
        t, alpha, rate = generator.uniform(1, 8), generator.uniform(), 10 ** generator.uniform(-4, -2)
        score = truth(t, alpha) + generator.normal() * noise
        made.append(trial(number, score, **{T: t, ALPHA: alpha, RATE: rate}))
    return made


def test_the_surface_finds_what_made_the_scores() -> None:
    told = trials(40)
    best = max(told, key=lambda each: each.score or 0.0).parameters
    found = surface(told, SPACE, best)
    assert found["why"] is None and found["explains"] > 0.9 and found["at"] == {RATE: best[RATE]}
    mean, low, high = (np.array(found[name]) for name in ("mean", "low", "high"))
    real = np.array([[truth(t, a) for t in found["temperature"]] for a in found["alpha"]])
    inner = np.s_[3:-3, 3:-3]
    assert np.abs(mean - real)[inner].max() < 0.01 and (low <= mean).all() and (mean <= high).all()
    assert ((low <= real) & (real <= high))[inner].mean() > 0.8
    assert 0.0005 < found["noise"] < 0.006
    assert json.loads(json.dumps(found)) == found
    assert picture(found, "accuracy", (4.0, 0.5)).startswith(b"\x89PNG")


def test_a_surface_of_noise_explains_nothing() -> None:
    generator = np.random.default_rng(1)
    told = [trial(i, generator.normal(), **each.parameters) for i, each in enumerate(trials(25))]
    assert surface(told, SPACE, {})["explains"] < 0.3


def test_what_is_left_out_is_foretold_as_by_fitting_without_it() -> None:
    told = trials(14, seed=3)
    inputs = np.stack([_Codes(SPACE).of(each.parameters) for each in told])
    scores = np.array([each.score for each in told])
    variances = np.where(np.arange(14) % 3, 0.0, 1e-5)
    process = _fit(inputs, scores, variances, 0)
    centred = (scores - scores.mean()) / scores.std()
    whole, errors, plain = process.kernel_(inputs) + np.diag(variances / scores.var()), 0.0, 0.0
    for i in range(len(scores)):
        rest = np.arange(len(scores)) != i
        guess = whole[i, rest] @ np.linalg.solve(whole[np.ix_(rest, rest)], centred[rest])
        errors += (centred[i] - guess) ** 2
        plain += (centred[i] - centred[rest].mean()) ** 2
    assert _explains(process, scores) == pytest.approx(1 - errors / plain, abs=1e-6)


def test_choices_and_logarithms_are_coded() -> None:
    codes = _Codes({"rate": FloatDistribution(1e-4, 1e-2, log=True), "loss": CategoricalDistribution(["a", "b", "c"])})
    assert codes.of({"rate": 1e-3, "loss": "b"}) == pytest.approx([0.5, 0.0, 1.0, 0.0])


@pytest.mark.parametrize("count", [0, 5])
def test_too_few_trials_are_told(count: int) -> None:
    told = [*trials(count), trial(90, None, "failed", **{T: 2.0, ALPHA: 0.5, RATE: 1e-3})]
    found = surface(told, SPACE, {})
    assert found["mean"] is None and f"takes 8 trials, and there are {count}" in found["why"]
    assert found["trials"][-1]["state"] == "failed"
    shares = importance(told, SPACE)
    assert shares["trials"] == count and shares["parameters"][T]["value"] is None
    assert "takes 12 trials" in shares["parameters"][T]["why"]


def test_t_and_alpha_have_to_be_searched_for_a_surface() -> None:
    assert "not both searched" in surface([trial(0, 0.5, x=1)], {"x": FloatDistribution(0, 2)}, {})["why"]


def test_what_matters_is_told_from_what_does_not() -> None:
    shares = importance(trials(40), SPACE, draws=4)["parameters"]
    assert next(iter(shares)) == T and shares[T]["value"] > 0.6 > 0.3 > shares[RATE]["value"]
    assert sum(share["value"] for share in shares.values()) == pytest.approx(1)
    for share in shares.values():
        assert 0 <= share["low"] <= share["high"] <= 1


SCHEDULE = {"schedule": "linear", "from": 4.0, "to": 1.0}


@pytest.mark.parametrize("own", [{T: 0.7}, {T: SCHEDULE}, {RATE: 0.0}], ids=["below", "schedule", "no logarithm"])
def test_the_specs_own_settings_may_lie_outside_of_what_is_searched(own: dict[str, Any]) -> None:
    told = trials(14)
    own = {**told[0].parameters, **own}
    whole = [*told, trial(99, 0.9, **own)]
    assert importance(whole, SPACE, draws=2) == importance(told, SPACE, draws=2)
    found = surface(whole, SPACE, own)
    assert found["why"] is None and json.loads(json.dumps(found, allow_nan=False)) == found
    assert len(found["trials"]) == len(whole) - (own[T] is SCHEDULE)
    assert picture(found, "accuracy", None).startswith(b"\x89PNG")


def test_scores_that_are_nearly_all_the_same_tell_of_no_setting() -> None:
    told = trials(14)
    for each in told[1:]:
        each.score = 0.75
    one_apart = importance(told, SPACE)["parameters"]
    assert set(one_apart) == set(SPACE)
    told[0].score = 0.75
    assert "the same score" in importance(told, SPACE)["parameters"][T]["why"]


def test_what_was_ended_early_is_carried_on_to_its_end() -> None:
    def curve(end: float, *early: float) -> list[dict[str, float]]:
        return [{"share": (i + 1) / 4, "score": end + gap} for i, gap in enumerate(early)]

    whole = [trial(i, 0.80 + i / 100, x=float(i)) for i in range(3)]
    for each, gain in zip(whole, (0.03, 0.05, 0.04), strict=True):
        each.curve = curve(each.score or 0.0, -0.1, -gain)
    early = trial(3, 0.70, "pruned", x=9.0)
    early.curve = curve(0.70, -0.05, 0.0)
    lost, other = trial(4, None, "failed", x=1.0), trial(5, 0.9, y=1.0)
    found = estimates([*whole, early, lost, other], {"x": FloatDistribution(0, 9)})
    assert [each.score for each in found] == pytest.approx([0.80, 0.81, 0.82, 0.74])
    assert [each.variance for each in found] == pytest.approx([0, 0, 0, 1e-4 * 4 / 3])
    assert len(estimates([*whole[:2], early], {"x": FloatDistribution(0, 9)})) == 2, (
        "two ends are too few to carry others on by"
    )


def test_bad_settings_that_were_ended_early_show_in_the_surface() -> None:
    told = trials(30)
    for each in told:
        score = each.score or 0.0
        each.curve = [{"share": 0.25, "score": score - 0.05}]
        if score < 0.87:
            each.state, each.score = "pruned", score - 0.05
    best = max((each for each in told if each.state == "finished"), key=lambda each: each.score or 0.0)
    mean = np.array(surface(told, SPACE, best.parameters)["mean"])
    real = np.array([[truth(t, a) for t in np.linspace(1, 8, 25)] for a in np.linspace(0, 1, 25)])
    assert any(each.state == "pruned" for each in told) and np.abs(mean - real)[3:-3, 3:-3].max() < 0.015


def test_money_saved_is_arithmetic_on_the_ledger() -> None:
    told = [trial(0, 0.9), trial(1, 0.8, "pruned"), trial(2, 0.7)]
    for each, rows in zip(told, (300, 50, 250), strict=True):
        each.usage = {"rows": rows}
    found = savings(2.0, 100, told)
    assert found["against_capture_each"]["value"] == 4.0 and found["against_live"]["value"] == 10.0
    assert found["against_live"]["low"] is None and found["against_live"]["why"]
    assert savings(None, 100, told)["against_live"]["value"] is None
