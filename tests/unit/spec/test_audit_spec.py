"""What a spec may ask of the audit, and which stages hang on it."""

from typing import Any

import pytest

from distill_jobs.errors import SpecError
from distill_jobs.inputs import inputs_of
from distill_jobs.spec import Job, parse_job
from distill_jobs.spec.audit import Audit


def job(audit: dict[str, Any] | None = None, task: str = "classification") -> Job:
    language = task == "causal_lm"
    features: dict[str, Any] = {"documents": {}} if language else {"tabular": {"numeric": ["x"]}}
    model = {"hf": "here"} if language else {"mlp": {"hidden": [4]}}
    train = {"epochs": 1, "batch_size": 8}
    data: dict[str, Any] = {"train": "rows.parquet", "slices": ["sex", "race"], "features": features}
    spec: dict[str, Any] = {
        "name": "j",
        "task": task,
        "workdir": "w",
        "data": data if language else {**data, "label": "y"},
        "teacher": {"model": model} if language else {"model": model, "train": train},
        "student": {"model": model, "train": train},
    }
    return parse_job(spec if audit is None else {**spec, "audit": audit})


@pytest.mark.parametrize(
    ("audit", "task", "said"),
    [
        ({"intersections": [["sex", "age"]]}, "classification", "age, which is not one of data.slices"),
        ({"intersections": [["sex", "sex"]]}, "classification", "a column twice"),
        ({"intersections": [["sex"]]}, "classification", "audit.intersections"),
        ({"positive": "yes"}, "causal_lm", "a causal_lm has none"),
        ({"max_gap": {"nll_difference": 0.1}}, "classification", "not measured for classification"),
        ({"max_gap": {"accuracy_difference": 0.1}}, "causal_lm", "not measured for causal_lm"),
        ({"max_gap": -0.1}, "classification", "audit.max_gap"),
        ({"confident": 1.5}, "classification", "audit.confident"),
        ({"confidnet": 0.9}, "classification", "confident"),
    ],
)
def test_a_mistake_is_one_clear_sentence(audit: dict[str, Any], task: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        job(audit, task)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_one_limit_for_all_or_one_for_each() -> None:
    known = ("accuracy_difference", "demographic_parity_difference")
    assert Audit().limits(known) == {}
    assert Audit(max_gap=0.1).limits(known) == dict.fromkeys(known, 0.1)
    each = Audit(max_gap={"demographic_parity_difference": 0.2, "nll_difference": 0.3})
    assert each.limits(known) == {"demographic_parity_difference": 0.2}


def test_the_audit_is_no_reason_to_train_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_jobs.inputs.data_digest", lambda _: "rows")
    monkeypatch.setattr("distill_jobs.inputs.brought_digest", lambda _: "weights")
    asked = {"max_gap": 0.1, "confident": 0.8, "low_entropy": 0.5}
    for task, redone in (("classification", {"audit"}), ("causal_lm", {"evaluate", "audit"})):
        before, after = inputs_of(job(None, task)), inputs_of(job(asked, task))
        changed = {name for name in before if before[name] != after[name]}
        assert changed == {*redone, "report"}


def test_a_limit_without_groups_could_never_be_exceeded() -> None:
    tree = job().model_dump(mode="json", exclude_none=True)
    tree["data"]["slices"], tree["audit"]["max_gap"] = [], 0.1
    with pytest.raises(SpecError, match=r"data.slices names no column"):
        parse_job(tree)
