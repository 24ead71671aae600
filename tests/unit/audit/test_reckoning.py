"""The audit as a whole on made-up evaluations: fairlearn's values, labels that are earned, mistakes counted."""

from typing import Any

import numpy as np
import pytest
from audit_cases import classified, noisy
from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference

from distill_jobs.audit import labels
from distill_jobs.audit.findings import lines, made_of
from distill_jobs.audit.scores import Scores
from distill_jobs.audit.stage import positive_class, reckon
from distill_jobs.data.facts import DataFacts
from distill_jobs.errors import DataError
from distill_jobs.spec import Job, parse_job

RATE = {"tuned": False, "sentence": "The learning rate is shared."}


def job(audit: dict[str, Any] | None = None, slices: tuple[str, ...] = ("sex", "race")) -> Job:
    mlp = {"mlp": {"hidden": [4]}}
    train = {"epochs": 1, "batch_size": 8}
    return parse_job(
        {
            "name": "made-up",
            "task": "classification",
            "workdir": "nowhere",
            "data": {
                "train": "rows.parquet",
                "label": "y",
                "slices": list(slices),
                "features": {"tabular": {"numeric": ["x"]}},
            },
            "teacher": {"model": mlp, "train": train},
            "student": {"model": mlp, "train": train},
            "audit": {"draws": 300, **(audit or {})},
        }
    )


def reckoned(scores: Scores, audit: dict[str, Any] | None = None, slices: tuple[str, ...] = ("sex", "race")) -> Any:
    facts = DataFacts("classification", "tabular", "f", classes=("no", "yes"), slices=slices)
    return reckon(job(audit, slices), facts, scores, RATE, None)


def people(rows: int, generator: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    label = generator.integers(0, 2, rows)
    sex = np.array(["f", "m"], dtype=object)[generator.integers(0, 2, rows)]
    race = np.array(["a", "b", "c"], dtype=object)[generator.choice(3, rows, p=[0.59, 0.4, 0.01])]
    return label, {"sex": sex, "race": race}


@pytest.fixture(scope="module")
def fair() -> tuple[Scores, Any]:
    """All models err alike in all groups; the student less than the baseline, the teacher least."""
    generator = np.random.default_rng(0)
    label, groups = people(3000, generator)
    shares = {"teacher": 0.05} | {f"student/{s}": 0.10 for s in range(3)} | {f"baseline/{s}": 0.20 for s in range(3)}
    scores = classified(label, {name: noisy(label, share, generator) for name, share in shares.items()}, groups)
    return scores, reckoned(scores, {"intersections": [["sex", "race"]]})


def test_the_ceiling_says_what_was_built_in(fair: tuple[Scores, Any]) -> None:
    scores, found = fair
    ceiling = found["ceiling"]
    accuracies = {role: scores.of_arm(role, "correct").mean() for role in scores.arms}
    for role, accuracy in accuracies.items():
        assert ceiling["arms"][role]["quality"]["value"] == pytest.approx(accuracy)
    gap = (accuracies["student"] - accuracies["baseline"]) / (accuracies["teacher"] - accuracies["baseline"])
    closed = ceiling["gap_closed"]
    assert closed["value"] == pytest.approx(gap) and closed["low"] < 0.667 < closed["high"]
    assert ceiling["gain"]["distinguishable"] and ceiling["student_over_teacher"]["value"] < 0
    assert ceiling["enough_seeds"] and ceiling["unit"] == "row" and ceiling["units"] == 3000
    told = " ".join(ceiling["sentences"])
    assert "better than the no-teacher baseline" in told and "stays below its teacher" in told and "shared" in told


def test_no_gap_is_said_to_be_closed_to_a_teacher_that_is_worse() -> None:
    generator = np.random.default_rng(4)
    label, groups = people(3000, generator)
    shares = {"teacher": 0.30} | {f"student/{s}": 0.20 for s in range(3)} | {f"baseline/{s}": 0.10 for s in range(3)}
    scores = classified(label, {name: noisy(label, share, generator) for name, share in shares.items()}, groups)
    told = " ".join(reckoned(scores)["ceiling"]["sentences"])
    assert "worse than the baseline: there is no gap to close" in told and "surpasses its teacher" in told


def test_fidelity_where_the_teacher_is_right_and_wrong(fair: tuple[Scores, Any]) -> None:
    scores, found = fair
    right = scores.columns["teacher.correct"] == 1
    agree = scores.of_arm("student", "agree").mean(axis=1)
    arm = found["ceiling"]["arms"]["student"]
    assert arm["fidelity_right"]["value"] == pytest.approx(agree[right].mean())
    assert arm["fidelity_wrong"]["value"] == pytest.approx(agree[~right].mean())


def test_values_are_fairlearns(fair: tuple[Scores, Any]) -> None:
    scores, found = fair
    columns = scores.columns
    for name, metric in (
        ("demographic_parity_difference", demographic_parity_difference),
        ("equalized_odds_difference", equalized_odds_difference),
    ):
        each = [
            metric(columns["label"], columns[f"student/{s}.predicted"], sensitive_features=columns["slice.sex"])
            for s in range(3)
        ]
        assert found["bias"]["columns"]["sex"]["differences"][name]["student"]["value"] == pytest.approx(np.mean(each))
    women = columns["slice.sex"] == "f"
    hired = np.mean([columns[f"student/{s}.predicted"][women].mean() for s in range(3)])
    group = found["bias"]["columns"]["sex"]["groups"]["f"]
    assert group["arms"]["student"]["selection_rate"]["value"] == pytest.approx(hired)
    assert group["rows"] == women.sum()


def test_fairlearn_and_our_own_sums_agree(fair: tuple[Scores, Any]) -> None:
    """The intervals are made of our sums, so these must be fairlearn's values to the last digit."""
    from distill_jobs.audit.fairness import RATES, by_group
    from distill_jobs.audit.measures import Measures
    from distill_jobs.audit.resample import Resampler

    scores, _ = fair
    measures = Measures(scores, Resampler(3000, draws=200), ("sex", "race"), positive=1)
    columns = scores.columns
    for column in ("sex", "race"):
        theirs = by_group(columns["label"], columns["student/1.predicted"], columns[f"slice.{column}"], 1)
        for what in RATES:
            for value in measures.values(column):
                ours = measures.of("student", what, column, value).point[1]
                assert ours == pytest.approx(theirs[what][value]), (column, what, value)


def test_small_groups_are_flagged_and_not_judged(fair: tuple[Scores, Any]) -> None:
    _, found = fair
    race = found["bias"]["columns"]["race"]
    assert race["groups"]["c"]["small"] and not race["groups"]["a"]["small"]
    rare = [gap for gap in race["gaps"] if gap["group"] == "c"]
    assert rare and all(not gap["judged"] and gap["label"] is None and gap["flag"] for gap in rare)
    assert race["differences"]["demographic_parity_difference"]["groups"] == ["a", "b"]
    assert set(found["bias"]["columns"]["sex × race"]["groups"]) == {f"{s} × {r}" for s in "fm" for r in "abc"}


def test_two_groups_make_one_gap(fair: tuple[Scores, Any]) -> None:
    gaps = fair[1]["bias"]["columns"]["sex"]["gaps"]
    assert [gap["group"] for gap in gaps] == ["f"] * 4
    assert all(gap["label"] == labels.NONE for gap in gaps)


def test_a_teacher_of_one_sided_mistakes_hands_them_on() -> None:
    """The teacher says no to a third of the women who earn a yes; the student learns it, the baseline does not."""
    generator = np.random.default_rng(1)
    label, groups = people(6000, generator)
    wronged = (groups["sex"] == "f") & (label == 1) & (generator.random(6000) < 0.35)
    models = {"teacher": noisy(np.where(wronged, 0, label), 0.03, generator)}
    for seed in range(3):
        models[f"student/{seed}"] = noisy(np.where(wronged, 0, label), 0.05, generator)
        models[f"baseline/{seed}"] = noisy(label, 0.05, generator)
    found = reckoned(classified(label, models, groups), slices=("sex",))
    gaps = {gap["metric"]: gap for gap in found["bias"]["columns"]["sex"]["gaps"]}
    assert gaps["true_positive_rate"]["label"] == labels.INHERITED
    assert gaps["true_positive_rate"]["change"]["high"] < 0
    assert gaps["false_positive_rate"]["label"] == labels.NONE
    odds = found["bias"]["columns"]["sex"]["differences"]["equalized_odds_difference"]
    assert odds["label"] == labels.INHERITED and odds["student"]["low"] > 0.2 > odds["baseline"]["high"]


def test_the_limit_names_what_exceeds_it() -> None:
    generator = np.random.default_rng(2)
    label, groups = people(2000, generator)
    men = groups["sex"] == "m"
    models = {name: noisy(np.where(men, 1, label), 0.1, generator) for name in ("teacher", "student/0", "baseline/0")}
    scores = classified(label, models, groups)
    over = reckoned(scores, {"max_gap": {"demographic_parity_difference": 0.2}}, ("sex",))["bias"]["limit"]["over"]
    assert [one["column"] for one in over] == ["sex"] and over[0]["gap"]["value"] > 0.2
    assert reckoned(scores, {"max_gap": 0.9}, ("sex",))["bias"]["limit"]["over"] == []
    assert reckoned(scores, slices=("sex",))["bias"]["limit"] is None
    three, limit = DataFacts("classification", "tabular", "f", classes=("no", "yes", "maybe"), slices=("sex",)), 0.9
    with pytest.raises(DataError, match=r"^audit.max_gap limits equalized_odds_difference.* there are 3: .*positive"):
        reckon(job({"max_gap": {"equalized_odds_difference": limit}}, ("sex",)), three, scores, RATE, None)
    found = reckon(job({"max_gap": {"accuracy_difference": limit}}, ("sex",)), three, scores, RATE, None)
    assert found["bias"]["limit"] == {"max_gap": {"accuracy_difference": limit}, "over": []}


def test_a_difference_bears_the_label_of_a_group_that_it_is_of() -> None:
    """Group c is judged by one of the two rates, and would be the widest by far."""
    generator = np.random.default_rng(3)
    label, race = generator.integers(0, 2, 3000), np.array(["a", "b", "c"], dtype=object)[np.arange(3000) % 3]
    label[race == "c"] = np.arange(1000) < 990
    wrong = np.where(race == "c", 0.5, 0.1)
    models = {name: noisy(label, wrong, generator) for name in ("teacher", "student/0", "baseline/0")}
    found = reckoned(classified(label, models, {"race": race}), slices=("race",))["bias"]["columns"]["race"]
    assert {gap["group"] for gap in found["gaps"] if gap["judged"] and gap["metric"] == "true_positive_rate"} > {"c"}
    odds = found["differences"]["equalized_odds_difference"]
    assert odds["groups"] == ["a", "b"] and odds["widest"] in odds["groups"]


def confident_mistakes(repeats: dict[str, float], rows: int = 4000) -> Scores:
    """A teacher that is sure and wrong in a tenth of the rows, where an arm repeats it with a given chance."""
    generator = np.random.default_rng(3)
    label, groups = people(rows, generator)
    wrong = generator.random(rows) < 0.1
    teacher = np.where(wrong, 1 - label, label) * 0.96 + 0.02
    models = {"teacher": teacher}
    for name, chance in repeats.items():
        again = wrong & (generator.random(rows) < chance)
        models[name] = noisy(np.where(again, 1 - label, label), np.where(wrong, 0.0, 0.1), generator)
    return classified(label, models, groups)


def test_negative_transfer_is_what_was_built_in() -> None:
    chances = {f"student/{s}": 0.6 for s in range(3)} | {f"baseline/{s}": 0.3 for s in range(3)}
    chances |= {f"gate-drop/{s}": 0.35 for s in range(3)}
    scores = confident_mistakes(chances)
    found = reckoned(scores, slices=())
    heldout = found["negative"]["heldout"]
    assert heldout["mistakes"] == (scores.columns["teacher.correct"] == 0).sum() and not heldout["small"]
    arms = heldout["arms"]
    mistaken = scores.columns["teacher.correct"] == 0
    assert arms["student"]["repeats"]["value"] == pytest.approx(scores.of_arm("student", "agree")[mistaken].mean())
    elsewhere = scores.of_arm("student", "agree")[~mistaken].mean()
    assert arms["student"]["agreement_elsewhere"]["value"] == pytest.approx(elsewhere)
    for name, truth in (("excess", 0.3), ("ratio_to_baseline", 2.0), ("negative_transfer_ratio", 2.0)):
        told = arms["student"][name]
        assert told["low"] < truth < told["high"], name
    assert arms["student"]["negative_transfer_ratio"]["low"] > 1
    gates = {row["arm"]: row for row in found["gates"]}
    assert list(gates) == ["baseline", "gate-drop", "student"]
    assert gates["gate-drop"]["transfer_kept"]["low"] < 1 / 6 < gates["gate-drop"]["transfer_kept"]["high"] < 0.5
    assert gates["baseline"]["gap_closed"]["value"] is None and gates["baseline"]["gap_closed"]["why"]


def test_few_mistakes_are_flagged() -> None:
    found = reckoned(confident_mistakes({"student/0": 0.5, "baseline/0": 0.5}, rows=300), slices=())
    assert found["negative"]["heldout"]["small"]
    assert any("too few to say more" in line for line in lines(found))
    assert "one seed" in " ".join(found["ceiling"]["sentences"])


def test_calibration_by_hand(fair: tuple[Scores, Any]) -> None:
    scores, found = fair
    bins = np.minimum(14, np.ceil(scores.columns["teacher.confidence"] * 15).astype(int) - 1)
    gaps = scores.columns["teacher.confidence"] - scores.columns["teacher.correct"]
    expected = sum(abs(gaps[bins == b].sum()) for b in range(15)) / len(gaps)
    teacher = found["calibration"]["teacher"]
    assert teacher["ece"]["value"] == pytest.approx(expected)
    assert teacher["ece"]["low"] <= teacher["ece"]["debiased"] <= teacher["ece"]["high"]
    assert [one["count"] for one in teacher["bins"]] == [int((bins == b).sum()) for b in range(15)]
    assert sum(one["count"] for one in found["calibration"]["student"]["bins"]) == 9000


def test_what_is_logged_are_finite_numbers_under_the_three_families(fair: tuple[Scores, Any]) -> None:
    made = made_of(fair[1])
    assert set(made) == {"quality", "negative", "bias"}
    assert all(np.isfinite(value) for family in made.values() for value in family.values())
    assert "gap_closed_low" in made["quality"] and "sex_race_accuracy_difference_student" in made["bias"]


def test_the_positive_class() -> None:
    assert positive_class(None, ("no", "yes")) == 1 and positive_class(None, ("a", "b", "c")) is None
    assert positive_class(0, ("0", "1", "2")) == 0
    with pytest.raises(DataError, match="no class"):
        positive_class("maybe", ("no", "yes"))


def test_mistakes_that_all_make_say_nothing_of_transfer() -> None:
    found = reckoned(confident_mistakes({"student/0": 1.0, "baseline/0": 1.0}, rows=2000), slices=())
    student = found["negative"]["heldout"]["arms"]["student"]
    assert (
        student["excess"]["value"] == 0
        and student["excess"]["low"] is None
        and "all of them" in student["excess"]["why"]
    )
    assert student["negative_transfer_ratio"]["value"] is None
