"""What the spec says of tuning, and of how the baseline alone is trained."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from distill_jobs.spec import Train
from distill_jobs.spec.tune import Baseline, Tune


def parse(**values: Any) -> Tune:
    return Tune.model_validate_json(json.dumps(values))


def test_early_stopping_can_be_left_out() -> None:
    assert parse().early_stopping is not None and parse(early_stopping=None).early_stopping is None


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"search": {"distill.alpha": {"uniform": [1, 0]}}}, "from a lower to a higher end"),
        ({"search": {"distill.alpha": {"uniform": [0.5, 0.5]}}}, "from a lower to a higher end"),
        ({"search": {"distill.alpha": {"log_uniform": [0, 1]}}}, "ends above 0"),
        ({"search": {"distill.alpha": {"integer": [0.5, 1]}}}, "integer"),
        ({"search": {"distill.alpha": {"choice": []}}}, "choice"),
        ({"search": {"distill.alpha": {"uniform": [0, 1], "choice": [1]}}}, "exactly one kind of range"),
        ({"search": {}}, "search"),
        ({"trials": 0}, "trials"),
        ({"early_stopping": {"reduction": 1}}, "reduction"),
        ({"concurrent": "many"}, "concurrent"),
    ],
)
def test_mistakes(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        parse(**values)


def test_a_baseline_differs_only_in_what_is_said() -> None:
    student = Train.model_validate_json(json.dumps({"early_stopping": {"patience": 5, "min_delta": 0.1}}))
    changed = Baseline(train={"learning_rate": 0.5, "early_stopping": {"patience": 2}}).train_of(student)
    assert changed.learning_rate == 0.5 and changed.early_stopping is not None
    assert (changed.early_stopping.patience, changed.early_stopping.min_delta) == (2, 0.1)
    assert changed.model_copy(update={"learning_rate": 1e-3, "early_stopping": student.early_stopping}) == student
    assert Baseline().train_of(student) == student


@pytest.mark.parametrize("name", ["steps", "epochs", "batch_size", "workers"])
def test_a_baseline_has_the_budget_of_the_student(name: str) -> None:
    with pytest.raises(ValidationError, match=f"remove {name}"):
        Baseline(train={name: 1})
