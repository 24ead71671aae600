"""Which gates are compared, and what the arms that do so have in common with the student."""

from typing import Any

import pytest
from test_spec import tree

from cluster.files import digest
from distill_jobs.errors import SpecError
from distill_jobs.inputs import Inputs, arms_of, inputs_of
from distill_jobs.spec import Job, parse_job


@pytest.fixture(autouse=True)
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_jobs.inputs.data_digest", lambda _: "rows")


def job(gates: list[Any], **distill: Any) -> tuple[Job, Inputs]:
    found = parse_job({**tree(), "seeds": [0, 1], "distill": distill, "audit": {"gates": gates}})
    return found, inputs_of(found)


def test_an_arm_differs_from_the_student_in_its_gate_alone() -> None:
    spec, inputs = job(["drop", {"revise": {"eta": 1.0}}], temperature=3.0)
    arms = {arm.name: arm for arm in arms_of(spec, inputs)}
    pairs = ["student/0", "baseline/0", "student/1", "baseline/1"]
    assert list(arms) == [*pairs, "gate-drop/0", "gate-drop/1", "gate-revise/0", "gate-revise/1"]
    student, revised, baseline = arms["student/1"], arms["gate-revise/1"], arms["baseline/1"]
    others = {"role", "folder", "gate", "digest", "inputs"}
    assert {k: v for k, v in vars(student).items() if k not in others} == {
        k: v for k, v in vars(revised).items() if k not in others
    }
    assert revised.gate is not None and revised.gate.revise is not None and revised.gated
    assert baseline.gate is None and not baseline.gated and not student.gated
    assert arms["gate-drop/0"].gate.drop.confidence == 0.9, "nothing is left to the task"
    changed = {name for name in revised.inputs if revised.inputs[name] != student.inputs.get(name)}
    assert changed == {"distill.gate.name", "distill.gate.eta"}


def test_a_comparison_leaves_student_and_baseline_alone() -> None:
    (_, plain), (_, compared) = job([]), job(["swap"])
    assert all(compared[name] == plain[name] for name in plain if name not in ("evaluate", "audit", "report"))
    assert digest(compared["evaluate"]) != digest(plain["evaluate"])


def test_the_teacher_as_it_is_can_be_compared_with_a_gated_student() -> None:
    spec, inputs = job(["none"], gate="drop")
    arms = {arm.role: arm for arm in arms_of(spec, inputs)}
    assert arms["student"].gated and not arms["gate-none"].gated
    assert inputs["gate-none/0"] == job([])[1]["student/0"]


@pytest.mark.parametrize(
    ("gates", "distill", "said"),
    [
        (["drop", {"drop": {"gold": 0.1}}], {}, "gates names drop twice"),
        (["none"], {}, "audit.gates names none, which is distill.gate"),
        ([{"drop": {"confidence": 0.9}}], {"gate": "drop"}, "audit.gates names drop, which is distill.gate"),
        (["rld"], {"loss": "reverse_kl"}, "audit.gates: gate rld is a loss of its own"),
        (["revise"], {"standardise": True}, "audit.gates: gate revise changes how far apart"),
    ],
)
def test_what_says_nothing_is_refused(gates: list[Any], distill: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        job(gates, **distill)
