"""What the costs part of a spec takes, and that what came later redoes nothing that is done."""

from pathlib import Path
from typing import Any

import pytest

from distill_jobs.errors import SpecError
from distill_jobs.inputs import inputs_of
from distill_jobs.spec import Job, parse_job
from distill_jobs.spec.costs import Costs


def job(folder: Path, teacher: dict[str, Any] | None = None, **costs: Any) -> Job:
    (folder / "a.csv").write_text("a,y\n1,0\n2,1\n")
    brought = {"model": {"factory": {"target": "json:loads"}}}
    tree = {
        "name": "x",
        "task": "classification",
        "workdir": str(folder / "run"),
        "data": {"train": str(folder / "a.csv"), "label": "y", "features": {"tabular": {"numeric": ["a"]}}},
        "teacher": {**brought, **(teacher or {})},
        "student": {"model": {"mlp": {}}, "train": {}},
        "costs": costs,
    }
    return parse_job(tree)


def test_settings_that_came_later_change_no_digest_unless_they_are_given(tmp_path: Path) -> None:
    plain = inputs_of(job(tmp_path))
    assert {name for name in plain["report"] if name.startswith("costs")} == {"costs.prices", "costs.override"}
    for costs in ({"budget_usd": 5.0}, {"sizes": [3]}, {"spot": False}):
        assert inputs_of(job(tmp_path, **costs)) == plain
    for costs in ({"spot": True}, {"spot": {"H100": True}}, {"country": "FRA"}, {"store_months": 3.0}, {"pue": 1.2}):
        changed = inputs_of(job(tmp_path, **costs))
        assert {name for name in plain if plain[name] != changed[name]} == {"report"}


def test_what_a_teacher_has_cost_makes_no_other_teacher_of_it(tmp_path: Path) -> None:
    plain, declared = inputs_of(job(tmp_path)), inputs_of(job(tmp_path, {"cost": {"usd": 100.0, "share": 0.5}}))
    assert {name for name in plain if plain[name] != declared[name]} == {"report"}
    assert declared["report"]["teacher.cost.usd"] == 100.0


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        ({"country": "France"}, r"costs\.country"),
        ({"budget_usd": 0.0}, r"costs\.budget_usd"),
        ({"budget": 5.0}, "did you mean budget_usd"),
        ({"pue": 0.5}, r"costs\.pue"),
        ({"sizes": []}, r"costs\.sizes"),
        ({"store_months": -1.0}, r"costs\.store_months"),
        ({"country": "FRA", "kg_co2e_per_kwh": 0.1}, "give one"),
    ],
)
def test_wrong_settings_are_one_sentence(tmp_path: Path, costs: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        job(tmp_path, **costs)


def test_a_teacher_that_is_trained_declares_nothing(tmp_path: Path) -> None:
    taught = {"model": {"mlp": {}}, "train": {}, "cost": {"usd": 1.0}}
    with pytest.raises(SpecError, match="cost is for a teacher that is brought"):
        job(tmp_path, taught)
    with pytest.raises(SpecError, match=r"teacher\.cost\.share"):
        job(tmp_path, {"cost": {"usd": 1.0, "share": 1.5}})


def test_spot_by_kind_of_device() -> None:
    assert Costs(spot=True).is_spot("CPU") and not Costs().is_spot("H100")
    assert Costs(spot={"H100": True}).is_spot("H100") and not Costs(spot={"H100": True}).is_spot("CPU")
