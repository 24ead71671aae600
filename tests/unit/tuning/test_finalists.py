"""The last round decides by means over seeds, and calls noise noise."""

import numpy as np
import pytest
from tuning_cases import trial

from cluster.sweep import Trial
from distill_jobs.tuning.finalists import DEFAULT, Finalist, finalists, judge, points

SEEDS = (0, 1, 2)
OWN = Finalist(DEFAULT, {"x": 0.5})


def round_of(means: dict[str, float], noise: float, seed: int, common: float = 0.0) -> dict[str, Trial]:
    """Scores of finalists around their true means; ``common`` moves all that have one seed."""
    generator = np.random.default_rng(seed)
    shared = generator.normal(size=len(SEEDS)) * common
    found = {}
    for name, mean in means.items():
        for i, number in enumerate(SEEDS):
            own = f"student-{name.removeprefix('student-')}-seed-{number}"
            found[own] = Trial(own, {}, "finished", mean + shared[i] + generator.normal() * noise)
    return found


def test_the_best_by_score_and_the_specs_own_go_on() -> None:
    trials = [trial(0, 0.7, x=0.1), trial(1, 0.9, x=0.2), trial(2, 0.8, x=0.3), trial(3, 0.99, "pruned", x=0.4)]
    trials.append(trial(4, 0.95, **OWN.parameters))
    assert [f.name for f in finalists(trials, OWN, "higher", 2)] == [DEFAULT, "student-001", "student-002"]
    assert [f.name for f in finalists(trials, OWN, "lower", 1)] == [DEFAULT, "student-000"]
    again = points([OWN, Finalist("student-001", {"x": 0.2})], "student", (0, 7))
    assert again["student-001-seed-7"] == {"x": 0.2, "seed": 7} and "student-default-seed-0" in again


def test_a_real_lead_is_told_from_noise() -> None:
    chosen = [OWN, Finalist("student-001", {"x": 1})]
    clear = judge(chosen, "student", SEEDS, round_of({DEFAULT: 0.8, "student-001": 0.9}, 0.002, 1), "higher")
    assert clear["best"] == "student-001" and clear["distinguishable"]
    assert clear["gain"]["low"] < 0.1 < clear["gain"]["high"]
    lower = judge(chosen, "student", SEEDS, round_of({DEFAULT: 0.8, "student-001": 0.9}, 0.002, 1), "lower")
    assert lower["best"] == DEFAULT and lower["gain"]["value"] == 0 and not lower["distinguishable"]


def test_what_a_seed_does_to_all_is_no_noise_of_the_difference() -> None:
    chosen = [OWN, Finalist("student-001", {"x": 1})]
    trials = round_of({DEFAULT: 0.8, "student-001": 0.82}, 0.001, 3, common=0.1)
    found = judge(chosen, "student", SEEDS, trials, "higher")
    assert found["distinguishable"] and found["noise"] > 0.02


def test_the_interval_of_a_difference_covers_it_as_often_as_it_says() -> None:
    chosen = [OWN, Finalist("student-001", {"x": 1})]
    hits = 0
    for seed in range(400):
        # So far apart that the choice itself plays no part.
        found = judge(chosen, "student", SEEDS, round_of({DEFAULT: 0.0, "student-001": 50.0}, 1.0, seed, 2.0), "higher")
        hits += found["gain"]["low"] <= 50.0 <= found["gain"]["high"]
    assert 0.92 <= hits / 400 <= 0.98


def test_one_seed_tells_no_noise() -> None:
    trials = {f"student-{n}-seed-0": Trial("t", {}, "finished", s) for n, s in (("default", 0.8), ("001", 0.9))}
    found = judge([OWN, Finalist("student-001", {"x": 1})], "student", (0,), trials, "higher")
    assert found["best"] == "student-001" and not found["distinguishable"]
    assert found["gain"]["value"] == pytest.approx(0.1) and found["gain"]["low"] is None and found["noise"] is None


def test_settings_that_failed_with_a_seed_are_not_chosen() -> None:
    trials = round_of({DEFAULT: 0.8, "student-001": 0.9}, 0.001, 1)
    trials["student-001-seed-1"].score = None
    found = judge([OWN, Finalist("student-001", {"x": 1})], "student", SEEDS, trials, "higher")
    assert found["best"] == DEFAULT
    for name in trials:
        trials[name].score = None
    assert judge([OWN], "student", SEEDS, trials, "higher")["best"] is None
