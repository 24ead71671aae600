"""From paths of the spec to what Optuna is asked, and back to whole jobs; what can't be searched is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from tuning_cases import job

from distill_jobs.errors import SpecError
from distill_jobs.inputs import inputs_of
from distill_jobs.spec.tune import SEARCH, Tune, Values
from distill_jobs.tuning.space import baseline_space, student_space, told


def search(**ranges: Any) -> dict[str, Values]:
    tree = {"search": {path.replace("__", "."): values for path, values in ranges.items()}}
    return dict(Tune.model_validate_json(json.dumps(tree)).search)


def test_the_default_search_is_of_t_alpha_and_learning_rate(tmp_path: Path) -> None:
    space = student_space(job(tmp_path), Tune().search)
    found = space.distributions()
    assert list(found) == ["distill.temperature", "distill.alpha", "student.train.learning_rate"]
    assert (found["distill.temperature"].low, found["distill.temperature"].high) == (1.0, 8.0)
    assert found["student.train.learning_rate"].log and not found["distill.alpha"].log
    assert space.parameters() == {
        "distill.temperature": 2.0,
        "distill.alpha": 0.9,
        "student.train.learning_rate": 0.003,
    }


def test_what_is_proposed_becomes_a_job(tmp_path: Path) -> None:
    ranges = search(
        distill__temperature={"uniform": [1, 8]},
        student__train__learning_rate={"log_uniform": [1e-4, 1e-2]},
        student__train__epochs={"integer": [1, 4]},
        distill__loss={"choice": ["forward_kl", {"jensen_shannon": {"beta": 0.3}}]},
    )
    space = student_space(job(tmp_path), ranges)
    texts = space.distributions()["distill.loss"].choices
    proposed = {
        "distill.temperature": 3.14159265,
        "student.train.learning_rate": 0.000123456,
        "student.train.epochs": 3,
        "distill.loss": texts[1],
    }
    settings = space.settings(proposed)
    assert settings["distill.temperature"] == 3.142 and settings["student.train.learning_rate"] == 0.0001235
    made = space.apply(settings)
    assert made.distill.temperature == 3.142 and made.student.train.epochs == 3
    assert made.distill.loss.kind == "jensen_shannon" and made.distill.loss.chosen.beta == 0.3
    assert space.parameters()["distill.loss"] == texts[0], "the default is one of the choices, however it is written"
    assert told({"distill.loss": {"forward_kl": {}}, "distill.alpha": 0.25}) == "loss forward_kl, alpha 0.25"


def test_a_range_is_never_left_by_rounding(tmp_path: Path) -> None:
    space = student_space(job(tmp_path), search(distill__temperature={"uniform": [1.00009, 7.99991]}))
    assert space.settings({"distill.temperature": 7.9999})["distill.temperature"] == 7.99991
    assert space.settings({"distill.temperature": 1.0001})["distill.temperature"] == 1.00009


@pytest.mark.parametrize(
    ("path", "values", "said"),
    [
        ("distill.temprature", {"uniform": [1, 8]}, "did you mean temperature"),
        ("student.train.lr.peak", {"uniform": [1, 8]}, "unknown key student.train.lr"),
        ("name.first", {"choice": ["x"]}, "no such place"),
        ("distill.alpha", {"uniform": [0, 2]}, "distill.alpha: .*less than or equal to 1"),
        ("distill.loss", {"choice": ["forward_kl", "backward_kl"]}, "backward_kl"),
        ("teacher.train.epochs", {"integer": [1, 3]}, "all trials train from the one store"),
        ("data.validation", {"uniform": [0.1, 0.2]}, "all trials train from the one store"),
        ("capture.codec", {"choice": [{"topk": {"k": 1}}]}, "all trials train from the one store"),
        ("distill.soft_labels", {"choice": ["store", "live"]}, "soft_labels must be store"),
        ("student.train.gpus_per_worker", {"choice": [0, 1]}, "changes nothing"),
        ("seeds", {"choice": [[0], [1]]}, "changes nothing"),
    ],
)
def test_what_is_no_use_to_search(tmp_path: Path, path: str, values: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said) as found:
        student_space(job(tmp_path), search(**{path.replace(".", "__"): values}))
    assert f"tune.search.{path}" in str(found.value) and "\n" not in str(found.value)


def test_gates_are_searched_though_the_audit_compares_one(tmp_path: Path) -> None:
    compared = job(tmp_path, audit={"gates": ["drop", "swap"]})
    space = student_space(compared, search(distill__gate={"choice": ["none", "drop", {"downweight": {"power": 2.0}}]}))
    none, drop, _ = space.distributions()["distill.gate"].choices
    assert space.parameters() == {"distill.gate": none}
    assert space.apply(space.settings({"distill.gate": drop})).distill.gate.kind == "drop"


def test_the_baseline_searches_how_it_is_trained_and_keeps_its_budget(tmp_path: Path) -> None:
    ranges = {
        **SEARCH,
        **search(
            student__train__epochs={"integer": [1, 4]},
            student__train__weight_decay={"uniform": [0, 0.1]},
            student__model__mlp__hidden={"choice": [[4], [6]]},
        ),
    }
    small = job(tmp_path)
    space = baseline_space(small, ranges)
    assert list(space.search) == ["student.train.learning_rate", "student.train.weight_decay"]
    assert space.parameters() == {"student.train.learning_rate": 0.003, "student.train.weight_decay": 0.01}
    made = space.apply({"student.train.learning_rate": 0.01, "student.train.weight_decay": 0.02})
    assert made.baseline_train.learning_rate == 0.01 and made.student.train == small.student.train
    before, after = inputs_of(small), inputs_of(made)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"baseline/0", "evaluate", "audit", "report"}
    assert baseline_space(made, ranges).parameters()["student.train.learning_rate"] == 0.01


def test_what_tuning_found_renews_the_report_alone(tmp_path: Path) -> None:
    small = job(tmp_path)
    before = inputs_of(small)
    (tmp_path / "run" / "tune").mkdir(parents=True)
    (tmp_path / "run" / "tune" / "trials.json").write_text("{}")
    after = inputs_of(small)
    assert {name for name in before if before[name] != after[name]} == {"report"}


def test_an_audit_is_renewed_once_the_baselines_rate_is_a_tuned_one(tmp_path: Path) -> None:
    small = job(tmp_path)
    before = inputs_of(small)
    (tmp_path / "run" / "tune").mkdir(parents=True)
    for rate, renewed in ((2 * small.baseline_train.learning_rate, False), (small.baseline_train.learning_rate, True)):
        found = {"baseline": {"settings": {"student.train.learning_rate": rate}}}
        (tmp_path / "run" / "tune" / "trials.json").write_text(json.dumps(found))
        assert (inputs_of(small)["audit"] != before["audit"]) == renewed
