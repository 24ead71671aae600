"""The spec: what it takes, and the sentence it gives for what it doesn't."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from distill_jobs.errors import SpecError
from distill_jobs.spec import load_job, parse_job

EXAMPLES = sorted((Path(__file__).parents[3] / "distill_jobs" / "examples").glob("*.yaml"))


def tree(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "digits",
        "task": "classification",
        "workdir": "runs/digits",
        "data": {"train": "digits.parquet", "label": "y", "features": {"tabular": {"numeric": ["a"]}}},
        "teacher": {"model": {"mlp": {"hidden": [8]}}, "train": {"epochs": 1}},
        "student": {"model": {"mlp": {"hidden": [4]}}, "train": {"epochs": 1}},
    }
    for dotted, value in changes.items():
        *parents, leaf = dotted.split("__")
        node = base
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return base


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_every_shipped_example_parses(path: Path) -> None:
    assert load_job(path).name


def test_there_are_examples() -> None:
    assert {"adult", "lm", "lm_long"} <= {path.stem for path in EXAMPLES}


def test_defaults_and_absolute_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    job = parse_job(tree(data__validation=0.2))
    assert job.workdir == str(tmp_path / "runs/digits")
    assert job.data.train == str(tmp_path / "digits.parquet")
    assert job.data.validation == 0.2
    assert parse_job(tree(workdir="s3://bucket/runs")).workdir == "s3://bucket/runs"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"distill__temprature": 2.0}, "unknown key distill.temprature; did you mean temperature?"),
        ({"teacher__model__mlp__hiden": [3]}, "unknown key teacher.model.mlp.hiden; did you mean hidden?"),
        ({"distill__alpha": 1.5}, "distill.alpha: Input should be less than or equal to 1"),
        ({"distill__temperature": 0.0}, "distill.temperature: Input should be greater than or equal to 0.5"),
        ({"distill__temperature": "hot"}, "distill.temperature: Input should be a valid number"),
        ({"student__train__zero_stage": 4}, "student.train.zero_stage: Input should be 0, 1, 2 or 3"),
        ({"student__train__batch_size": 10, "student__train__workers": 4}, "batch_size 10 is not a multiple"),
        ({"teacher__model": {"mlp": {}, "cnn": {}}}, "give exactly one kind of model of"),
        ({"teacher__model": {}}, "give exactly one kind of model of"),
        ({"teacher__model": {"init_from_teacher": {"layers": [0]}}}, "can't be cut from a teacher"),
        ({"teacher__train": None}, "starts untrained: give teacher.train"),
        ({"task": "causal_lm"}, "task causal_lm takes documents features, but data.features has tabular"),
        ({"data__label": None}, "classification needs data.label"),
        ({"data__features": {"tabular": {}}}, "name at least one numeric or categorical column"),
        ({"student__model": {"cnn": {}}}, "student.model.cnn takes image features, not tabular"),
        ({"data__validation": 0.5, "data__test": 0.45}, "leave some to train on"),
        ({"seeds": [1, 1]}, "seeds holds a seed twice"),
        ({"seeds": []}, "seeds: "),
        ({"student": None}, "student: "),
    ],
)
def test_a_mistake_is_one_clear_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_job(tree(**changes), "job.yaml")
    assert said in str(caught.value) and str(caught.value).startswith("job.yaml: ")
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named() -> None:
    values = tree()
    del values["teacher"]
    with pytest.raises(SpecError, match="teacher is missing"):
        parse_job(values)


def test_overrides(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(tree()))
    job = load_job(path, ["distill.temperature=4", "seeds=[3, 4]"])
    assert job.distill.temperature == 4 and job.seeds == (3, 4)
    with pytest.raises(SpecError, match="--set takes path=value"):
        load_job(path, ["distill.temperature"])
    with pytest.raises(SpecError, match="no such place"):
        load_job(path, ["name.first=x"])


@pytest.mark.parametrize(("text", "said"), [("a: [", "not valid YAML"), ("- 1", "must be a mapping")])
def test_files_that_hold_no_spec(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    with pytest.raises(SpecError, match=said):
        load_job(path)
    with pytest.raises(SpecError, match="can't read the spec"):
        load_job(tmp_path / "none.yaml")


def test_yaml_can_run_no_code(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("a: !!python/object/apply:os.system ['true']")
    with pytest.raises(SpecError, match="not valid YAML"):
        load_job(path)


@pytest.mark.parametrize(
    "uri",
    ["http://me:hunter2@tracker:5000", "https://hunter2@tracker", "postgresql://host/db?user=me&password=hunter2"],
)
def test_a_login_in_the_tracking_address_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(SpecError, match=r"tracking\.uri holds a login, and specs are stored") as caught:
        parse_job(tree(tracking={"uri": uri}))
    assert "hunter2" not in str(caught.value) and "\n" not in str(caught.value)
    for fine in ("http://tracker:5000", "sqlite:////data/a@b/mlflow.db", None):
        assert parse_job(tree(tracking={"uri": fine})).tracking.uri == fine
