"""The losses, T and alpha in the spec."""

import json
from typing import Any

import pytest
from pydantic import ValidationError
from test_spec import tree

from distill_jobs.errors import SpecError
from distill_jobs.spec import Distill, parse_job
from distill_jobs.spec.distill import AlphaSchedule, TemperatureSchedule
from distill_jobs.spec.gate import Drop


def parse(**values: Any) -> Distill:
    return Distill.model_validate_json(json.dumps(values))


def test_plain_numbers_are_digested_as_ever() -> None:
    assert parse().inputs() == {"temperature": 2.0, "alpha": 0.9}
    assert parse(temperature=4, alpha=1, loss="forward_kl", standardise=False).inputs() == {
        "temperature": 4.0,
        "alpha": 1.0,
    }


def test_whatever_changes_the_loss_is_digested() -> None:
    moving = {"schedule": "cosine", "from": 4.0, "to": 1.0}
    assert parse(temperature=moving).inputs() == {"temperature": moving, "alpha": 0.9}
    found = parse(loss={"jensen_shannon": {"beta": 0.1}}, standardise=True).inputs()
    assert found["loss"] == {"name": "jensen_shannon", "beta": 0.1} and found["standardise"] is True
    assert parse(loss="jensen_shannon").inputs() == parse(loss={"jensen_shannon": {"beta": 0.5}}).inputs()


def test_names_arguments_and_schedules() -> None:
    spec = parse(temperature={"schedule": "linear", "from": 4, "to": 1}, alpha={"schedule": "wsd", "from": 1, "to": 0})
    assert isinstance(spec.temperature, TemperatureSchedule) and spec.temperature.ends == (4.0, 1.0)
    assert isinstance(spec.alpha, AlphaSchedule) and spec.alpha.ends == (1.0, 0.0)
    assert spec.follows_learning_rate and not parse(temperature=3).follows_learning_rate
    assert parse(loss="decoupled").loss.chosen.beta == 8.0
    assert parse(loss={"skew_reverse_kl": {"skew": 0.3}}).loss.chosen.skew == 0.3
    assert parse(loss={"reverse_kl": {}}).loss == parse(loss="reverse_kl").loss


def test_several_teachers_and_a_live_one_are_digested() -> None:
    found = parse(teachers=[{}, {"store": "b", "slices": {"age": {"old": 2}}}], by_label="right").inputs()
    assert found["by_label"] == "right" and found["teachers"][1]["slices"] == {"age": {"old": 2.0}}
    assert parse(soft_labels="live").inputs()["soft_labels"] == "live"
    assert "soft_labels" not in parse(soft_labels="store").inputs()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"teachers": [{"store": "a"}, {"store": "b"}]}, "an entry without store, once"),
        ({"teachers": [{}]}, "at least one other"),
        ({"teachers": [{"weight": 0}, {"store": "b", "weight": 0}]}, "no teacher has any weight"),
        ({"teachers": [{"weight": -1}, {"store": "b"}]}, "greater than or equal to 0"),
        ({"by_label": "right"}, "by_label chooses between teachers"),
        ({"teachers": [{}, {"store": "b"}], "mix": [{"store": "c", "share": 0.1}]}, "give one of them"),
        ({"teachers": [{}, {"store": "b"}], "soft_labels": "live"}, "remove teachers"),
        ({"mix": [{"store": "c", "share": 0.1}], "soft_labels": "live"}, "remove mix"),
    ],
)
def test_teachers_that_do_not_fit(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        parse(**values)


@pytest.mark.parametrize("distill", [{}, {"temperature": {"schedule": "linear", "from": 4, "to": 1}, "loss": "mse"}])
def test_the_resolved_spec_can_be_read_again(distill: dict[str, Any]) -> None:
    job = parse_job(tree(distill=distill))
    assert parse_job(job.model_dump(mode="json", exclude_none=True)) == job
    assert parse_job(job.model_dump(mode="json")) == job


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"distill__temperature": {"schedule": "linear", "from": 40, "to": 1}},
            "distill.temperature.from: Input should",
        ),
        (
            {"distill__temperature": {"schedule": "linear", "fom": 4, "to": 1}},
            "distill.temperature.fom; did you mean from",
        ),
        ({"distill__temperature": {"schedule": "lin", "from": 4, "to": 1}}, "'linear', 'cosine' or 'wsd'"),
        ({"distill__temperature": {"schedule": "constant", "from": 4, "to": 1}}, "a constant schedule does not move"),
        ({"distill__alpha": {"schedule": "linear", "from": 0, "to": 2}}, "distill.alpha.to: Input should be less"),
        ({"distill__loss": "revers_kl"}, "unknown key distill.loss.revers_kl; did you mean reverse_kl?"),
        ({"distill__loss": {"jensen_shannon": {"bta": 1}}}, "distill.loss.jensen_shannon.bta; did you mean beta?"),
        (
            {"distill__loss": {"jensen_shannon": {"beta": 1.0}}},
            "distill.loss.jensen_shannon.beta: Input should be less",
        ),
        ({"distill__loss": {"mse": {}, "reverse_kl": {}}}, "give exactly one loss of"),
        ({"distill__loss": {"decoupled": {"alpha": 0, "beta": 0}}}, "is no loss"),
        ({"distill__mix": [{"stor": "x", "share": 0.1}]}, "distill.mix.0.stor; did you mean store?"),
        (
            {"distill__loss": "mse", "capture__codec": {"hybrid": {}}},
            "distill.loss mse compares all classes one by one, but capture.codec hybrid keeps only some",
        ),
        (
            {"distill__alpha": {"schedule": "wsd", "from": 1, "to": 0}, "student__train__schedule": "constant"},
            "student.train.schedule is constant",
        ),
    ],
)
def test_a_mistake_is_one_clear_sentence(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_job(tree(**changes))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_codec_that_serves() -> None:
    for codec in ({"dense": {}}, None):
        assert parse_job(tree(distill__loss="mse", capture__codec=codec)).distill.loss.kind == "mse"
    with pytest.raises(ValidationError, match=r"the job's own store at least 0\.001"):
        parse(mix=[{"store": "a", "share": 0.5}, {"store": "b", "share": 0.5}])


def test_a_gate_is_digested_and_none_is_not() -> None:
    assert parse(gate="none").inputs() == parse().inputs()
    assert parse(gate={"none": {}}) == parse() and parse(gate="swap").gate.swap is not None
    assert parse(gate="swap").inputs()["gate"] == {"name": "swap"}
    assert parse(gate="revise").inputs() == parse(gate={"revise": {"eta": 0.8}}).inputs()
    assert parse(gate={"selective": {"k": 3}}).inputs()["gate"] == {"name": "selective", "k": 3, "rejected": 0.0}


def test_what_counts_as_confidently_wrong_goes_by_the_task() -> None:
    left_out, given = parse(gate="drop").gate, parse(gate={"drop": {"confidence": 0.6}}).gate
    assert left_out.of("classification").drop == Drop(confidence=0.9, gold=1.0, entropy=None)
    assert left_out.of("causal_lm").drop == Drop(confidence=0.0, gold=0.001, entropy=1.0)
    assert given.of("causal_lm").drop == Drop(confidence=0.6, gold=0.001, entropy=1.0)


@pytest.mark.parametrize(
    ("distill", "codec", "said"),
    [
        ({"gate": "rld", "loss": "reverse_kl"}, None, "rld is a loss of its own and leaves no place for loss reverse"),
        ({"gate": "revise", "standardise": True}, None, "which standardise takes out: give one of them"),
        ({"gate": {"rld": {"alpha": 0, "beta": 0}}}, None, "rld with alpha 0 and beta 0 is no loss"),
        ({"gate": {"drop": {"confidence": 2}}}, None, "distill.gate.drop.confidence: Input should be less than"),
        ({"gate": {"selective": {"k": 9}}}, {"topk": {"k": 8}}, "9 likeliest classes, but capture.codec topk keeps 8"),
        ({"gate": {"selective": {"k": 2}}}, {"sampled": {}}, "capture.codec sampled keeps 1 of them"),
        ({"gate": {"swop": {}}}, None, "unknown key distill.gate.swop; did you mean swap?"),
    ],
)
def test_gates_that_do_not_fit_are_refused(distill: dict[str, Any], codec: dict[str, Any] | None, said: str) -> None:
    spec = {**tree(), "distill": distill, **({"capture": {"codec": codec}} if codec else {})}
    with pytest.raises(SpecError, match=said):
        parse_job(spec)


def test_a_gate_that_stops_nothing_is_refused_once_the_classes_are_known() -> None:
    spec = parse(gate={"selective": {"k": 2}})
    assert "stops nothing among 2 classes" in str(spec.refusal("dense", {}, 2))
    assert spec.refusal("dense", {}, 3) is None and spec.refusal("hybrid", {"head": 4, "draws": 2}, 3) is None
