"""Where a student may start from, and what is trained of it."""

import json
from typing import Any

import pytest

from distill_jobs.errors import SpecError
from distill_jobs.inputs import arms_of, inputs_of
from distill_jobs.spec import Job, Train, parse_job

SIZES = {"hidden_size": 64, "intermediate_size": 128, "attention_heads": 4, "key_value_heads": 2, "layers": 3}


def job(student: dict[str, Any], teacher: dict[str, Any] | None = None, **changes: Any) -> Job:
    config = {"config": {"model_type": "llama"}}
    return parse_job(
        {
            "name": "lm",
            "task": "causal_lm",
            "workdir": "run",
            "data": {"train": "text.jsonl", "features": {"documents": {"tokenizer": "bytes"}}},
            "teacher": {"model": teacher or config, "train": {}},
            "student": {**student, "train": {}},
            **changes,
        },
        "job.yaml",
    )


def test_a_pruned_teacher_and_adapters() -> None:
    found = job({"model": {"prune_teacher": {**SIZES, "layers": [0, 2]}}, "lora": {"rank": 4, "targets": ["q_proj"]}})
    assert found.student.model.chosen.layers == (0, 2) and found.student.model.from_teacher
    assert found.student.lora is not None and found.student.lora.targets == ("q_proj",)
    assert job({"model": {"prune_teacher": SIZES}}).student.model.chosen.layers == 3


@pytest.mark.parametrize(
    ("student", "teacher", "said"),
    [
        ({"model": {"prune_teacher": {}}}, None, "name at least one size to prune to: hidden_size"),
        ({"model": {"prune_teacher": {"calibration_rows": 8}}}, None, "name at least one size to prune to"),
        ({"model": {"prune_teacher": {"hiden_size": 8}}}, None, "did you mean hidden_size?"),
        ({"model": {"prune_teacher": {"layers": []}}}, None, "student.model.prune_teacher.layers"),
        ({"model": {"prune_teacher": SIZES}}, {"mlp": {}}, "mlp takes tabular or image features"),
        (
            {"model": {"prune_teacher": SIZES}},
            {"factory": {"target": "mine:make"}},
            "student.model.prune_teacher takes Hugging Face teachers only, and the teacher is a factory model",
        ),
        ({"model": {"hf": "here"}}, {"prune_teacher": SIZES}, "can't be cut from a teacher"),
        ({"model": {"config": {"model_type": "gpt2"}}, "lora": {}}, None, "trained already"),
        ({"model": {"hf": "here"}, "lora": {"rank": 0}}, None, "student.lora.rank"),
    ],
)
def test_a_mistake_is_one_clear_sentence(student: dict[str, Any], teacher: dict[str, Any] | None, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        job(student, teacher)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_students_and_baselines_hang_on_the_teacher_that_they_are_pruned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_jobs.inputs.data_digest", lambda _: "rows")
    model = {"model": {"prune_teacher": SIZES}}
    inputs = inputs_of(job({**model, "lora": {"rank": 4}}))
    assert "teacher" in inputs["baseline/0"]
    assert all(
        arm.lora is not None and arm.lora.rank == 4 for arm in arms_of(job({**model, "lora": {"rank": 4}}), inputs)
    )
    other = inputs_of(job({**model, "lora": {"rank": 8}}))
    changed = {name for name, value in inputs["baseline/0"].items() if other["baseline/0"].get(name) != value}
    assert changed == {"student.lora.rank"}


def test_what_came_later_changes_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_jobs.inputs.data_digest", lambda _: "rows")
    inputs = inputs_of(job({"model": {"prune_teacher": SIZES}}))
    assert not [name for values in inputs.values() for name in values if name.endswith("model.saved")]


def test_a_baseline_hangs_on_nothing_that_it_has_in_the_students_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("distill_jobs.inputs.data_digest", lambda _: "rows")

    def baseline(patience: int) -> dict[str, Any]:
        train = {"early_stopping": {"patience": patience}}
        found = job({"model": {"config": {"model_type": "llama"}}}, baseline={"train": {"early_stopping": None}})
        student = found.student.model_copy(update={"train": Train.model_validate_json(json.dumps(train))})
        return inputs_of(found.model_copy(update={"student": student}))["baseline/0"]

    assert baseline(3) == baseline(4) and baseline(3)["student.train.early_stopping"] is None


def test_an_unknown_key_of_a_baselines_training_names_the_nearest() -> None:
    with pytest.raises(
        SpecError, match=r"baseline\.train\.learningrate: there is no such key; student\.train has learning_r"
    ):
        job({"model": {"config": {"model_type": "llama"}}}, baseline={"train": {"learningrate": 0.1}})
