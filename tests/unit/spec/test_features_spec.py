"""Features in the spec: what can be asked for, and what is refused before anything is spent."""

from typing import Any

import pytest
from test_spec import tree

from distill_jobs.errors import SpecError
from distill_jobs.inputs import arms_of, inputs_of
from distill_jobs.spec import Job, parse_job

STORED = {"layers": ["layers.1", "layers.2"], "width": 4}
PAIRS = {"pairs": {"layers.2": "layers.1"}}


def job(**changes: Any) -> Job:
    return parse_job(tree(data__train="no/such/*.parquet", **changes))


def digests(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, dict[str, Any]]:
    monkeypatch.setattr("distill_jobs.inputs.data_digest", lambda _: "content")
    return inputs_of(job(**changes))


def test_defaults_and_who_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    made = job(capture__features=STORED, distill__features=PAIRS)
    assert made.capture.features is not None and (made.capture.features.bits, made.capture.features.seed) == (8, 0)
    assert made.distill.features is not None
    assert (made.distill.features.weight, made.distill.features.loss) == (0.1, "mse")
    assert job(capture__features={"layers": ["a"]}).capture.features.width == 64  # type: ignore[union-attr]
    found = digests(monkeypatch, capture__features=STORED, distill__features=PAIRS, distill__alpha=0.0)
    student, baseline = arms_of(job(capture__features=STORED, distill__features=PAIRS, distill__alpha=0.0), found)
    assert student.features is not None and student.reads_soft and student.teacher_layers == ("layers.1",)
    assert baseline.features is None and not baseline.reads_soft and baseline.teacher_layers == ()


def test_only_what_asks_for_features_is_redone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = digests(monkeypatch)
    assert not any("features" in name for name in plain["capture"]) and "distill.features" not in plain["student/0"]
    stored = digests(monkeypatch, capture__features=STORED)
    assert stored["teacher"] == plain["teacher"] and stored["baseline/0"] == plain["baseline/0"]
    new = stored["capture"].keys() - plain["capture"].keys()
    assert new == {f"capture.features.{key}" for key in ("layers", "width", "bits", "seed")}
    taught = digests(monkeypatch, capture__features=STORED, distill__features=PAIRS)
    assert taught["capture"] == stored["capture"] and taught["baseline/0"] == plain["baseline/0"]
    assert taught["student/0"].keys() - stored["student/0"].keys() == {
        "distill.features.weight",
        "distill.features.loss",
        "distill.features.pairs.layers.2",
    }


@pytest.mark.parametrize(("loss", "redone"), [("mse", False), ("cosine", False), ("cka", True)])
def test_another_micro_batch_is_another_loss_where_rows_are_compared(
    monkeypatch: pytest.MonkeyPatch, loss: str, redone: bool
) -> None:
    features = {
        "capture__features": STORED,
        "distill__features": {**PAIRS, "loss": loss},
        "student__train__batch_size": 64,
    }
    one, other = (digests(monkeypatch, **features, student__train__micro_batch=rows) for rows in (16, 32))
    assert (one["student/0"] != other["student/0"]) == redone and one["baseline/0"] == other["baseline/0"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"capture__features": {"layers": []}}, "capture.features.layers: Tuple should have at least 1 item"),
        ({"capture__features": {"layers": ["a", "a"]}}, "layers names a layer twice"),
        ({"capture__features": {"layers": ["a"], "bits": 4}}, "capture.features.bits: Input should be 8 or 16"),
        ({"capture__features": {"layer": ["a"]}}, "unknown key capture.features.layer; did you mean layers?"),
        ({"capture__features": STORED, "capture__compile": True}, "gone once compiled: set compile to false"),
        ({"distill__features": PAIRS}, "learns from layers of the teacher: name them in capture.features.layers"),
        (
            {"capture__features": STORED, "distill__features": {"pairs": {"a": "layers.3"}}},
            "names the teacher's layers.3, but capture.features.layers has layers.2, layers.1",
        ),
        ({"distill__features": {"pairs": {}}}, "distill.features.pairs: Dictionary should have at least 1 item"),
        ({"distill__features": {**PAIRS, "weight": 0}}, "distill.features.weight: Input should be greater than 0"),
        ({"distill__features": {**PAIRS, "loss": "rkd"}}, "Input should be 'mse', 'cosine' or 'cka'"),
        (
            {"capture__features": STORED, "distill": {"features": PAIRS, "teachers": [{}, {"store": "b"}]}},
            "several teachers share no layer: remove features or teachers",
        ),
    ],
)
def test_a_mistake_is_one_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        job(**changes)
    assert said in str(caught.value) and "\n" not in str(caught.value)
