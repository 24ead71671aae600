"""The capture's part of the spec: numbers and ranges of actors, kinds of them, and what is put up with."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from distill_jobs.spec import Capture


def parse(**values: Any) -> Capture:
    return Capture.model_validate_json(json.dumps(values))


def test_one_kind_by_default() -> None:
    [kind] = parse(actors=3, cpus_per_actor=2.0, gpus_per_actor=0.5, batch_tokens=100).crews
    assert (kind.least, kind.most, kind.cpus_per_actor, kind.gpus_per_actor) == (3, 3, 2.0, 0.5)
    assert kind.batch_tokens == 100 and kind.name == "actors"
    [kind] = parse(actors=[1, 8]).crews
    assert (kind.least, kind.most) == (1, 8)


def test_several_kinds() -> None:
    spot = {"name": "spot", "actors": [0, 16], "gpus_per_actor": 1, "accelerator": "L4", "batch_tokens": 64}
    fixed = {"name": "fixed", "actors": 8, "gpus_per_actor": 1, "accelerator": "H100"}
    first, second = parse(kinds=[fixed, spot], batch_tokens=512).crews
    assert (first.least, first.most, first.batch_tokens, first.accelerator) == (8, 8, 512, "H100")
    assert (second.least, second.most, second.batch_tokens, second.accelerator) == (0, 16, 64, "L4")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"actors": [3, 2]}, "3 is more than 2"),
        ({"actors": 0}, "greater than 0"),
        ({"actors": [0, 4], "kinds": [{"name": "a"}]}, "remove actors beside it"),
        ({"kinds": [{"name": "a"}, {"name": "a"}]}, "two kinds have the same name"),
        ({"kinds": [{"name": "a", "actors": [0, 2]}]}, "no kind has a least number"),
        ({"kinds": [{"name": "a", "accelerator": "L4"}]}, "no gpus_per_actor"),
        ({"gpus_per_actor": 1.5}, "a fraction of one GPU or a whole number"),
        ({"max_quarantined": 1.0}, "max_quarantined"),
        ({"max_quarantined": -1}, "max_quarantined"),
    ],
)
def test_mistakes(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        parse(**values)


def test_the_limit_of_the_quarantine() -> None:
    assert parse(max_quarantined=5).quarantine_limit(10_000) == 5
    assert parse(max_quarantined=0.01).quarantine_limit(1_050) == 10
    assert parse(max_quarantined=0).quarantine_limit(1_000) == 0
    assert parse().quarantine_limit(1_000) == 10


def test_what_the_teacher_computes_in() -> None:
    assert parse(precision="bf16").arithmetic == "bf16"
    assert parse(precision="bf16", autocast=True).arithmetic == "bf16+autocast"
