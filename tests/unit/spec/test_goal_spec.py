"""What a spec may say of its goal, and that a goal changes the report alone."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distill_jobs.errors import SpecError
from distill_jobs.inputs import inputs_of
from distill_jobs.spec import Job, parse_job
from distill_jobs.spec.goal import Accuracy, Deploy


def job(goal: dict[str, Any] | None = None) -> Job:
    train = {"epochs": 1, "batch_size": 8}
    spec: dict[str, Any] = {
        "name": "j",
        "task": "classification",
        "workdir": "w",
        "data": {"train": "rows.parquet", "label": "y", "features": {"tabular": {"numeric": ["x"]}}},
        "teacher": {"model": {"mlp": {"hidden": [4]}}, "train": train},
        "student": {"model": {"mlp": {"hidden": [2]}}, "train": train},
    }
    return parse_job(spec if goal is None else {**spec, "goal": goal})


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        ({"deploy": {}}, "give latency_ms, memory_mb or usd_per_million"),
        ({"deploy": {"latency_ms": 0}}, "goal.deploy.latency_ms"),
        ({"deploy": {"latency": 3}}, "latency_ms"),
        ({"accuracy": {"margin": -1}}, "goal.accuracy.margin"),
        ({"iterate": {"runs": 0}}, "goal.iterate.runs"),
        ({"accuracy": {}, "iterate": {}}, "goal"),
        ({"speed": {}}, "goal"),
    ],
)
def test_a_mistake_is_one_clear_sentence(goal: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        job(goal)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_goal_it_is_accuracy() -> None:
    assert job().goal.chosen == Accuracy() == job({"accuracy": {}}).goal.chosen
    assert isinstance(job({"deploy": {"memory_mb": 10}}).goal.chosen, Deploy)


def test_another_goal_renews_the_report_and_nothing_else(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"x": [0.0], "y": ["a"]}), "rows.parquet")
    plain, other = inputs_of(job()), inputs_of(job({"iterate": {"runs": 3}}))
    assert {stage for stage in plain if plain[stage] != other[stage]} == {"report"}
    assert inputs_of(job({"accuracy": {}})) == plain
